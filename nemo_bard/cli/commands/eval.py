"""``nemo-bard eval --model DIR --tasks mmmu_val,mmstar``: benchmarks through lmms-eval."""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path

from nemo_bard.checkpoints.folder import check_checkpoint
from nemo_bard.cli import options

DEFAULT_OUTPUT = Path("lmms_eval_results")
_EPILOG = """\
Without --tasks these run, which Bard-VL's model card has numbers of:
  {tasks}
Arguments behind -- go to lmms-eval as they are, such as -- --include_path DIR --log_samples. Tasks that ask for likelihoods
need -- --force_simple. lmms-eval downloads what its tasks need.
"""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``eval``."""
    from nemo_bard.evaluation.harness.command import PUBLISHED

    parser = subparsers.add_parser(
        "eval",
        help="run public benchmarks through lmms-eval",
        description="Print the command of lmms-eval for a checkpoint or a server, and run it.",
        epilog=_EPILOG.format(tasks=", ".join(PUBLISHED)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.error = options.raise_error
    parser.add_argument(
        "--model", metavar="DIR", help="checkpoint folder; with --server the served name (default: the only one)"
    )
    parser.add_argument("--device", help=options.DEVICE_HELP)
    parser.add_argument("--dtype", default="auto", help=options.DTYPE_HELP)
    parser.add_argument(
        "--server", metavar="URL", help="ask an OpenAI-compatible server in place of loading a checkpoint"
    )
    parser.add_argument("--tasks", default=",".join(PUBLISHED), help="tasks of lmms-eval, joined by commas")
    parser.add_argument(
        "--limit", type=options.positive, metavar="N", help="first N samples of each task: for trying out"
    )
    parser.add_argument(
        "--batch-size",
        type=options.positive,
        default=8,
        metavar="N",
        help="with --server requests at once (default: 8)",
    )
    parser.add_argument(
        "--output", type=Path, default=DEFAULT_OUTPUT, metavar="DIR", help=f"results (default: {DEFAULT_OUTPUT})"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the command only")
    options.add_decoding_flags(parser)
    parser.add_argument("extra", nargs=argparse.REMAINDER, metavar="-- ...", help="further arguments of lmms-eval")
    return parser


def run(args: argparse.Namespace) -> int:
    """Check what can be checked here, print the command, run it, and see that it has left results."""
    from nemo_bard.evaluation.harness.command import (
        Plan,
        build_command,
        check_installed,
        check_results,
        find_results,
    )

    if args.extra and args.extra[0] != "--":
        raise ValueError(f"unknown argument {args.extra[0]!r}; arguments of lmms-eval go behind --")
    decoding = options.given_settings(args)
    check_target(args, decoding)
    plan = Plan(
        model=args.model,
        tasks=[task for task in (word.strip() for word in args.tasks.split(",")) if task],
        output=args.output,
        server=args.server,
        batch_size=args.batch_size,
        limit=args.limit,
        device=args.device,
        dtype=args.dtype,
        decoding=decoding,
        extra=args.extra[1:],
    )
    if not plan.tasks:
        raise ValueError("--tasks names no task")
    command = build_command(plan)
    sys.stdout.write(f"{shlex.join(command)}\n")
    if args.dry_run:
        return 0
    check_installed()
    before = find_results(args.output)
    sys.stdout.flush()
    done = subprocess.run(command, check=False)
    sys.stdout.write(f"wrote {check_results(args.output, before, done.returncode)}\n")
    return 0


def check_target(args: argparse.Namespace, decoding: dict) -> None:
    """Raise ValueError for a folder that holds no BARD checkpoint, or options that the other way of evaluating takes."""
    if args.server is not None:
        for name, given in (("device", args.device is not None), ("dtype", args.dtype != "auto")):
            if given:
                raise ValueError(f"--{name} is the server's own; leave it out with --server")
        if not args.server.startswith(("http://", "https://")):
            raise ValueError(f"--server must be an address such as http://localhost:8000, got {args.server!r}")
        return
    if args.model is None:
        raise ValueError("--model DIR or --server URL must be given")
    check_checkpoint(args.model, args.dtype, block_diffusion=True)
    options.read_generation_config(Path(args.model), decoding, device=args.device)
