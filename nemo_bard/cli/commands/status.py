"""``nemo-bard status RUN_DIR``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``status``."""
    parser = subparsers.add_parser(
        "status",
        help="tell how far a pipeline's run is",
        description="Tell from a run directory which stage is running, its step, loss and time left, and whether the"
        " command has to be run again. Needs nothing but the files.",
    )
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path, help="run directory of a pipeline")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Read and print."""
    from nemo_bard.pipeline.status import read_status, render

    status = read_status(args.run_dir)
    if args.json:
        facts = {**asdict(status), "complete": status.complete, "needs_resume": status.needs_resume}
        sys.stdout.write(json.dumps(facts, indent=2) + "\n")
    else:
        sys.stdout.write(render(status, args.run_dir))
    return 0
