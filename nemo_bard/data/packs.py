"""Which samples share a row."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

_CHUNK = 2**15
"""Rows that are summed at once."""


@dataclass(frozen=True, kw_only=True)
class Packs:
    """Which samples share a row."""

    edges: np.ndarray
    """``[rows + 1]`` int64: row ``i`` holds ``members[edges[i] : edges[i + 1]]``, at least one."""
    members: np.ndarray
    """Sample indices, ``[samples]`` int32 or int64; each sample once."""

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __getitem__(self, index: int) -> list[int]:
        return self.members[self.edges[index] : self.edges[index + 1]].tolist()

    def sums(self, values: np.ndarray) -> np.ndarray:
        """Sum of a value per sample over each row, ``[rows]``."""
        parts = []
        for start in range(0, len(self), _CHUNK):
            edges = self.edges[start : start + _CHUNK + 1]
            parts.append(np.add.reduceat(values[self.members[edges[0] : edges[-1]]], edges[:-1] - edges[0]))
        return np.concatenate(parts)


def none_fits(lengths: np.ndarray, max_length: int) -> ValueError:
    """The error where no sample fits into a row."""
    return ValueError(
        f"none of the {len(lengths)} samples fits into max_length or a row of {max_length} tokens; the shortest takes"
        f" {lengths.min()}"
    )
