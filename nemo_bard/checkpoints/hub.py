"""Checkpoints by their name on the Hugging Face Hub: ``org/name`` or ``org/name@revision``, from the cache or downloaded."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from nemo_bard.base.errors import one_line

PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.jinja", "LICENSE*")
"""Files of a repository that make a checkpoint."""
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")


def is_hub_name(text: str) -> bool:
    """Whether a text is a hub name; one whose first part is a folder here is a path whose end is wrong."""
    return _NAME.fullmatch(text) is not None and not Path(text.partition("/")[0]).exists()


def check_hub_name(key: str, name: str) -> None:
    """Refuse what is no folder and no hub name, and a name that has to be in the cache and is not.

    Args:
        key: What users know the value as.
        name: The value.

    Raises:
        ValueError: If it cannot be had.
    """
    from huggingface_hub import constants

    if not is_hub_name(name):
        raise ValueError(f"{key}={name} is neither a folder nor a Hugging Face name such as Qwen/Qwen3-VL-4B-Instruct")
    if constants.HF_HUB_OFFLINE:
        download(key, name)


def download(key: str, name: str, *, check: Callable[[Path], object] | None = None) -> Path:
    """Return the folder of a checkpoint on the Hub; what is not in the cache is downloaded, with progress.

    Args:
        key: What users know the value as.
        name: ``org/name`` or ``org/name@revision``.
        check: Called with the folder as soon as its ``config.json`` is there, before any weights are fetched.

    Returns:
        The folder in the cache.

    Raises:
        ValueError: If it is not in the cache and cannot be downloaded.
    """
    from huggingface_hub import constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise _not_there(key, name, error, offline=constants.HF_HUB_OFFLINE) from error
    if check is not None:
        check(folder)
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(PATTERNS)))
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise _not_there(key, name, error, offline=constants.HF_HUB_OFFLINE) from error


def find_checkpoint(key: str, name: str | Path, *, check: Callable[[Path], object] | None = None) -> Path:
    """Return a checkpoint's folder: the path itself if it is one, else that of the hub name.

    Args:
        key: What users know the value as.
        name: A path, or a hub name.
        check: As for ``download``; not called for a path.

    Raises:
        ValueError: If there is neither such a path nor such a name.
    """
    if Path(name).exists() or not is_hub_name(str(name)):
        return Path(name)
    return download(key, str(name), check=check)


def _not_there(key: str, name: str, error: Exception, *, offline: bool) -> ValueError:
    why = "HF_HUB_OFFLINE is set: unset it to download" if offline else one_line(error)
    return ValueError(f"{key}={name}: not in the Hugging Face cache and cannot be downloaded ({why})")
