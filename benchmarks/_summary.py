"""The sections of ``gpu.py`` as JSON, Markdown and a picture, and what they say about the aims."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _report import Row, markdown_table


@dataclass(frozen=True, kw_only=True)
class Aim:
    """A figure to reach; what it was on the GPU of this run is in the table."""

    what: str
    aim: str
    section: str
    reached: Callable[[list[Row]], float | None]
    met: Callable[[float], bool]


def pick(rows: list[Row], key: str, **labels: Any) -> float | None:
    """A figure of the one row with these labels; None if it is not there."""
    found = [row for row in rows if all(row.get(name) == value for name, value in labels.items())]
    return found[0].get(key) if found else None


def _flex_over_dense(rows: list[Row]) -> float | None:
    flex, dense = (pick(rows, "ms", path=path, length=8192) for path in ("packed", "packed_dense"))
    return None if flex is None or dense is None else dense / flex


_OURS = {"path": "ours", "block_size": 32}
AIMS = (
    Aim(
        what="4B, bfloat16, batch 1, B = 32, 1024 tokens of context: ms per denoising step",
        aim="at most 3.0",
        section="decode_4b",
        reached=lambda rows: pick(rows, "ms_per_step", **_OURS),
        met=lambda value: value <= 3.0,
    ),
    Aim(
        what="the same: tokens/s over the plain path's",
        aim="at least 5",
        section="decode_4b",
        reached=lambda rows: pick(rows, "times_plain", **_OURS),
        met=lambda value: value >= 5,
    ),
    Aim(
        what="the same: tokens/s over the best autoregressive path's, prompts left out, at the tokens per forward of the row",
        aim="at least 3",
        section="decode_4b",
        reached=lambda rows: pick(rows, "times_ar", **_OURS),
        met=lambda value: value >= 3,
    ),
    Aim(
        what="4B, training step, packed row of 8192 tokens: MFU",
        aim="at least 0.40",
        section="train_4b",
        reached=lambda rows: pick(rows, "mfu", path="packed", length=8192),
        met=lambda value: value >= 0.40,
    ),
    Aim(
        what="the same: steps with flex over steps with a dense mask",
        aim="at least 1.5",
        section="train_4b",
        reached=_flex_over_dense,
        met=lambda value: value >= 1.5,
    ),
)
"""For an H200."""


def aim_rows(sections: list[Row]) -> list[Row]:
    """What became of the aims."""
    rows = []
    for aim in AIMS:
        measured = next((section["rows"] for section in sections if section["name"] == aim.section), [])
        value = aim.reached(measured)
        verdict = "not measured" if value is None else "yes" if aim.met(value) else "no"
        rows.append({"what": aim.what, "aim": aim.aim, "value": value, "met": verdict})
    return rows


AIM_COLUMNS = {"what": "figure|s", "aim": "aim on an H200|s", "value": "here|.2f", "met": "reached|s"}


def write_summary(folder: Path, facts: Row, sections: list[Row]) -> list[Path]:
    """Write ``gpu_<device>.json``, ``.md`` and, if matplotlib is there, ``.png``; returns their paths."""
    machine = next((section["facts"] for section in sections if "device" in section["facts"]), {})
    device = "cpu_smoke" if facts["smoke"] else machine.get("device", "unknown")
    stem = "gpu_" + re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    keys = ("device", "device_gib", "driver", "cuda", "python", "versions")
    facts = {**{key: machine.get(key) for key in keys}, **facts}
    aims = [] if facts["smoke"] else aim_rows(sections)
    data, text, picture = (folder / f"{stem}.{kind}" for kind in ("json", "md", "png"))
    data.write_text(json.dumps({**facts, "aims": aims, "sections": sections}, indent=1) + "\n")
    drawn = plot(sections, picture)
    text.write_text("\n".join(markdown(facts, aims, sections, picture.name if drawn else None)) + "\n")
    return [data, text, picture] if drawn else [data, text]


def markdown(facts: Row, aims: list[Row], sections: list[Row], picture: str | None) -> Iterator[str]:
    """Lines of the Markdown file."""
    yield f"# Benchmarks on {facts['device'] or 'an unknown device'}"
    yield ""
    if facts["smoke"]:
        yield "**A smoke run at a tiny shape: these figures mean nothing.**"
        yield ""
    versions = ", ".join(f"{name} {number or 'missing'}" for name, number in (facts["versions"] or {}).items())
    yield f"- driver {facts['driver'] or '-'}, CUDA {facts['cuda'] or '-'}, Python {facts['python']}, {versions}"
    yield f"- `{facts['command']}`, commit {facts['commit'] or 'unknown'}, {facts['minutes']:.1f} minutes"
    yield from (f"- {note}" for note in facts["notes"])
    if aims:
        yield from ("", markdown_table(aims, AIM_COLUMNS))
    if picture:
        yield from ("", f"![ms per step, tokens/s, training and attention]({picture})")
    for section in sections:
        yield from ("", f"## {section['name']}", "", f"`{section.get('command', 'not run')}`")
        if "failed" in section:
            yield from ("", f"**Failed**: {section['failed']}")
        yield ""
        yield from test_lines(section) if section["name"] == "tests" else section_lines(section)


def section_lines(section: Row) -> Iterator[str]:
    """A benchmark's rows, and what the package warned of."""
    if section["rows"]:
        yield markdown_table(section["rows"], section["facts"]["columns"])
    warned = section["facts"].get("warnings", [])
    if warned:
        yield ""
    yield from (f"- warned: {line}" for line in warned)


def test_lines(section: Row) -> Iterator[str]:
    """How many tests passed, what failed, and what tests have measured."""
    outcomes = [row["outcome"] for row in section["rows"]]
    yield ", ".join(f"{outcomes.count(name)} {name}" for name in ("passed", "failed", "error", "skipped"))
    yield from (f"- `{row['test']}`: {row['failed']}" for row in section["rows"] if "failed" in row)
    yield from (f"- {line}" for line in section["facts"]["measured"])


def plot(sections: list[Row], path: Path) -> bool:
    """Draw decoding, training and attention; False without matplotlib or without anything to draw."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = {section["name"]: [row for row in section["rows"] if "failed" not in row] for section in sections}
    decoded = [(name, row) for name in ("decode_4b", "decode_2b") for row in rows.get(name, []) if "ms_per_step" in row]
    lines = [("train_4b", "ms per training step"), ("attention", "ms, attention of one layer")]
    if not decoded and not any(rows.get(name) for name, _ in lines):
        return False
    figure, axes = pyplot.subplots(2, 2, figsize=(13, 9))
    labels = [
        f"{name.removeprefix('decode_')} {row['path']}" + (f" B={row['block_size']}" if "block_size" in row else "")
        for name, row in decoded
    ]
    for axis, key, title in zip(
        axes[0],
        ("ms_per_step", "decode_tokens_per_second"),
        ("ms per step (black: floor)", "tokens/s without the prompt"),
        strict=True,
    ):
        axis.barh(labels, [row[key] for _, row in decoded])
        axis.invert_yaxis()
        axis.set(title=title)
    floors = [row["floor_ms"] for _, row in decoded]
    axes[0][0].scatter(floors, range(len(floors)), color="black", marker="|", s=200, zorder=3)
    for axis, (name, title) in zip(axes[1], lines, strict=True):
        measured = rows.get(name, [])
        for path_name in dict.fromkeys(row["path"] for row in measured):
            points = sorted((row["length"], row["ms"]) for row in measured if row["path"] == path_name)
            axis.plot(*zip(*points, strict=True), marker="o", label=path_name)
        axis.set(title=title, xlabel="tokens of a row", ylim=(0, None))
        axis.grid(alpha=0.3)
        if measured:
            axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
