"""``nemo-bard data prepare MIX.yaml OUT``."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bard.upstream.console import hush

if TYPE_CHECKING:
    from nemo_bard.data.prepared.layout import Manifest

SIGNAL_EXIT = 128


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``prepare``."""
    parser = subparsers.add_parser(
        "prepare",
        help="make a prepared folder of the sources that a mixture file names",
        description="Read, check and convert the sources of a mixture file, once. Killed at any instant, the same command"
        " goes on where it was.",
    )
    parser.add_argument(
        "mix", metavar="MIX.yaml", type=Path, help="mixture file: sources, and what to do with their rows"
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder to make")
    parser.add_argument("--jobs", type=int, metavar="N", help="worker processes (default: one per CPU core)")
    parser.add_argument("--retry", action="store_true", help="read units again in which an earlier run rejected rows")
    return parser


def run(args: argparse.Namespace) -> int:
    """Prepare, and print what the folder holds."""
    if args.jobs is not None and args.jobs < 0:
        raise ValueError(f"--jobs must be an integer >= 0, got {args.jobs}")
    from nemo_bard.data.prepare.mix import read_mix
    from nemo_bard.data.prepare.run import Interrupted, prepare

    hush()
    jobs = _cores() if args.jobs is None else args.jobs
    mix = read_mix(args.mix)
    try:
        manifest = prepare(mix, args.out, jobs=jobs, retry=args.retry, say=_say)
    except Interrupted as stop:
        _say(f"stopped by {signal.Signals(stop.number).name}; the same command goes on where it was")
        return SIGNAL_EXIT + stop.number
    sys.stdout.write(f"{table(manifest)}\n{args.out}: {sum(s.rows for s in manifest.sources):,} samples\n")
    return 0


def _cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")


def table(manifest: Manifest) -> str:
    """Rows and samples of every source, as lines of text."""
    rows: list[tuple[str, ...]] = [("source", "layout", "rows", "filtered", "rejected", "duplicates", "samples", "MB")]
    for entry in manifest.sources:
        duplicates = entry.rejected.get("duplicate", 0)
        counts = (
            entry.read,
            sum(entry.filtered.values()),
            sum(entry.rejected.values()) - duplicates,
            duplicates,
            entry.rows,
            round(sum(part.bytes for part in entry.parts) / 1e6),
        )
        rows.append((entry.name, entry.layout, *(f"{count:,}" for count in counts)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
