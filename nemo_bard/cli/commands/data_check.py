"""``nemo-bard data check PATH``."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_bard.cli import options

if TYPE_CHECKING:
    from nemo_bard.data.audit.findings import Report

SHOWN = 20
"""Lines of defects."""
ROWS = 200


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``data check``."""
    parser = subparsers.add_parser(
        "check",
        help="find what is wrong with a data set; exit code 1 if something is",
        description="Check a prepared folder against its manifest and decode a part of its samples, or all with --all; of"
        " raw data, check every row as `data prepare` would, without looking for duplicates. Rows count from 0. Exit code 0: nothing found, 1: defects,"
        " 2: wrong input.",
    )
    parser.add_argument("path", metavar="PATH", help="a prepared folder, a file or folder of any layout, or NAME:...")
    parser.add_argument(
        "--all", action="store_true", help="of a prepared folder: compare every byte, and decode every sample"
    )
    parser.add_argument(
        "--rows",
        type=options.positive,
        default=ROWS,
        metavar="N",
        help=f"samples of each prepared source to decode without --all (default: {ROWS})",
    )
    parser.add_argument("--seed", type=int, default=0, help="which samples (default: 0)")
    parser.add_argument("--jobs", type=options.positive, default=1, metavar="N", help="processes (default: 1)")
    parser.add_argument("--layout", metavar="NAME", help="of raw data (default: by its columns)")
    parser.add_argument("--split", metavar="NAME", help="of raw data")
    parser.add_argument(
        "--root-dir",
        type=Path,
        metavar="DIR",
        help="of raw data: where relative paths of images start (default: its folder)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON with every defect")
    parser.error = options.raise_error
    return parser


def run(args: argparse.Namespace) -> int:
    """Check, and tell."""
    from nemo_bard.upstream.console import hush

    hush()
    from nemo_bard.data.audit.run import check

    report = check(
        args.path,
        whole=args.all,
        rows=args.rows,
        seed=args.seed,
        jobs=args.jobs,
        layout=args.layout,
        split=args.split,
        root_dir=args.root_dir,
    )
    if args.json:
        sys.stdout.write(json.dumps(report.as_dict(), indent=2) + "\n")
    else:
        options.write_out(render(report))
    return 1 if report.findings.total else 0


def render(report: Report) -> str:
    """Defects line by line, the first of them, and a summary."""
    found = report.findings
    lines = [defect.line for defect in found.listed[:SHOWN]]
    if found.total > SHOWN:
        lines.append(f"... and {found.total - len(lines):,} more (--json lists them)")
    of_all = "" if report.rows is None or report.rows == found.checked else f" of {report.rows:,}"
    lines.append(
        f"{report.path}: {found.checked:,}{of_all} rows checked, {found.total:,} {'defect' if found.total == 1 else 'defects'}"
    )
    lines += [f"  {count:>8,}  {kind}" for kind, count in found.counts.most_common()]
    if not report.whole and report.rows is not None and found.checked < report.rows:
        lines.append("--all compares every byte and decodes every sample")
    return "\n".join(lines) + "\n"
