"""``automodel finetune`` / ``nemo-bard finetune``: run the recipe that a YAML file names.

A recipe class is built with the configuration, then ``setup()`` and ``run_train_validation_loop()`` run, as NeMo
AutoModel's own launcher does. Hooks of the class are honoured:

- ``validate_config(raw)``: called with the final configuration as plain dictionaries, before anything heavy and before
  worker processes start; raises ValueError.
- ``parses_overrides = True``: the class reads and checks the command line itself; it is built by
  ``from_overrides(config_path, overrides)``, with the words as typed (for example Hydra's ``group=value``). Such a class
  may also have ``launch(config_path, overrides, processes)``, which starts the workers itself and returns the exit
  code, or None to go on in this process; it is not called in a worker.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import USER_ERRORS
from nemo_bard.base.paths import find_recipe
from nemo_bard.launch.exits import under_torchrun
from nemo_bard.launch.torchrun import count_processes, run_torchrun
from nemo_bard.train.recipe_file import (
    load_config,
    load_raw_config,
    load_recipe_class,
    parse_overrides,
    read_yaml,
    report_unexpected_only,
)
from nemo_bard.upstream.console import hush

ACCEPTS_OVERRIDES = True


def take_over(config: Any, config_path: Path, processes: int | None, words: Sequence[str]) -> int | None:
    """Run a recipe of ours that NeMo AutoModel's own command line was asked to run.

    Args:
        config: What AutoModel has read of it.
        config_path: The file.
        processes: ``--nproc-per-node``, if that was given.
        words: What else followed the file.

    Returns:
        The exit code; None for a recipe of anybody else, which AutoModel has to run, and which names nothing of ours
        that would do something else there.

    Raises:
        ValueError: For wrong input.
    """
    recipe_class = load_recipe_class(config_path, read_yaml(config_path))
    if not is_own(recipe_class):
        from nemo_bard.train.beside import check_beside

        check_beside(config.to_yaml_dict(use_orig_values=True), recipe_class)
        return None
    return run(argparse.Namespace(config=str(config_path), nproc_per_node=processes, overrides=list(words)))


def is_own(recipe_class: type) -> bool:
    """Whether a recipe has the hooks of this command."""
    return any(hasattr(recipe_class, name) for name in ("validate_config", "parses_overrides"))


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``finetune``."""
    parser = subparsers.add_parser(
        "finetune",
        help="train from a recipe YAML (also: automodel finetune)",
        description="Train from a recipe YAML. Any key of it can be overridden: a.b=c, --a.b=c or --a.b c.",
        allow_abbrev=False,
        usage="automodel finetune --config FILE_OR_NAME [--nproc-per-node N] [a.b=c ...]",
    )
    add_flags(parser)
    return parser


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add what names a recipe and says how many processes run it."""
    parser.add_argument("-c", "--config", required=True, help="YAML file, or the name of a shipped recipe such as pbm")
    parser.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=int,
        help="processes on this machine (default: one per GPU, 1 without GPUs; under torchrun: as started)",
    )


def run(args: argparse.Namespace) -> int:
    """Run the recipe here, or start torchrun with one worker per process and pass its exit code on."""
    hush()
    config_path = find_recipe(args.config)
    recipe_class = load_recipe_class(config_path, load_raw_config(config_path, []))
    pairs: list[tuple[str, str]] = []
    if not getattr(recipe_class, "parses_overrides", False):
        pairs = parse_overrides(args.overrides)
        if any(key.split(".")[0] == "recipe" for key, _ in pairs):
            raise ValueError("recipe: cannot be overridden on the command line; it belongs to the YAML file")
        raw = load_raw_config(config_path, pairs)
        if hasattr(recipe_class, "validate_config"):
            recipe_class.validate_config(raw)
        else:
            from nemo_bard.train.beside import check_beside

            check_beside(raw, recipe_class)
    if under_torchrun():
        started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if args.nproc_per_node not in (None, started):
            raise ValueError(
                f"--nproc-per-node {args.nproc_per_node}: torchrun started {started} processes here; drop it"
            )
        return run_in_process(recipe_class, config_path, args.overrides, pairs)
    if hasattr(recipe_class, "launch"):
        code = recipe_class.launch(config_path, args.overrides, args.nproc_per_node)
        if code is not None:
            return code
        return run_in_process(recipe_class, config_path, args.overrides, pairs)
    processes = count_processes(args.nproc_per_node)
    if processes == 1:
        return run_in_process(recipe_class, config_path, args.overrides, pairs)
    return run_torchrun(processes, config_path, args.overrides)


def run_in_process(recipe_class: type, config_path: Path, overrides: list[str], pairs: list[tuple[str, str]]) -> int:
    """Build the recipe, set it up and run it; returns the exit code."""
    import torch

    with report_unexpected_only(USER_ERRORS):
        if getattr(recipe_class, "parses_overrides", False):
            recipe = recipe_class.from_overrides(config_path, overrides)
        else:
            from nemo_bard.upstream import cpu

            cpu.apply()  # without CUDA, NeMo AutoModel's own recipes run too
            recipe = recipe_class(load_config(config_path, pairs))
        recipe.setup()
    result = recipe.run_train_validation_loop()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result if isinstance(result, int) else 0
