"""The sources of a data set that is looked at, whatever it is: a prepared folder, raw files, or anything that a reader opens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.data.prepare.folder import STATE
from nemo_bard.data.prepared.layout import SourceEntry, is_prepared, load_manifest
from nemo_bard.data.prepared.source import PreparedSource
from nemo_bard.data.readers import open_dataset


@dataclass(frozen=True, kw_only=True)
class Source:
    """A source to look at."""

    name: str
    data: Any
    """Sized and map-style; its items have ``conversation`` and ``sample_index``, perhaps ``meta``."""
    entry: SourceEntry | None = None
    """What the manifest says of it; None outside of prepared folders."""
    folder: Path | None = None
    """Where its lengths are kept; None outside of prepared folders."""

    @property
    def rows(self) -> int:
        """Samples of a prepared source; rows of any other, of which some may turn out to be unusable."""
        return len(self.data)

    def peek(self, index: int) -> dict[str, Any]:
        """An item whose images need to know their size only."""
        return getattr(self.data, "peek", self.data.__getitem__)(index)

    def describe(self, index: int) -> dict[str, Any]:
        """Where a row is (``source``) and its ``id``, as far as the data set can tell."""
        own = self.data.describe(index) if hasattr(self.data, "describe") else {}
        return {"source": f"{self.name}:{index}", "id": None, **own}


class PreparedSamples:
    """A source of a prepared folder as a map-style data set.

    Args:
        source: What is read.
    """

    def __init__(self, source: PreparedSource) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return a sample; raises ValueError if it cannot be read."""
        return {**self.source.read(index), "sample_index": index}

    def peek(self, index: int) -> dict[str, Any]:
        """The same, with images that know their size only."""
        return {**self.source.peek(index), "sample_index": index}

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample is, and its id."""
        return self.source.describe(index)

    def fingerprint(self) -> str:
        """A text that changes with the samples."""
        return self.source.fingerprint()


def refuse_parts(folder: Path) -> None:
    """Raise ValueError for a part of what ``nemo-bard data prepare`` makes: a folder not finished, or one of its sources."""
    if (folder / STATE).is_dir() and not is_prepared(folder):
        raise ValueError(
            f"{folder} is not whole: `nemo-bard data prepare` has not finished it; run the same command again"
        )
    if folder.is_dir() and is_prepared(folder.resolve().parent):
        raise ValueError(f"{folder} is a source of a prepared folder, which is to be given as a whole: {folder.parent}")


def open_sources(data: str | Mapping[str, Any]) -> list[Source]:
    """Open what is to be looked at; nothing is read through.

    Args:
        data: A prepared folder, or anything that ``readers.open_dataset`` takes.

    Returns:
        At least one source, each with at least one row.

    Raises:
        ValueError: If there is nothing, or it is empty.
    """
    if isinstance(data, str):
        refuse_parts(Path(data))
    if isinstance(data, str) and is_prepared(folder := Path(data)):
        manifest = load_manifest(folder)
        sources = [
            Source(
                name=entry.name,
                data=PreparedSamples(PreparedSource(folder, entry)),
                entry=entry,
                folder=folder / entry.name,
            )
            for entry in manifest.sources
        ]
    else:
        path = str(data if isinstance(data, str) else data.get("path", "data"))
        sources = [Source(name=Path(path).stem or path, data=open_dataset(data, validate=False))]
    if not sum(source.rows for source in sources):
        raise ValueError(f"{data}: there is no sample")
    return sources
