"""Histograms that sources share the classes of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BLOCKS = " \u2581\u2582\u2583\u2584\u2585\u2586\u2587\u2588"
ASCII = " .:-=+*#@"
"""From nothing to most; the second is for terminals that cannot show the first."""


def edges(values: Sequence[np.ndarray], classes: int = 32) -> np.ndarray:
    """Edges of classes for positive whole numbers: a class each where they are few, else evenly on a logarithmic scale.

    Args:
        values: Of each source; zeros are put into a class of their own if there are any.
        classes: How many at most.

    Returns:
        Rising, ``[classes + 1]`` float64 or fewer; the last one is above all values.
    """
    filled = [v for v in values if len(v)]
    if not filled:
        return np.array([0.0, 1.0])
    low, high = min(int(v.min()) for v in filled), max(int(v.max()) for v in filled)
    if high - low < classes:
        return np.arange(low, high + 2, dtype=np.float64)
    least = min((int(v[v > 0].min()) for v in filled if (v > 0).any()), default=1)
    found = np.unique(np.round(np.geomspace(least, high + 1, classes + 1)))
    return np.concatenate([[0.0], found]) if low <= 0 else found


def spark(values: np.ndarray, bounds: np.ndarray, signs: str = BLOCKS) -> str:
    """A histogram as one line of text, the highest class as the last of ``signs``; a class with few is not left blank."""
    counts, _ = np.histogram(values, bounds)
    most = counts.max(initial=0)
    levels = len(signs) - 1
    return "".join(signs[0 if not count else max(1, round(levels * count / most))] for count in counts)


def short_number(value: float) -> str:
    """``1234`` -> ``1,234``, ``45678`` -> ``45.7k``, ``1234567`` -> ``1.23M``."""
    for above, unit, scale in ((1e9, "G", 1e9), (1e6, "M", 1e6), (1e4, "k", 1e3)):
        if abs(value) >= above:
            scaled = value / scale
            return f"{scaled:.0f}{unit}" if scaled >= 99.95 else f"{scaled:.3g}{unit}"
    return f"{value:,.0f}" if value == round(value) or abs(value) >= 100 else f"{value:.3g}"
