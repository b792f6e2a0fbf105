"""Data sets of the Hugging Face hub: the files of one configuration, fetched into the hub's cache."""

from __future__ import annotations

import glob
import os
import re
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import not_one_of, one_line
from nemo_bard.data.raw.files import ALL, FORMATS, Found

_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Whether a text that is no path can be the name of a data set on the hub."""
    text = str(path)
    if not _NAME.fullmatch(text) or glob.has_magic(text) or os.path.lexists(text):
        return False
    if os.path.isdir(text.partition("/")[0]):  # a folder of that name is here: a path whose end is wrong
        return False
    return not text.startswith(".") and os.path.splitext(text)[1].lower() not in FORMATS


def fetch(name: str, split: str | None) -> Found:
    """Fetch the files of a configuration and split that are not in the cache.

    Args:
        name: ``owner/name`` or ``owner/name:config``.
        split: One of the configuration's; may be None if it has one only.

    Returns:
        The files, in the hub's order.

    Raises:
        ValueError: If there is no such data set, configuration or split, or no network.
    """
    import datasets
    from huggingface_hub import HfFileSystem, hf_hub_download

    repository, _, config = name.partition(":")
    try:
        builder = datasets.load_dataset_builder(repository, config or None)
        files = {str(key): list(urls) for key, urls in (builder.config.data_files or {}).items()}
        if split is None and len(files) > 1:
            raise ValueError(f"{name} holds the splits {', '.join(files)}: set split to one, or to {ALL}")
        if split not in (None, ALL) and split not in files:
            raise ValueError(f"{name}: {not_one_of('split', split, [*files, ALL])}")
        chosen = [url for key, urls in files.items() if split in (None, ALL, key) for url in urls]
        places: list[Any] = [HfFileSystem().resolve_path(url) for url in chosen]
        paths = [
            hf_hub_download(place.repo_id, place.path_in_repo, repo_type="dataset", revision=place.revision)
            for place in places
        ]
    except (OSError, ValueError, RuntimeError) as error:
        if os.path.exists(repository) or isinstance(error, ValueError) and str(error).startswith(name):
            raise
        offline = os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")
        hint = "HF_HUB_OFFLINE is set: unset it to fetch the data set" if offline else one_line(error)
        raise ValueError(
            f"there is no path {name}, and the hub's data set of that name cannot be read ({hint})"
        ) from error
    if not paths:
        raise ValueError(f"{name} has no data files")
    return Found(root=Path(os.path.commonpath([os.path.dirname(path) for path in paths])), files=paths)
