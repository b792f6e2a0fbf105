"""Options that several commands share: decoding settings as flags, and the checkpoint to load."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from nemo_bard.generation.settings import BardGenerationConfig


def token_ids(text: str) -> int | list[int]:
    """Read ``7`` or ``7,8``."""
    ids = [int(word) for word in text.split(",")]
    return ids[0] if len(ids) == 1 else ids


DECODING: dict[str, tuple[Any, str]] = {
    "max_new_tokens": (int, "most response tokens"),
    "block_size": (int, "tokens denoised together"),
    "denoising_steps": (int, "most denoising forwards per block"),
    "remasking_strategy": (str, "low_confidence_static, low_confidence_dynamic or entropy_bound"),
    "confidence_threshold": (float, "fix every token above this probability, in (0, 1]"),
    "entropy_bound": (float, "bound of the entropy_bound strategy, in nats"),
    "edit_threshold": (float, "replace a visible token above this probability, in (0, 1]"),
    "max_post_edit_steps": (int, "revision steps after the last mask of a block is gone"),
    "temperature": (float, "0 is argmax"),
    "top_k": (int, "draw from the K most likely tokens; 0 is all"),
    "top_p": (float, "draw from the most likely tokens of this total probability, in (0, 1]"),
    "suppress_mask_token": (bool, "never emit the mask id"),
    "mask_token_id": (int, "id of [MASK]"),
    "eos_token_id": (token_ids, "id that ends a response, or several joined by commas"),
    "pad_token_id": (int, "id after the end of a response"),
    "bos_token_id": (int, "not used by block diffusion"),
    "decode_path": (str, "fast, or plain: the slow path that serves as reference"),
    "cache_implementation": (str, "dynamic or static"),
    "compile_step": (bool, "compile the block forward; needs the static cache"),
}
"""Settings of ``BardGenerationConfig`` that are flags: name -> (type, help)."""
RETURN_SETTINGS = ("return_dict_in_generate", "return_step_stats", "output_history")
"""Settings that say what a call of ``generate`` returns; no flags."""


def add_decoding_flags(parser: argparse.ArgumentParser) -> None:
    """Add one ``--kebab-case`` flag per setting; what is not given stays as the model's generation_config.json says."""
    group = parser.add_argument_group("decoding", "what is not given is as in the model's generation_config.json")
    for name, (kind, text) in DECODING.items():
        flag = f"--{name.replace('_', '-')}"
        if kind is bool:
            group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            metavar = {int: "N", float: "X", str: "NAME"}.get(kind, "IDS")
            group.add_argument(flag, type=kind, metavar=metavar, help=text)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Add ``--model``, ``--device``, ``--dtype``, and report wrong words as every other error: in one line."""
    parser.error = _raise_error
    parser.add_argument("--model", required=True, metavar="DIR", type=Path, help="checkpoint folder")
    parser.add_argument("--device", help="cpu, cuda or cuda:N (default: CUDA where there is one)")
    parser.add_argument(
        "--dtype", default="auto", help="float32, bfloat16 or float16 (default: bfloat16 on CUDA, else float32)"
    )


def _raise_error(message: str) -> NoReturn:
    raise ValueError(message)


def given_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the decoding settings that are on the command line."""
    return {name: getattr(args, name) for name in DECODING if getattr(args, name) is not None}


def read_generation_config(
    folder: Path, overrides: dict[str, Any], *, device: str | None = None
) -> BardGenerationConfig:
    """Return the settings of a model folder with ``overrides``, and check the device, without loading the model.

    Raises:
        ValueError: For an unknown key, a value that is not allowed, or a device that is not there.
    """
    from nemo_bard.evaluation.responder import check_device
    from nemo_bard.generation.settings import BardGenerationConfig

    check_device(device)
    file = folder / "generation_config.json"
    base = BardGenerationConfig.from_pretrained(folder) if file.is_file() else BardGenerationConfig()
    return base.updated(**overrides)


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
