"""``nemo-bard plan --model 8b --gpus 64``."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import fields

from nemo_bard.base.settings import add_flags, from_mapping, given_flags
from nemo_bard.cost.estimate import PlanSettings, make_plan
from nemo_bard.cost.report import as_dict, render


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``plan``."""
    parser = subparsers.add_parser(
        "plan",
        help="estimate memory, time per step and days of a training run",
        description="Estimate memory per GPU, computation, communication, time per step and days of a training stage by"
        " arithmetic alone; prints what to change, the formulas it used and everything it assumed.",
    )
    add_flags(parser, fields(PlanSettings), show_defaults=True)
    parser.add_argument("--json", action="store_true", help="print JSON")
    return parser


def run(args: argparse.Namespace) -> int:
    """Compute and print."""
    plan = make_plan(from_mapping(PlanSettings, given_flags(args, fields(PlanSettings))))
    sys.stdout.write(json.dumps(as_dict(plan), indent=2) + "\n" if args.json else render(plan))
    return 0
