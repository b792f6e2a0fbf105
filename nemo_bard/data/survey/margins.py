"""Estimates of a whole source from a part of its rows, with 95 % margins."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Z = 1.96
"""Standard deviations of 95 %."""


class Estimate(NamedTuple):
    """A share of something, and where it lies with 95 % confidence; all three are the same where nothing was estimated."""

    value: float
    low: float
    high: float

    @property
    def exact(self) -> bool:
        """Whether nothing was estimated."""
        return self.low == self.high


def share_of_rows(holds: np.ndarray, rows: int) -> Estimate:
    """Share of a source's rows of which something holds (Wilson's interval, corrected for the part of the rows taken).

    Args:
        holds: Of the rows that were looked at, ``[n]`` bool, n >= 1.
        rows: Of the source.

    Returns:
        A share in [0, 1].
    """
    n, found = len(holds), int(np.count_nonzero(holds))
    value = found / n
    if n >= rows:
        return Estimate(value, value, value)
    size = n * (rows - 1) / (rows - n)  # of a sample from an endless source that would know as much
    middle = (value + Z**2 / (2 * size)) / (1 + Z**2 / size)
    half = Z / (1 + Z**2 / size) * math.sqrt(value * (1 - value) / size + Z**2 / (4 * size**2))
    return Estimate(value, min(max(middle - half, 0.0), value), max(min(middle + half, 1.0), value))


def ratio(part: np.ndarray, whole: np.ndarray, rows: int) -> Estimate:
    """Sum of one number over the sum of another, for all rows of a source.

    Args:
        part: Of the rows that were looked at, ``[n]``, n >= 1.
        whole: Likewise, positive; ``part <= whole``.
        rows: Of the source.

    Returns:
        A share in [0, 1]; the margin is that of the linearised ratio.
    """
    n, value = len(part), float(part.sum() / whole.sum())
    if n >= rows:
        return Estimate(value, value, value)
    if n < 2:
        return Estimate(value, 0.0, 1.0)
    spread = float(np.std(part - value * whole, ddof=1)) * math.sqrt((1 - n / rows) / n)
    half = Z * spread / float(whole.mean())
    return Estimate(value, max(value - half, 0.0), min(value + half, 1.0))
