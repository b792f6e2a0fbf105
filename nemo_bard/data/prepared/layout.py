"""What a prepared folder holds, and the manifest that says so.

- ``manifest.json``: what is there; written last, so that a folder with it is whole;
- ``rejects.jsonl``: rows that were left out: source, file, row, id, kind, reason;
- ``SOURCE/part-00000.arrow``, ...: samples, in the columns of ``COLUMNS``;
- ``SOURCE/kept.npy``: rows of the parts, counted through, that are samples; all of them if there is no such file;
- ``SOURCE/lengths-*.npz``: lengths in tokens, for a processor (``data.lengths``).
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nemo_bard.base.files import read_json, write_json

FORMAT = 1
MANIFEST = "manifest.json"
REJECTS = "rejects.jsonl"
KEPT = "kept.npy"
COLUMNS = ("id", "source", "messages", "images", "size", "videos")
"""``messages`` is JSON, ``images`` holds image files as they are, ``size`` width and height of each, ``videos`` paths."""


def features() -> Any:
    """The columns as ``datasets`` describes them."""
    from datasets import Features, Image, List, Value

    return Features(
        {
            "id": Value("string"),
            "source": Value("string"),
            "messages": Value("string"),
            "images": List(Image(decode=False)),
            "size": List(List(Value("int32"))),
            "videos": List(Value("string")),
        }
    )


@dataclass(frozen=True, kw_only=True)
class File:
    """A file of a source."""

    name: str
    """Relative to the source's folder."""
    rows: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, rows: int) -> File:
        """Describe a file that is there, by reading it."""
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return cls(name=path.name, rows=rows, bytes=path.stat().st_size, sha256=digest)


@dataclass(frozen=True, kw_only=True)
class SourceEntry:
    """A source in the manifest."""

    name: str
    layout: str
    parts: list[File]
    kept: File | None = None
    """The file of kept rows, whose ``rows`` are samples; None if all rows of the parts are."""
    read: int
    """Rows that were read, filtered and rejected ones included."""
    filtered: dict[str, int] = field(default_factory=dict)
    """Rows left out as the options ask, by option."""
    rejected: dict[str, int] = field(default_factory=dict)
    """Rows left out because they cannot be trained on, by kind."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The source's section of the mixture file."""

    @cached_property
    def rows(self) -> int:
        """Samples."""
        return sum(part.rows for part in self.parts) if self.kept is None else self.kept.rows

    @cached_property
    def digest(self) -> str:
        """A text that changes with the samples, and with nothing else."""
        files = [*self.parts, *([] if self.kept is None else [self.kept])]
        return _digest([FORMAT, self.name, *(file.sha256 for file in files)])


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a prepared folder holds."""

    sources: list[SourceEntry]
    settings: dict[str, Any] = field(default_factory=dict)
    """The mixture file without its sources."""
    version: str = ""
    """Of the package that wrote it."""

    @cached_property
    def digest(self) -> str:
        """A text that changes with the samples of any source."""
        return _digest([source.digest for source in self.sources])

    def source(self, name: str) -> SourceEntry:
        """The source of a name.

        Raises:
            KeyError: If there is none.
        """
        for source in self.sources:
            if source.name == name:
                return source
        raise KeyError(name)

    @property
    def names(self) -> list[str]:
        """Names of the sources, in order."""
        return [source.name for source in self.sources]

    def write(self, folder: Path) -> None:
        """Write ``manifest.json``, at once or not at all."""
        body = {"format": FORMAT, **dataclasses.asdict(self)}
        write_json(folder / MANIFEST, {**body, "digest": _digest([json.dumps(body, sort_keys=True)])})


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()


def is_prepared(folder: Path) -> bool:
    """Whether a folder has a manifest."""
    return (folder / MANIFEST).is_file()


def load_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder, and see that its files are there in the sizes that it says.

    Raises:
        ValueError: If the folder is not a whole prepared one; says what is the matter.
    """
    manifest = read_manifest(folder)
    for source in manifest.sources:
        for file in [*source.parts, *([] if source.kept is None else [source.kept])]:
            _check_size(folder / source.name / file.name, file)
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of a prepared folder; its files are not looked for.

    Raises:
        ValueError: If there is none, or it is not as it was written.
    """
    if not folder.is_dir():
        raise ValueError(f"prepared folder {folder} does not exist")
    raw = read_json(folder / MANIFEST)
    if raw is None:
        raise ValueError(
            f"{folder} is not a prepared folder, it has no {MANIFEST}; see `nemo-bard data prepare --help`"
        )
    body = {key: value for key, value in raw.items() if key != "digest"}
    if raw.get("format") != FORMAT:
        raise ValueError(f"{folder / MANIFEST}: format must be {FORMAT}, got {raw.get('format')!r}; prepare it again")
    if raw.get("digest") != _digest([json.dumps(body, sort_keys=True)]):
        raise ValueError(f"{folder / MANIFEST} was changed after it was written; prepare the folder again")
    return Manifest(
        sources=[_entry(source) for source in body["sources"]], settings=body["settings"], version=body["version"]
    )


def _entry(raw: Mapping[str, Any]) -> SourceEntry:
    kept = raw["kept"]
    files = {"parts": [File(**part) for part in raw["parts"]], "kept": None if kept is None else File(**kept)}
    return SourceEntry(**{**raw, **files})


def _check_size(path: Path, file: File) -> None:
    try:
        size = path.stat().st_size
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; prepare the folder again") from error
    if size != file.bytes:
        raise ValueError(f"{path} has {size} bytes instead of {file.bytes}; prepare the folder again")
