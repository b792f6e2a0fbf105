"""What can be said of a checkpoint folder without loading it, or anything heavy."""

from __future__ import annotations

import json
from pathlib import Path

DTYPES = ("auto", "float32", "bfloat16", "float16")


def read_model_type(path: str | Path) -> str:
    """Return ``model_type`` of a checkpoint folder.

    Raises:
        ValueError: If it is no folder, has no readable ``config.json``, or holds another architecture.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist")
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"model folder {folder} has no config.json; a BARD or Qwen3-VL checkpoint folder is needed")
    try:
        model_type = json.loads(file.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a model configuration ({error})") from error
    if model_type not in ("bard_vl", "qwen3_vl"):
        raise ValueError(f"{file}: model_type is {model_type!r}, allowed are bard_vl, qwen3_vl")
    return model_type


def check_checkpoint(path: str | Path, dtype: str = "auto", *, block_diffusion: bool = False) -> str:
    """Check what a command is to load.

    Args:
        path: Checkpoint folder.
        dtype: One of ``DTYPES``.
        block_diffusion: Refuse an autoregressive checkpoint.

    Returns:
        Its ``model_type``.

    Raises:
        ValueError: As ``read_model_type``, or for a wrong dtype or kind.
    """
    model_type = read_model_type(path)
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    if block_diffusion and model_type != "bard_vl":
        raise ValueError(f"{path} is an autoregressive Qwen3-VL folder; make a BARD one with `nemo-bard convert`")
    return model_type
