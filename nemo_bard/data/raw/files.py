"""Which files a path means: a file, a folder with its files of one kind, a pattern; and the split of each."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from nemo_bard.base.errors import not_one_of
from nemo_bard.base.files import read_json
from nemo_bard.data.prepared.layout import is_prepared
from nemo_bard.data.raw.pictures import METADATA
from nemo_bard.data.raw.unit import printable

FORMATS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".tar": "tar",
    ".csv": "csv",
    ".tsv": "csv",
}
"""End of a file -> how it is read."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")
ALL = "all"
"""The split that is every file."""
KEYWORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""What names of files and folders call a split, as on the Hugging Face hub."""
_IGNORED = re.compile(
    r"README.*|LICENSE.*|cache-.*\.arrow|(dataset_infos?|dataset_dict|state|config|dummy_data)\.(json|zip)",
    re.IGNORECASE,
)
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}")
_NO_SPLITS = ("data", "part", "shard")
_STATE = "state.json"


@dataclass
class Found:
    """Files that a path means."""

    root: Path
    files: list[str] = field(default_factory=list)
    """Tables, archives and lists, in order."""
    images: list[str] = field(default_factory=list)
    """Images, relative to the root, if these are the data."""
    metadata: list[str] = field(default_factory=list)
    """Tables that describe the images."""


def find_files(path: str | os.PathLike[str], split: str | None = None) -> Found:
    """The files of a path.

    Args:
        path: A file, a folder or a pattern.
        split: Those of a folder that belong to it; ``all`` for every file.

    Returns:
        The files, in an order that depends on their names alone.

    Raises:
        ValueError: If there are none, those of several kinds or splits, or of a prepared folder.
    """
    root = Path(path)
    if root.is_dir():
        _refuse_prepared(root)
        return _choose(root, _walk(root), split)
    if root.is_file():
        if split not in (None, ALL):
            raise ValueError(f"split {split!r}: {printable(root)} is a file, splits are chosen among those of a folder")
        if _kind(root.name) is None:
            raise ValueError(f"{printable(root)}: the name of a data file must end in {', '.join(FORMATS)}")
        return Found(root=root.parent, files=[str(root)])
    if not glob.has_magic(str(path)):
        raise ValueError(f"{printable(root)} does not exist")
    matches = [Path(match) for match in sorted(glob.glob(str(path), recursive=True))]
    root = Path(os.path.commonpath([match.parent for match in matches])) if matches else root.parent
    names: list[str] = []
    for match in matches:
        names += [os.path.join(match, name) for name in _walk(match)] if match.is_dir() else [str(match)]
    relative = [os.path.relpath(name, root) for name in dict.fromkeys(names)]
    if not relative:
        raise ValueError(f"no file is like {printable(path)}")
    return _choose(root, relative, split)


def _refuse_prepared(root: Path) -> None:
    if is_prepared(root):
        raise ValueError(f"{printable(root)} is already prepared: it is a data set as it is, not a source to prepare")


def _kind(name: str) -> str | None:
    return FORMATS.get(os.path.splitext(name)[1].lower())


def _walk(root: Path) -> Iterator[str]:
    """Names of the files of a folder, relative to it and sorted; linked folders are entered, each folder once."""
    seen: set[tuple[int, int]] = set()
    names: list[str] = []
    for folder, folders, files in os.walk(root, followlinks=True, onerror=_refuse):
        state = os.stat(folder)
        if (state.st_dev, state.st_ino) in seen:
            folders.clear()
            continue
        seen.add((state.st_dev, state.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        kept = _saved(Path(folder)) if _STATE in files else files
        shown = (name for name in kept if not name.startswith(".") and not _IGNORED.fullmatch(name))
        names += (os.path.relpath(os.path.join(folder, name), root) for name in shown)
    yield from sorted(names, key=lambda name: PurePath(name).parts)


def _refuse(error: OSError) -> None:
    raise error


def _saved(folder: Path) -> list[str]:
    """Files of a folder that ``datasets`` saved, in its order; others in it are caches."""
    state = read_json(folder / _STATE) or {}
    listed = state.get("_data_files")
    if not isinstance(listed, list):
        return sorted(os.listdir(folder))
    names = [str(entry["filename"]) for entry in listed]
    missing = next((name for name in names if not (folder / name).is_file()), None)
    if missing is not None:
        raise ValueError(f"{printable(folder / missing)} is missing, {_STATE} names it")
    return names


def split_of(name: str) -> str | None:
    """The split that a file's name, relative to the root, tells; None if it tells none."""
    path = PurePath(name)
    shard = _SHARD.fullmatch(path.stem)
    for part in (*([shard[1]] if shard else []), *path.parts[:-1], path.stem):
        for split in KEYWORDS:
            if _tells(part, split):
                return split
    return shard[1] if shard and shard[1] not in _NO_SPLITS else None


def _tells(text: str, split: str) -> bool:
    words = re.split(r"[-._ 0-9]+", text)
    return text == split or any(word in words for word in KEYWORDS.get(split, (split,)))


def _choose(root: Path, names: Iterable[str], split: str | None) -> Found:
    """Sort files by kind: tables, or images with what describes them; and take those of a split."""
    names = list(names)
    images = [name for name in names if name.lower().endswith(IMAGES)]
    tables = [name for name in names if _kind(name) is not None]
    metadata = [name for name in tables if os.path.basename(name) in METADATA]
    if images and len(metadata) == len(tables):
        chosen = _of_split(root, images, split)
        return Found(root=root, images=chosen, metadata=_metadata(root, metadata, len(chosen) < len(images), split))
    if not tables:
        ends = Counter(os.path.splitext(name)[1].lower() or "no ending" for name in names)
        raise ValueError(
            f"{printable(root)} holds no data: found {_counted(ends)}; wanted {', '.join(FORMATS)} or images"
        )
    tables = _of_split(root, tables, split)
    ends = Counter(os.path.splitext(name)[1].lower() for name in tables)
    if len({FORMATS[end] for end in ends}) > 1:
        example = os.path.join(printable(root), f"*{min(ends)}")
        raise ValueError(
            f"{printable(root)} holds files of several kinds ({_counted(ends)}): name one, or a pattern such as {example}"
        )
    return Found(root=root, files=[os.path.join(root, name) for name in tables])


def _counted(ends: Counter[str]) -> str:
    return ", ".join(f"{count} {end}" for end, count in sorted(ends.items())) or "no file"


def _of_split(root: Path, names: list[str], split: str | None) -> list[str]:
    """Those of the data files that belong to a split."""
    splits = sorted({found for name in names if (found := split_of(name)) is not None})
    if split == ALL or (split is None and len(splits) < 2):
        return names
    if split is None:
        raise ValueError(f"{printable(root)} holds the splits {', '.join(splits)}: set split to one, or to {ALL}")
    chosen = [name for name in names if split_of(name) == split]
    if not chosen:  # a folder of that name, or a split that only the user knows
        parts = {name: (*PurePath(name).parts[:-1], PurePath(name).stem) for name in names}
        chosen = [name for name in names if any(_tells(part, split) for part in parts[name])]
    if not chosen:
        raise ValueError(f"{printable(root)}: {not_one_of('split', split, [*splits, ALL])}")
    return chosen


def _metadata(root: Path, names: list[str], is_part: bool, split: str | None) -> list[str]:
    """Tables that describe the images, or those of a split of them."""
    if is_part:
        shared = next((name for name in names if split_of(name) is None), None)
        if shared is not None:
            raise ValueError(
                f"{printable(root / shared)} describes images of all splits: put a table into the folder of each, or set"
                f" split to {ALL}"
            )
        names = [name for name in names if split_of(name) == split]
    return [os.path.join(root, name) for name in names]
