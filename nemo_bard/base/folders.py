"""What a checkpoint folder says that it is."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_bard.base.names import MODEL_TYPES

CONFIG = "config.json"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds anything else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not a JSON file: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(value).__name__}")
    return value


def check_model_type(config: Mapping[str, Any], file: Path, allowed: Sequence[str] = MODEL_TYPES) -> str:
    """Return ``model_type`` of a model configuration; ValueError, naming its ``file``, unless it is an allowed one."""
    found = config.get("model_type")
    if not isinstance(found, str) or found not in allowed:
        verb = "is" if len(allowed) == 1 else "are"
        raise ValueError(f"{file}: model_type is {found!r}, allowed {verb} {', '.join(allowed)}")
    return found


def read_model_type(path: str | os.PathLike[str], allowed: Sequence[str] = MODEL_TYPES) -> str:
    """Return ``model_type`` of a checkpoint folder.

    Raises:
        ValueError: If it is no folder, has no readable ``config.json``, or holds another architecture.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise ValueError(f"model folder {folder} does not exist")
    file = folder / CONFIG
    if not file.is_file():
        raise ValueError(f"model folder {folder} has no {CONFIG}; a Qwen3-VL or Bard-VL checkpoint folder is needed")
    return check_model_type(read_object(file), file, allowed)
