"""Which rows repeat earlier ones, for tens of millions of rows: 24 bytes a row, in sorted runs."""

from __future__ import annotations

import numpy as np

KEY_BYTES = 16
_ROW_BITS, _UNIT_BITS = 33, 20


def pack_place(source: int, unit: int, rows: np.ndarray) -> np.ndarray:
    """Where rows are, ``[n]`` int64, in one number each.

    Args:
        source: Number of their source.
        unit: Number of their unit in it.
        rows: Their numbers in the file, ``[n]`` int64.

    Raises:
        ValueError: If there are more sources, units or rows than fit.
    """
    if source >= 1 << 10 or unit >= 1 << _UNIT_BITS or (len(rows) and int(rows.max()) >= 1 << _ROW_BITS):
        raise ValueError("dedup: at most 1,024 sources, 1,048,576 units a source and 8,589,934,592 rows a file")
    return (np.int64(source) << (_UNIT_BITS + _ROW_BITS)) + (np.int64(unit) << _ROW_BITS) + rows


def unpack_place(place: int) -> tuple[int, int, int]:
    """Source, unit and row of ``pack_place``."""
    return (
        place >> (_UNIT_BITS + _ROW_BITS),
        (place >> _ROW_BITS) & ((1 << _UNIT_BITS) - 1),
        place & ((1 << _ROW_BITS) - 1),
    )


class Seen:
    """Keys of rows that were kept, and their places."""

    def __init__(self) -> None:
        self._runs: list[tuple[np.ndarray, np.ndarray]] = []

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Places of the rows that had these keys, ``[n]`` int64, -1 where none had.

        Args:
            keys: ``[n]`` of 16 bytes (``S16``).
        """
        places = np.full(len(keys), -1, dtype=np.int64)
        for known, where in self._runs:
            at = np.minimum(np.searchsorted(known, keys), len(known) - 1)
            hit = known[at] == keys
            places[hit] = where[at[hit]]
        return places

    def add(self, keys: np.ndarray, places: np.ndarray) -> None:
        """Add keys that are new, each once."""
        if not len(keys):
            return
        order = np.argsort(keys, kind="stable")
        self._runs.append((keys[order], places[order]))
        while len(self._runs) > 1 and len(self._runs[-2][0]) <= 2 * len(self._runs[-1][0]):
            (a, a_where), (b, b_where) = self._runs[-2:]
            joined, where = np.concatenate([a, b]), np.concatenate([a_where, b_where])
            order = np.argsort(joined, kind="stable")
            self._runs[-2:] = [(joined[order], where[order])]


def first_of_each(keys: np.ndarray) -> np.ndarray:
    """For each key the index of the first one that equals it, ``[n]`` int64."""
    _, first, which = np.unique(keys, return_index=True, return_inverse=True)
    return first[which]
