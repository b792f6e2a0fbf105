"""Where a figure comes from (device, versions, command, commit), tables, and result files that grow row by row."""

from __future__ import annotations

import json
import logging
import platform
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "torchvision", "transformers", "triton", "nemo-automodel", "nemo-bard")

Row = dict[str, Any]


def version(package: str) -> str | None:
    """Version of an installed package; that of this checkout for ``nemo-bard``; None if it is absent."""
    if package == "nemo-bard":
        from nemo_bard import __version__

        return __version__
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of this checkout, ``-dirty`` if it was changed; None without git."""
    git = shutil.which("git")
    if git is None:
        return None
    command = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None


def device_name(device: torch.device) -> str:
    """Name of a GPU, or of the processor with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{model[0] if model else platform.processor()} ({torch.get_num_threads()} threads)"


def driver_version() -> str | None:
    """Version of NVIDIA's driver; None without one."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.split("\n")[0].strip() or None if found.returncode == 0 else None


def environment(device: torch.device, dtype: torch.dtype) -> Row:
    """Device, versions, command and commit of this run."""
    on_gpu = device.type == "cuda"
    return {
        "device": device_name(device),
        "device_gib": torch.cuda.get_device_properties(device).total_memory / 2**30 if on_gpu else None,
        "driver": driver_version() if on_gpu else None,
        "cuda": torch.version.cuda if on_gpu else None,
        "dtype": str(dtype).removeprefix("torch."),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in PACKAGES},
        "command": shlex.join(["python", *sys.argv]),
        "commit": commit(),
    }


def one_line(error: BaseException) -> str:
    """Kind and first line of an error."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


def attempt(row: Row, measure: Callable[[], Row]) -> Row:
    """``row`` with what ``measure`` found, or with the one-line reason as ``failed``: other rows shall not be lost."""
    try:
        return {**row, **measure()}
    except Exception as error:
        sys.stderr.write(f"failed: {row}: {one_line(error)}\n")
        return {**row, "failed": one_line(error)}


def cells(rows: list[Row], columns: dict[str, str]) -> list[list[str]]:
    """Head and rows as text; ``columns`` maps a key to ``title|format``. A column that no row has is left out."""
    shown = {key: spec.split("|") for key, spec in columns.items() if any(row.get(key) is not None for row in rows)}
    body = [
        ["-" if row.get(key) is None else format(row[key], spec) for key, (_, spec) in shown.items()] for row in rows
    ]
    head = [title for title, _ in shown.values()]
    if any("failed" in row for row in rows):
        head.append("failed")
        body = [[*line, row.get("failed", "")] for line, row in zip(body, rows, strict=True)]
    return [head, *body]


def table(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows for a terminal."""
    lines = cells(rows, columns)
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    text = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([text[0], "-" * len(text[0]), *text[1:]])


def markdown_table(rows: list[Row], columns: dict[str, str]) -> str:
    """Rows as a Markdown table."""
    head, *body = [[cell.replace("|", "/") for cell in line] for line in cells(rows, columns)]
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


class Warned(logging.Handler):
    """Keeps the different warnings of a package: they say what was slower than it should be."""

    def __init__(self, package: str) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []
        logging.getLogger(package).addHandler(self)

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a line."""
        line = " ".join(record.getMessage().split())[:300]
        if line not in self.lines:
            self.lines.append(line)


class Results:
    """A result file; it is written after every row, so that a program that is killed leaves what it has measured."""

    def __init__(self, name: str, output: Path | str | None, columns: dict[str, str], facts: Row) -> None:
        """Where it goes (``output``, or ``results/<name>.json``), how rows are shown, and what holds for all of them."""
        self.path = Path(output) if output else RESULTS / f"{name}.json"
        self.facts, self.rows = {**facts, "columns": columns}, []
        self.warned = Warned("nemo_bard")

    def add(self, *rows: Row) -> None:
        """Keep rows and write the file."""
        self.rows.extend(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(
            json.dumps({**self.facts, "warnings": self.warned.lines, "rows": self.rows}, indent=2) + "\n"
        )
