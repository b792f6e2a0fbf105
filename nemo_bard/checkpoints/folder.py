"""Checkpoint folders without loading them, or anything heavy: what they hold, and how a new one appears whole."""

from __future__ import annotations

import json
import logging
import shutil
import struct
from pathlib import Path
from typing import Any

from nemo_bard.base.folders import CONFIG, read_model_type, read_object
from nemo_bard.base.names import MODEL_TYPE

logger = logging.getLogger(__name__)

DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
COMPANIONS = (
    "tokenizer*",
    "vocab.json",
    "merges.txt",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "*processor_config.json",
    "LICENSE*",
)
"""Files that travel with a checkpoint unchanged; ``chat_template*`` may be a folder of templates."""


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
    if block_diffusion and model_type != MODEL_TYPE:
        raise ValueError(f"{path} is an autoregressive Qwen3-VL folder; make a BARD one with `nemo-bard convert`")
    return model_type


def check_target(source: Path, target: Path, *, overwrite: bool) -> None:
    """Raise FileExistsError if ``target`` may not be written, ValueError if it lies over ``source``."""
    resolved, origin = target.resolve(), source.resolve()
    if resolved == origin or resolved in origin.parents:
        raise ValueError(f"{target}: DST must not be SRC or a folder around it")
    if not target.exists() and not target.is_symlink():
        return
    if not overwrite:
        raise FileExistsError(f"{target}: exists; give --overwrite or another DST")
    if target.is_symlink() or not target.is_dir():
        raise FileExistsError(f"{target}: is no folder; --overwrite replaces only a BARD checkpoint or an empty folder")
    config = target / CONFIG
    is_bard = config.is_file() and read_object(config).get("model_type") == MODEL_TYPE
    if any(target.iterdir()) and not is_bard:
        raise FileExistsError(f"{target}: is no BARD checkpoint; --overwrite replaces only one or an empty folder")


def weight_files(source: Path) -> list[str]:
    """Return the names of the safetensors files, in order, each present and with a header that fits its size."""
    if (source / WEIGHTS_INDEX).is_file():
        weight_map = read_object(source / WEIGHTS_INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{source / WEIGHTS_INDEX}: weight_map: missing or empty")
        names = sorted(set(weight_map.values()))
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise ValueError(f"{source / WEIGHTS_INDEX}: weight_map: {name!r} is no file name")
    elif (source / WEIGHTS).is_file():
        names = [WEIGHTS]
    else:
        raise FileNotFoundError(f"{source}: has neither {WEIGHTS} nor {WEIGHTS_INDEX}; weights must be safetensors")
    for name in names:
        read_header(source / name)
    return names


def read_header(path: Path) -> dict[str, Any]:
    """Return the header of a safetensors file: tensor name -> ``dtype``, ``shape``, ``data_offsets``.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If it is damaged or cut short.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: missing weight file")
    with path.open("rb") as file:
        prefix = file.read(8)
        size = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        text = file.read(size) if 0 < size <= path.stat().st_size else b""
    try:
        header = json.loads(text)
        ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path}: not a safetensors file") from error
    expected = 8 + size + max(ends, default=0)
    if path.stat().st_size != expected:
        raise ValueError(f"{path}: has {path.stat().st_size} bytes, its header promises {expected}; copy it again")
    return header


def copy_companions(source: Path, folder: Path) -> set[str]:
    """Copy tokenizer, processor and template files; returns their names."""
    names: set[str] = set()
    for path in sorted({path for pattern in COMPANIONS for path in source.glob(pattern)}):
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            shutil.copyfile(path, folder / path.name)
        names.add(path.name)
    return names
