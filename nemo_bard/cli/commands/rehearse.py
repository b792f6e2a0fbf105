"""``nemo-bard rehearse``: run a chain in small on the machines that are to run it, and tell what to expect of it.

The same as ``automodel finetune`` with ``launch.rehearse=true``.
"""

from __future__ import annotations

import argparse

from nemo_bard.base.paths import find_recipe
from nemo_bard.cli.commands import finetune
from nemo_bard.train.recipe_file import load_raw_config, load_recipe_class

ACCEPTS_OVERRIDES = True


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``rehearse``."""
    parser = subparsers.add_parser(
        "rehearse",
        help="try a chain on the real machines in a few minutes, and measure it",
        description="Run a whole chain with its real model, data, batches and processes, but two steps per training stage,"
        " each stopped and gone on with once, in a scratch folder beside run_dir that is removed at the end. Prints memory,"
        " time, data and file system as measured and what to change; writes RUN_DIR.rehearsal.json. Ends with 2 and one"
        " line where the real run would fail.",
        allow_abbrev=False,
        usage="nemo-bard rehearse --config FILE_OR_NAME [--nproc-per-node N] [GROUP=NAME ...] [KEY=VALUE ...]",
    )
    finetune.add_flags(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the chain's recipe with ``launch.rehearse=true``."""
    path = find_recipe(args.config)
    if not hasattr(load_recipe_class(path, load_raw_config(path, [])), "launch"):
        raise ValueError(
            f"--config: {path.name} is no chain of stages; a single recipe can be rehearsed as a stage of one"
        )
    args.overrides = [*args.overrides, "launch.rehearse=true"]
    return finetune.run(args)
