"""``automodel finetune`` / ``nemo-bard finetune``: run the recipe that a YAML file names.

A recipe class is built with the configuration, then ``setup()`` and ``run_train_validation_loop()`` run, as NeMo
AutoModel's own launcher does. Two hooks of the class are honoured:

- ``validate_config(raw)``: called with the final configuration as plain dictionaries, before anything heavy and before
  worker processes start; raises ValueError.
- ``parses_overrides = True``: the class reads and checks the command line itself; it is built by
  ``from_overrides(config_path, overrides)``, with the words as typed (for example Hydra's ``group=value``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.commands import EXIT_USER_ERROR, USER_ERRORS
from nemo_bard.paths import find_recipe

if TYPE_CHECKING:
    from nemo_automodel.components.config.loader import ConfigNode

ACCEPTS_OVERRIDES = True
_BARE_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``finetune``."""
    parser = subparsers.add_parser(
        "finetune",
        help="train from a recipe YAML (also: automodel finetune)",
        description="Train from a recipe YAML. Any key of it can be overridden: a.b=c, --a.b=c or --a.b c.",
        allow_abbrev=False,
        usage="automodel finetune --config FILE_OR_NAME [--nproc-per-node N] [a.b=c ...]",
    )
    parser.add_argument("-c", "--config", required=True, help="YAML file, or the name of a shipped recipe such as pbm")
    parser.add_argument(
        "--nproc-per-node",
        "--nproc_per_node",
        type=int,
        help="processes on this machine (default: one per GPU, 1 without GPUs; under torchrun: as started)",
    )
    return parser


def parse_overrides(words: list[str]) -> list[tuple[str, str]]:
    """Read ``a.b=c``, ``--a.b=c``, ``--a.b c`` and ``--flag`` (True) into pairs of dotted key and text.

    Raises:
        ValueError: If a word is none of these, or if ``--key`` is followed by ``key=value``, which could be either its
            value or the next override.
    """
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[\w.]+", key) or (not equals and not word.startswith("--")):
            raise ValueError(f"unexpected argument {word!r}; overrides are written a.b=c, --a.b=c or --a.b c")
        if not equals:
            value = "True"
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
                if _BARE_OVERRIDE.match(value):
                    raise ValueError(f"ambiguous: '{word} {value}'; write {word}=VALUE (a flag: {word}=true)")
        pairs.append((key, value))
    return pairs


def load_raw_config(config_path: Path, overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the final configuration as plain dictionaries; ``_target_`` and ``*_fn`` stay dotted names.

    Args:
        config_path: The YAML file.
        overrides: Pairs of dotted key and text, applied in order.

    Raises:
        ValueError: If the file is not a YAML mapping, an override leads through a value that is no mapping, or an
            environment variable is missing.
    """
    import yaml

    try:
        raw = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_path}: not a YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{config_path}: must hold a YAML mapping, got {type(raw).__name__}")
    for dotted, text in overrides:
        *parents, leaf = dotted.split(".")
        node = raw
        for depth, name in enumerate(parents, 1):
            node[name] = {} if node.get(name) is None else node[name]
            if not isinstance(node[name], dict):
                prefix = ".".join(parents[:depth])
                raise ValueError(
                    f"override {dotted}={text}: {prefix} is {node[name]!r} in {config_path}, not a section"
                )
            node = node[name]
        node[leaf] = text
    return _translate("", raw)


def _translate(key: str, value: Any) -> Any:  # noqa: ANN401
    """Read text the way NeMo AutoModel's ``ConfigNode`` does: environment variables, then Python literals."""
    from nemo_automodel.components.config.loader import resolve_yaml_env_vars, translate_value

    if isinstance(value, dict):
        return {name: _translate(name, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_translate("", item) for item in value]
    if not isinstance(value, str) or key == "_target_" or key.endswith("_fn"):
        return value
    try:
        return translate_value(resolve_yaml_env_vars(value))
    except KeyError as error:
        raise ValueError(f"{key}: {error.args[0]}") from error


def load_config(config_path: Path, overrides: list[tuple[str, str]]) -> ConfigNode:
    """Return what NeMo AutoModel hands to a recipe; ValueError if a name in it cannot be imported."""
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    try:
        return parse_args_and_load_config(str(config_path), [f"--{key}={text}" for key, text in overrides])
    except ImportError as error:
        raise ValueError(f"{config_path}: {error}") from error


def load_recipe_class(config_path: Path, raw: dict[str, Any]) -> type:
    """Import the class that ``recipe:`` names: a dotted path, or the bare name of one of NeMo AutoModel's recipes.

    Raises:
        ValueError: If the key is missing or the class cannot be imported.
    """
    section = raw.get("recipe")
    name = section.get("_target_") if isinstance(section, dict) else section
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{config_path}: recipe: must name a recipe class, for example nemo_bard.train.pbm.PBMRecipe")
    if "." not in name:
        from nemo_automodel.cli.utils import resolve_recipe_name

        name = resolve_recipe_name(name)
    module, _, attribute = name.strip().rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{config_path}: recipe: cannot import {name}: {error}") from error


def run(args: argparse.Namespace) -> int:
    """Run the recipe here, or start torchrun with one worker per process and pass its exit code on."""
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
    if under_torchrun():
        started = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
        if args.nproc_per_node not in (None, started):
            raise ValueError(
                f"--nproc-per-node {args.nproc_per_node}: torchrun started {started} processes here; drop it"
            )
        return run_in_process(recipe_class, config_path, args.overrides, pairs)
    processes = count_processes(args.nproc_per_node)
    if processes == 1:
        return run_in_process(recipe_class, config_path, args.overrides, pairs)
    return run_torchrun(processes, config_path, args.overrides)


def under_torchrun() -> bool:
    """Whether a launcher has started this process as one of several (it sets ``RANK`` and ``WORLD_SIZE``)."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def count_processes(requested: int | None) -> int:
    """Return how many processes to start here: ``requested``, else one per GPU, else 1.

    Raises:
        ValueError: If ``requested`` is below 1 or above the number of GPUs, where there are any.
    """
    import torch

    gpus = torch.cuda.device_count()
    if requested is None:
        return max(gpus, 1)
    if requested < 1 or (gpus and requested > gpus):
        allowed = f"1 to {gpus} (the GPUs of this machine)" if gpus else "at least 1"
        raise ValueError(f"--nproc-per-node must be {allowed}, got {requested}")
    return requested


def run_torchrun(processes: int, config_path: Path, overrides: list[str]) -> int:
    """Start ``processes`` workers of this command on a free port; a worker has told what went wrong."""
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    command = ["--standalone", f"--nproc-per-node={processes}", "-m", "nemo_bard.cli"]
    command += ["finetune", "--config", str(config_path), *overrides]
    try:
        torchrun(get_args_parser().parse_args(command))
    except ChildFailedError as error:
        _, failure = error.get_first_failure()
        if failure.exitcode == EXIT_USER_ERROR:
            return EXIT_USER_ERROR
        sys.stderr.write(f"error: worker {failure.local_rank} of {processes} ended with exit code {failure.exitcode}\n")
        return 1
    except SignalException as error:
        sys.stderr.write(f"error: stopped by {error.sigval.name}\n")
        return 128 + error.sigval
    return 0


def run_in_process(recipe_class: type, config_path: Path, overrides: list[str], pairs: list[tuple[str, str]]) -> int:
    """Build the recipe, set it up and run it; returns the exit code."""
    import torch

    with report_unexpected_only():
        if getattr(recipe_class, "parses_overrides", False):
            recipe = recipe_class.from_overrides(config_path, overrides)
        else:
            from nemo_bard.train import cpu_compat

            cpu_compat.apply()  # without CUDA, NeMo AutoModel's own recipes run too
            recipe = recipe_class(load_config(config_path, pairs))
        recipe.setup()
    result = recipe.run_train_validation_loop()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return result if isinstance(result, int) else 0


@contextlib.contextmanager
def report_unexpected_only() -> Iterator[None]:
    """Hold back what ``ConfigNode.instantiate`` (0.7.0) prints about a failed target unless the error is ours to show.

    It prints signature, arguments and traceback for every exception before raising it again; wrong input has to end as
    one line instead, so the text is written only for errors that are not the user's.
    """
    from nemo_automodel.components.config import loader

    held: list[str] = []

    def hold(*values: object, **_: object) -> None:
        held.append(" ".join(map(str, values)))

    loader.print = hold
    try:
        yield
    except Exception as error:
        if not isinstance(error, USER_ERRORS):
            sys.stderr.write("\n".join(held) + "\n")
        raise
    finally:
        del loader.print
