"""``nemo-bard plan --model 8b --gpus 64``."""

from __future__ import annotations

import argparse
import json
import sys


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``plan``."""
    parser = subparsers.add_parser(
        "plan",
        help="estimate memory, time per step and days of a training run",
        description="Estimate memory per GPU, time per step and days of a training stage by arithmetic alone; prints the"
        " formulas it used and everything it assumed.",
    )
    parser.add_argument("--model", required=True, help="shape: tiny, cpu, 2b, 4b or 8b")
    parser.add_argument("--gpus", type=int, required=True, metavar="N")
    parser.add_argument("--gpu", default="h100", help="a100, h100 (default) or h200")
    parser.add_argument("--max-length", type=int, default=8192, metavar="N", help="row length (default: 8192)")
    parser.add_argument("--block-size", type=int, default=8, metavar="N", help="(default: 8)")
    parser.add_argument("--global-batch-size", type=int, default=256, metavar="N", help="samples (default: 256)")
    parser.add_argument("--activation-checkpointing", action="store_true")
    parser.add_argument("--dense-mask", action="store_true", help="attention with a dense mask rather than flex")
    parser.add_argument("--dtype", default="bfloat16", help="compute dtype: bfloat16 (default) or float32")
    parser.add_argument("--samples", type=float, default=4.4e6, metavar="N", help="(default: 4.4e6, as published)")
    parser.add_argument("--utilisation", type=float, default=0.4, metavar="X", help="share of the peak (default: 0.4)")
    parser.add_argument("--prompt-tokens", type=int, default=530, metavar="N", help="of a sample (default: 530)")
    parser.add_argument("--image-tokens", type=int, default=400, metavar="N", help="of the prompt (default: 400)")
    parser.add_argument("--response-tokens", type=int, default=170, metavar="N", help="of a sample (default: 170)")
    parser.add_argument(
        "--supervised", type=float, default=0.5, metavar="X", help="share of the response (default: 0.5)"
    )
    parser.add_argument("--real-tokens", type=float, default=0.97, metavar="X", help="share of a row (default: 0.97)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    from dataclasses import fields

    from nemo_bard.cost.estimate import PlanSettings, make_plan, render

    plan = make_plan(PlanSettings(**{field.name: getattr(args, field.name) for field in fields(PlanSettings)}))
    sys.stdout.write(json.dumps(plan.as_dict(), indent=2) + "\n" if args.json else render(plan))
    return 0
