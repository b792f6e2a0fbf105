"""``nemo-bard convert SRC DST``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``convert``."""
    text = "Make a BARD start point from a Qwen3-VL or Bard-VL checkpoint. Weights are hard-linked where possible, else copied."
    parser = subparsers.add_parser("convert", help="make a BARD start point from a Qwen3-VL folder", description=text)
    parser.add_argument(
        "source",
        metavar="SRC",
        help="folder of a Qwen3-VL, Bard-VL or BARD checkpoint (safetensors), or its Hugging Face name: ORG/NAME[@REVISION]",
    )
    parser.add_argument("target", metavar="DST", type=Path, help="folder to write")
    parser.add_argument(
        "--block-size", type=int, help="tokens denoised together (default: 4; of a Bard-VL checkpoint its own)"
    )
    parser.add_argument(
        "--mask-token-id",
        type=int,
        help="row of the embedding that becomes the mask token (default: 151671, or the first free)",
    )
    parser.add_argument(
        "--context-attention",
        help="how prompt and finished blocks attend: block or causal (default: block; of a Bard-VL checkpoint its own)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it is a BARD checkpoint")
    return parser


def run(args: argparse.Namespace) -> int:
    """Convert and print what was written."""
    from nemo_bard.checkpoints.convert import convert

    report = convert(
        args.source,
        args.target,
        block_size=args.block_size,
        mask_token_id=args.mask_token_id,
        context_attention=args.context_attention,
        overwrite=args.overwrite,
    )
    sys.stdout.write(f"{report}\n")
    return 0
