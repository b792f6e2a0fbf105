"""``nemo-bard merge CHECKPOINT DST``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``merge``."""
    text = "Add the LoRA adapters of a training run to the weights they were trained on: a whole checkpoint folder."
    parser = subparsers.add_parser("merge", help="add LoRA adapters to their base checkpoint", description=text)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a run's checkpoint, such as RUN/LATEST")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write")
    parser.add_argument("--base", metavar="DIR", type=Path, help="base checkpoint (default: the one the adapters name)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, or auto: as in the base (default), which rounds the sum"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a BARD checkpoint")
    return parser


def run(args: argparse.Namespace) -> int:
    """Merge and print what was written."""
    from nemo_bard.checkpoints.merge import merge

    report = merge(args.checkpoint, args.target, base=args.base, dtype=args.dtype, overwrite=args.overwrite)
    sys.stdout.write(f"{report}\n")
    return 0
