"""``MixtureDataset``: the sources of a prepared folder, blended in proportion, for a whole run."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.data.mixture.order import blend
from nemo_bard.data.mixture.shares import Shares, read_shares
from nemo_bard.data.prepared.layout import MANIFEST, Manifest, load_manifest
from nemo_bard.data.prepared.source import PreparedSource

_CHUNK = 2**18
"""Draws that are worked on at once."""


class MixtureDataset:
    """Samples of the sources of a prepared folder, in the order in which a run takes them.

    At every prefix of the order each source is less than one draw off its share (``mixture.order``). A source is read in a
    random order, each of its rows once, then in another random order, and so on; orders depend on ``seed``, the source's
    name and the repetition alone. With more ``samples`` the same order goes on.

    Args:
        path: Folder written by ``nemo-bard data prepare``.
        sources: Those to draw from, name -> ``{weight: number}`` (their share is in proportion to it; needs ``samples``) or
            ``{repetitions: number}`` (how often each row comes; 0.5 is half of the rows). None means all of them, with
            what the mixture file says, or once.
        samples: Draws of the run; all that the repetitions give if None.
        seed: Of the orders of rows.

    Raises:
        ValueError: If the folder is not a whole prepared one, or a setting is not as it must be.
    """

    ordered = True
    """The order of the samples is part of what this data set is; nothing may shuffle it."""

    def __init__(
        self,
        path: str | Path,
        sources: Mapping[str, Any] | None = None,
        samples: int | None = None,
        seed: int = 0,
    ) -> None:
        self.manifest, self.shares = self.check_settings(path, sources, samples, seed)
        self.path, self.seed = Path(path), seed
        self.sources = [PreparedSource(self.path, entry) for entry in self.shares.sources]
        ends = np.cumsum([entry.rows for entry in self.manifest.sources])
        self._num_rows = int(ends[-1])
        firsts = {entry.name: int(end) - entry.rows for entry, end in zip(self.manifest.sources, ends, strict=True)}
        self._firsts = np.array([firsts[entry.name] for entry in self.shares.sources], dtype=np.int64)
        self._draws = self._draw()

    @staticmethod
    def check_settings(
        path: str | Path, sources: Mapping[str, Any] | None = None, samples: int | None = None, seed: int = 0
    ) -> tuple[Manifest, Shares]:
        """Check all settings, without planning the draws.

        Returns:
            What the folder holds, and what is to be drawn.

        Raises:
            ValueError: As ``MixtureDataset``.
        """
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        manifest = load_manifest(Path(path))
        return manifest, read_shares(manifest, Path(path), sources, samples)

    @staticmethod
    def input_files(path: str, **_: Any) -> dict[str, Path]:
        """The file that tells what the folder holds: what resuming compares."""
        return {"path": Path(path) / MANIFEST}

    def __len__(self) -> int:
        return len(self._draws)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a sample: ``conversation`` with RGB images, ``sample_index`` and ``meta`` (``id``, ``source``, ``repetition``).

        ``sample_index`` is another one for every row and repetition, the same in every mixture of the folder.

        Raises:
            IndexError: If ``index`` is outside the data set.
            ValueError: If the sample cannot be read; names file and row.
        """
        source, row, repetition = self.place(index)
        return self._item(self.sources[source].read(row), index, repetition)

    def peek(self, index: int) -> dict[str, Any]:
        """The same with images that know their ``size`` only."""
        source, row, repetition = self.place(index)
        return self._item(self.sources[source].peek(row), index, repetition)

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample is: ``source`` (file and row) and its ``id``."""
        source, row, _ = self.place(index)
        return self.sources[source].describe(row)

    def place(self, index: int) -> tuple[int, int, int]:
        """Number of the source in ``sources`` that a draw takes, the row in it, and how often the row came before.

        Raises:
            IndexError: If ``index`` is outside the data set.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a mixture of {len(self)} samples")
        repetition, row = divmod(int(self._draws[index]), self._num_rows)
        source = int(self._source_of(row))
        return source, row - int(self._firsts[source]), repetition

    def fingerprint(self) -> str:
        """A text that changes with the samples or their order."""
        return f"mixture {hashlib.sha256(repr(sorted(self.identity().items())).encode()).hexdigest()} {len(self)}"

    def identity(self) -> dict[str, str]:
        """What the order of samples depends on, each as a text that changes with it, by what users call it.

        ``samples`` is not among it: with more of them, the same order goes on.
        """
        asked = self.shares.asked
        return {
            "sources": ", ".join(f"{name}: {key} {value:g}" for name in asked for key, value in asked[name].items()),
            "seed": str(self.seed),
            **{f"rows of {entry.name}": entry.digest[:16] for entry in self.shares.sources},
        }

    def measured_parts(self) -> list[PreparedSource]:
        """Data sets whose samples this one repeats, see ``of_samples``."""
        return self.sources

    def of_samples(self, values: np.ndarray) -> np.ndarray:
        """From a value of every sample of ``measured_parts``, one part after the other, to those of the samples here."""
        shift = np.cumsum([0, *(len(source) for source in self.sources)])[:-1] - self._firsts
        found = np.empty(len(self), dtype=values.dtype)
        for start in range(0, len(self), _CHUNK):
            rows = self._draws[start : start + _CHUNK] % self._num_rows
            found[start : start + _CHUNK] = values[rows + shift[self._source_of(rows)]]
        return found

    def draws_per_source(self) -> dict[str, int]:
        """How many of the samples are of each source."""
        counts = np.bincount(self._source_of(self._draws % self._num_rows), minlength=len(self.sources))
        return {source.entry.name: int(count) for source, count in zip(self.sources, counts, strict=True)}

    def _source_of(self, rows: Any) -> Any:
        """Number of the source that a row of the folder is of; ``sources`` are in the folder's order."""
        return np.searchsorted(self._firsts, rows, side="right") - 1

    def _item(self, item: dict[str, Any], index: int, repetition: int) -> dict[str, Any]:
        return {
            "conversation": item["conversation"],
            "sample_index": int(self._draws[index]),
            "meta": {**item["meta"], "repetition": repetition},
        }

    def _draw(self) -> np.ndarray:
        """``repetition * rows of the folder + row in the folder`` of every draw, ``[samples]`` int64."""
        source_of = blend(self.shares.weights, self.shares.samples)
        draws = np.empty(self.shares.samples, dtype=np.int64)
        for number, (source, first) in enumerate(zip(self.sources, self._firsts.tolist(), strict=True)):
            places = np.flatnonzero(source_of == number)
            for repetition, start in enumerate(range(0, len(places), len(source))):
                taken = places[start : start + len(source)]
                rows = permutation(len(source), self.seed, source.entry.name, repetition)[: len(taken)]
                rows += repetition * self._num_rows + first
                draws[taken] = rows
        return draws


def permutation(size: int, seed: int, name: str, repetition: int) -> np.ndarray:
    """The order in which the rows of a source come.

    Args:
        size: Rows.
        seed: The mixture's.
        name: The source's.
        repetition: How often all rows came before.

    Returns:
        Each row once, ``[size]`` int64. Rows are sorted by raw Philox numbers, whose stream no version of numpy changes.
    """
    digest = hashlib.sha256(f"{seed}\0{name}".encode()).digest()
    key = np.array([int.from_bytes(digest[:8], "little"), repetition], dtype=np.uint64)
    low = np.uint64((1 << size.bit_length()) - 1)
    numbered = np.random.Philox(key=key).random_raw(size)
    numbered &= ~low
    numbered |= np.arange(size, dtype=np.uint64)
    numbered.sort()
    numbered &= low
    return numbered.view(np.int64)
