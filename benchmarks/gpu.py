"""All benchmarks and the GPU tests in ten minutes on one GPU, as tables: JSON, Markdown and a picture.

    python benchmarks/gpu.py                        # everything
    python benchmarks/gpu.py --only decode_4b,train_4b
    python benchmarks/gpu.py --smoke                # the same code at a tiny shape on a CPU, to see that it runs

Each section is a process of its own with a limit, so that a crash or a slow one loses nothing else; what it had measured until
then is kept, and what failed stands in the tables with its one-line reason. README.md beside this says what the columns mean.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from _report import RESULTS, ROOT, Row, commit, version
from _summary import write_summary

HERE = Path(__file__).parent
GRACE_SECONDS = 5.0
"""For a stopped section to end, and for the summary."""
TINY = ("--shape", "tiny", "--device", "cpu", "--dtype", "float32", "--repeat", "1", "--threads", "1")
OUTCOME = re.compile(r"^(tests/\S+::.+?) (PASSED|FAILED|SKIPPED|ERROR)\b")
REASON = re.compile(r"^(?:FAILED|ERROR) (tests/\S+::.+?) - (.*)")


@dataclass(frozen=True, kw_only=True)
class Section:
    """One process."""

    name: str
    seconds: float
    """Its limit."""
    command: tuple[str, ...]
    """Script and arguments."""
    smoke: tuple[str, ...] | None = None
    """Arguments at a tiny shape; None leaves it out there."""


SECTIONS = (
    Section(
        name="ceilings",
        seconds=40,
        command=("ceilings.py",),
        smoke=("--device", "cpu", "--dtype", "float32", "--mib", "16", "--product", "256"),
    ),
    Section(
        name="decode_4b",
        seconds=160,
        command=("decode.py", "--shape", "4b", "--settings", "32:8", "8:2"),
        smoke=(
            *(*TINY, "--prompt-tokens", "40", "--image-tokens", "16", "--new-tokens", "16", "--settings", "8:2"),
            *("--paths", "ar", "ar_graph", "plain", "ours"),
        ),
    ),
    Section(
        name="train_4b",
        seconds=150,
        command=("train_step.py", "--shape", "4b", "--rows", "2048", "4096", "8192"),
        smoke=(
            *(*TINY, "--prompt-tokens", "70", "--image-tokens", "16", "--lengths", "150", "171", "--packing", "2"),
            *("--rows", "400", "--sample-tokens", "200"),
        ),
    ),
    Section(
        name="decode_2b",
        seconds=90,
        command=(
            *("decode.py", "--shape", "2b", "--settings", "32:8", "8:2"),
            *("--paths", "ar", "ar_graph", "plain", "ours"),
        ),
    ),
    Section(
        name="attention",
        seconds=80,
        command=("attention.py", "--shape", "4b"),
        smoke=(*TINY, "--lengths", "200", "400", "--sample-tokens", "200", "--prompt-tokens", "70"),
    ),
    Section(
        name="vision", seconds=50, command=("vision.py", "--shape", "4b"), smoke=(*TINY, "--images", "1:16", "2:36")
    ),
    Section(
        name="tests",
        seconds=270,
        command=("-m", "pytest", "-m", "gpu", "-v", "-rfE", "--no-header", "-p", "no:cacheprovider"),
        smoke=("tests/gpu",),
    ),
)
"""What matters most comes first, in case the time runs out."""


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--only", help=f"sections, joined by commas: {', '.join(names)}")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU; the figures mean nothing")
    parser.add_argument("--minutes", type=float, default=10.0, help="end before that")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the tables")
    args = parser.parse_args(argv)
    args.only = args.only.split(",") if args.only else names
    for name in args.only:
        if name not in names:
            parser.error(f"--only takes {', '.join(names)}; got {name!r}")
    return args


def check_machine(smoke: bool) -> None:
    """End the program with one line where nothing could run."""
    if importlib.util.find_spec("nemo_automodel") is None:
        raise SystemExit("error: nemo-automodel is not installed; benchmarks/README.md says how to bring it along")
    if not smoke and torch.cuda.device_count() == 0:
        raise SystemExit("error: no CUDA device here; --smoke runs the same code at a tiny shape on a CPU")


def other_versions() -> list[str]:
    """What is installed in another version than the one this package was tried with."""
    found = []
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        name, _, tried = line.partition("==")
        if name in ("torch", "transformers", "triton", "nemo-automodel") and (here := version(name)) != tried:
            found.append(f"{name} {here or 'is missing'}, tried with {tried}")
    return found


def run(section: Section, folder: Path, *, smoke: bool, seconds: float) -> Row:
    """Run a section.

    Args:
        section: What to run.
        folder: Where its result and log go.
        smoke: Whether at a tiny shape.
        seconds: Its limit.

    Returns:
        ``name``, ``command``, ``seconds`` it took, what it wrote (``facts`` and ``rows``), and ``failed`` if it did not end well.
    """
    command = list(section.command)
    is_script = command[0].endswith(".py")
    result, log = folder / f"{section.name}.json", folder / f"{section.name}.log"
    if smoke:
        assert section.smoke is not None
        command = [command[0], *section.smoke] if is_script else [*command, *section.smoke]
    told = " ".join(["python", f"benchmarks/{command[0]}" if is_script else command[0], *command[1:]])
    if is_script:
        command = [str(HERE / command[0]), *command[1:], "--output", str(result)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    if smoke:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = time.monotonic()
    with log.open("w") as stream:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=stream,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    row: Row = {"name": section.name, "command": told, "seconds": time.monotonic() - start}
    text = log.read_text(errors="replace")
    row |= read_result(result) if is_script else read_tests(text)
    if code is None:
        row["failed"] = f"stopped after {seconds:.0f} s; what it had measured is kept"
    elif code and not any("failed" in one for one in row["rows"]):
        row["failed"] = last_line(text) if code > 0 else f"ended by signal {-code}"
    return row


def read_result(path: Path) -> Row:
    """``facts`` and ``rows`` of a result file; empty if there is none."""
    facts = json.loads(path.read_text()) if path.is_file() else {}
    return {"rows": facts.pop("rows", []), "facts": facts}


def read_tests(text: str) -> Row:
    """The same from the output of ``pytest -v -rfE``: a row for each test, and lines that tests have measured."""
    outcomes, reasons, measured = {}, {}, []
    for line in text.splitlines():
        if found := OUTCOME.match(line):
            outcomes[found[1]] = found[2].lower()
        elif found := REASON.match(line):
            reasons[found[1]] = found[2]
        elif line.startswith("measured: "):
            measured.append(line.removeprefix("measured: "))
    rows: list[Row] = [{"test": test, "outcome": outcome} for test, outcome in outcomes.items()]
    for row in rows:
        if row["outcome"] in ("failed", "error"):
            row["failed"] = reasons.get(row["test"], "no reason was told")[:300]
    return {"rows": rows, "facts": {"measured": measured}}


def last_line(text: str) -> str:
    """The last line of a log that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return (lines[-1] if lines else "it printed nothing")[:300]


def say(text: str) -> None:
    """Write a line for the reader."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def run_all(args: argparse.Namespace, folder: Path, end: float) -> list[Row]:
    """Run the sections in turn (two at a time with ``--smoke``) until ``end``, a time of ``time.monotonic``."""
    chosen = [one for one in SECTIONS if one.name in args.only and not (args.smoke and one.smoke is None)]

    def one(section: Section) -> Row:
        left = end - time.monotonic() - GRACE_SECONDS
        if left <= 0:
            row: Row = {"name": section.name, "seconds": 0.0, "rows": [], "facts": {}, "failed": "the time was up"}
        else:
            row = run(section, folder, smoke=args.smoke, seconds=left if args.smoke else min(section.seconds, left))
        bad = sum("failed" in line for line in row["rows"])
        counts = f"{len(row['rows'])} rows" + (f", {bad} of them failed" if bad else "")
        say(f"{section.name}: {counts} in {row['seconds']:.0f} s" + (f"; {row['failed']}" if "failed" in row else ""))
        return row

    with ThreadPoolExecutor(2 if args.smoke else 1) as pool:
        return list(pool.map(one, chosen))


def main(argv: Sequence[str] | None = None) -> int:
    """Run everything and write the tables; 1 if anything failed."""
    args = parse_args(argv)
    check_machine(args.smoke)
    start = time.monotonic()
    notes = other_versions()
    for note in notes:
        say(f"note: {note}")
    with tempfile.TemporaryDirectory() as folder:
        sections = run_all(args, Path(folder), start + 60 * args.minutes)
    facts = {
        "smoke": args.smoke,
        "command": " ".join(["python", "benchmarks/gpu.py", *(sys.argv[1:] if argv is None else argv)]),
        "commit": commit(),
        "notes": notes,
        "minutes": (time.monotonic() - start) / 60,
    }
    for path in write_summary(args.output, facts, sections):
        say(f"written: {path}")
    return int(any("failed" in part for section in sections for part in (section, *section["rows"])))


if __name__ == "__main__":
    sys.exit(main())
