"""A prepared folder as a data set: its sources one after another, each sample once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.base.errors import not_one_of
from nemo_bard.data.prepared.layout import MANIFEST, load_manifest
from nemo_bard.data.prepared.source import PreparedSource


class PreparedDataset:
    """Samples of a prepared folder. They were checked when it was prepared; opening it compares digests and sizes.

    Args:
        path: The folder.
        source: Name of one of its sources; all of them, in the manifest's order, if None.

    Raises:
        ValueError: If the folder is not whole, has no such source, or holds no sample.
    """

    def __init__(self, path: str | Path, *, source: str | None = None) -> None:
        self.path = Path(path)
        manifest = load_manifest(self.path)
        if source is not None and source not in manifest.names:
            raise ValueError(f"{self.path}: {not_one_of('source', source, manifest.names)}")
        entries = manifest.sources if source is None else [manifest.source(source)]
        self.sources = [PreparedSource(self.path, entry) for entry in entries]
        self._edges = np.cumsum([0, *(len(one) for one in self.sources)])
        if len(self) == 0:
            raise ValueError(f"{self.path} holds no sample{'' if source is None else f' of the source {source}'}")

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample: ``conversation`` with RGB images, ``sample_index`` and ``meta`` (``id``, ``source``).

        Raises:
            IndexError: If ``index`` is outside.
            ValueError: If the sample cannot be read; names file and row.
        """
        source, row = self._place(index)
        return {**source.read(row), "sample_index": int(index)}

    def peek(self, index: int) -> dict[str, Any]:
        """The same, with images that know their ``size`` only."""
        source, row = self._place(index)
        return {**source.peek(row), "sample_index": int(index)}

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample is: ``source`` (file and row) and its ``id``."""
        source, row = self._place(index)
        return source.describe(row)

    def fingerprint(self) -> str:
        """A text that changes with the samples."""
        return " ".join(source.fingerprint() for source in self.sources)

    def identity(self) -> dict[str, str]:
        """What the samples and their order depend on: the sources, and the rows of each."""
        names = ", ".join(source.entry.name for source in self.sources)
        return {"sources": names, **{f"rows of {one.entry.name}": one.entry.digest[:16] for one in self.sources}}

    def measured_parts(self) -> list[PreparedSource]:
        """Its sources, whose lengths are kept beside them (``row_lengths.measured_rows``)."""
        return self.sources

    def of_samples(self, values: np.ndarray) -> np.ndarray:
        """Values of the samples of all sources, one source after the other: those of the samples here."""
        return values

    @staticmethod
    def input_files(path: str, **_: Any) -> dict[str, Path]:
        """The manifest, whose digest stands for all files."""
        return {"path": Path(path, MANIFEST)}

    def _place(self, index: int) -> tuple[PreparedSource, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        source = int(np.searchsorted(self._edges, index, side="right")) - 1
        return self.sources[source], index - int(self._edges[source])
