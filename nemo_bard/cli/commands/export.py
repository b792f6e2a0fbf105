"""``nemo-bard export SRC DST``."""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from nemo_bard.cli import options

_EPILOG = """\
SRC is a chain's run folder (its last finished stage, or --stage), a stage, a checkpoint of a training run or the folder
around it (LATEST), or a BARD folder. Sharded weights of an interrupted run are put together, LoRA adapters are added to
their base. Weights are read and written one tensor at a time; DST appears whole or not at all.

With --adapter DST gets the weights that the first LoRA stage began with, and adapters/NAME for each LoRA stage of SRC, or
those of --stage; an adapter holds what all LoRA stages up to its own have learnt. NAME is b and the block size:
  nemo-bard generate --model DST --adapter b32 --prompt "..."     nemo-bard merge DST/adapters/b32 WHOLE
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``export``."""
    text = "Make a Hugging Face folder of any training checkpoint: weights, processor, settings and a model card."
    parser = subparsers.add_parser(
        "export",
        help="make a Hugging Face folder of any training checkpoint",
        description=text,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = options.raise_error
    parser.add_argument("source", metavar="SRC", type=Path, help="run, stage, checkpoint or folder; see below")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--stage",
        metavar="NAME",
        action="append",
        default=[],
        help="stage of a run folder (default: the last finished one); with --adapter it may be repeated (default: all)",
    )
    parser.add_argument("--adapter", action="store_true", help="keep LoRA stages as adapters on their base; see below")
    parser.add_argument(
        "--base", metavar="DIR", type=Path, help="checkpoint that training began with (default: the one the run names)"
    )
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16, float16, or auto: each tensor as it is (default)"
    )
    parser.add_argument("--max-shard-size", default="5GB", metavar="SIZE", help="of a weight file (default: 5GB)")
    parser.add_argument(
        "--self-contained", action="store_true", help="with the code of model and decoder, for transformers alone"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a BARD checkpoint")
    return parser


def run(args: argparse.Namespace) -> int:
    """Export and print what was written."""
    from nemo_bard.upstream.console import hush

    hush()
    from nemo_bard.checkpoints.adapters import export_adapters
    from nemo_bard.checkpoints.exporting.export import export

    if not args.adapter and len(args.stage) > 1:
        raise ValueError(f"--stage may be given once without --adapter, got {', '.join(args.stage)}")
    make = (
        partial(export_adapters, stages=args.stage)
        if args.adapter
        else partial(export, stage=args.stage[0] if args.stage else None)
    )
    report = make(
        args.source,
        args.target,
        base=args.base,
        dtype=args.dtype,
        max_shard_size=args.max_shard_size,
        self_contained=args.self_contained,
        overwrite=args.overwrite,
    )
    sys.stdout.write(f"{report}\n")
    return 0
