"""Options that several commands share: decoding settings as flags, and the checkpoint to load."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping
from dataclasses import Field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nemo_bard.base.errors import visible
from nemo_bard.base.settings import add_flags, given_flags
from nemo_bard.generation.parameters import STRATEGIES, setting_fields, strategy_fields

if TYPE_CHECKING:
    from nemo_bard.generation.settings import BardGenerationConfig

DEVICE_HELP = "cpu, cuda or cuda:N (default: CUDA where there is one)"
DTYPE_HELP = "float32, bfloat16 or float16 (default: bfloat16 on CUDA, else float32)"


def decoding_fields(strategy: str | None = None) -> dict[str, Field[Any]]:
    """Return the decoding settings that are flags; with the name of a strategy, a dotted one's parameters too."""
    return {name: field for name, field in setting_fields(strategy).items() if field.metadata["flag"]}


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Add one ``--kebab-case`` flag per setting; what is not given stays as the model's generation_config.json says."""
    group = parser.add_argument_group("decoding", "what is not given is as in the model's generation_config.json")
    add_parameter_flags(group, decoding_fields())
    follow_strategies(parser, "--remasking-strategy", lambda fields: add_parameter_flags(group, fields))


def add_parameter_flags(group: Any, fields: Mapping[str, Field[Any]]) -> None:
    """Add the flags of settings.

    Raises:
        ValueError: If a strategy of another package has a parameter with the name of another option.
    """
    try:
        add_flags(group, fields.values())
    except argparse.ArgumentError as error:
        raise ValueError(f"a parameter of a remasking strategy has the name of an option: {error}") from error


def follow_strategies(
    parser: argparse.ArgumentParser, option: str, add: Callable[[Mapping[str, Field[Any]]], None]
) -> None:
    """Let the parser know the parameters of strategies that the command line names by their dotted names.

    Args:
        parser: Gets them before it parses.
        option: What names strategies, one or several joined by commas.
        add: Called with the parameters that no registered strategy has.
    """
    parse = parser.parse_known_args

    def parse_known_args(args: Any = None, namespace: Any = None) -> Any:
        words = sys.argv[1:] if args is None else list(args)
        given = [word.partition("=")[2] for word in words if word.startswith(f"{option}=")]
        given += [after for word, after in zip(words, words[1:], strict=False) if word == option]
        known = dict(setting_fields())
        for name in ",".join(given).split(","):
            if "." in name and name not in STRATEGIES:
                new = {key: field for key, field in strategy_fields(name).items() if key not in known}
                add(new)
                known |= new
        return parse(args, namespace)

    parser.parse_known_args = parse_known_args


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--device``, ``--dtype``, and report wrong words as every other error: in one line."""
    parser.error = raise_error
    parser.add_argument("--model", required=True, metavar="DIR", type=Path, help="checkpoint folder")
    parser.add_argument("--device", help=DEVICE_HELP)
    parser.add_argument("--dtype", default="auto", help=DTYPE_HELP)


def raise_error(message: str) -> NoReturn:
    """What a parser calls for wrong words, in place of printing its usage: the command line shows one line."""
    raise ValueError(message)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the decoding settings that are on the command line."""
    return given_flags(args, decoding_fields(args.remasking_strategy).values())


def read_generation_config(
    folder: Path, overrides: dict[str, Any], *, device: str | None = None
) -> BardGenerationConfig:
    """Return the settings of a model folder with ``overrides``, and check the device, without loading the model.

    Where ``overrides`` name an adapter of the folder, its settings take the place of the folder's own.

    Raises:
        ValueError: For an unknown key, a value that is not allowed, or a device that is not there.
    """
    from nemo_bard.evaluation.responder import check_device
    from nemo_bard.generation.adapters import adapter_settings
    from nemo_bard.generation.settings import BardGenerationConfig

    check_device(device)
    if overrides.get("adapter") is not None:
        return adapter_settings(folder, overrides["adapter"]).updated(**overrides)
    file = folder / "generation_config.json"
    saved = BardGenerationConfig.from_pretrained(folder) if file.is_file() else None
    return BardGenerationConfig.from_generation_config(saved).updated(**overrides)


def write_out(text: str) -> None:
    """Write what may come from files of others: nothing in it is acted on, whatever the terminal can show."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(visible(text).encode(encoding, "backslashreplace").decode(encoding))


def positive(text: str) -> int:
    """Read an integer >= 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be >= 1, got {value}")
    return value


def writable_file(path: Path, *, overwrite: bool = False) -> Path:
    """Return ``path`` if it can be written.

    Raises:
        ValueError: If it is a folder, its folder does not exist, or it exists and ``overwrite`` is False.
    """
    if path.is_dir():
        raise ValueError(f"output {path} is a folder, a file is needed")
    if not path.parent.is_dir():
        raise ValueError(f"the folder of output {path} does not exist")
    if path.exists() and not overwrite:
        raise ValueError(f"output {path} exists; pass --overwrite to replace it")
    return path
