"""In which order a mixture draws from its sources: at every prefix each is less than one draw off its share.

A source of share ``w`` may have had ``x`` draws after ``t`` of all only if ``|x - t w| <= c``. That gives its ``j``-th draw a
window of places. Taking, at every place, the open draw whose window closes first finds an order within all windows if
there is one, and for ``c = 1 - 1 / (2 m - 2)`` with ``m`` sources there always is one (Tijdeman, The chairman assignment
problem, Discrete Mathematics 32, 1980). Taking what lags most, as megatron-core's blending index does, can be off by more
than one with four sources or more.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np

MOST_SOURCES = 2**16 - 1
_CHUNK = 2**17
"""Places that are planned at once."""
_SLACK = 1e-6
"""Added to ``c``, so that rounding closes no window; ``c`` stays below 1 for as many sources as there may be."""


def blend(weights: Sequence[float], samples: int) -> np.ndarray:
    """Draw from sources in proportion to their weights.

    Args:
        weights: Of each source, > 0 and finite.
        samples: Draws.

    Returns:
        Number of the source of every draw, ``[samples]`` uint16. More samples have the same beginning.
    """
    assert 0 < len(weights) <= MOST_SOURCES
    assert all(0 < weight < math.inf for weight in weights)
    if len(weights) == 1:
        return np.zeros(samples, dtype=np.uint16)
    total = math.fsum(weights)
    windows = _Windows([weight / total for weight in weights])
    source_of = np.empty(samples, dtype=np.uint16)
    open_keys: list[int] = []
    for start in range(0, samples, _CHUNK):
        end = min(start + _CHUNK, samples)
        opens, keys = windows.until(end)
        taken = _earliest_first(np.bincount(opens - start, minlength=end - start), keys, open_keys)
        source_of[start:end] = taken % len(weights)
    return source_of


class _Windows:
    """The places at which each draw of each source may come.

    Args:
        shares: Of the sources, with the sum 1.
    """

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares, self.following = shares, [1] * len(shares)
        self.bound = 1 - 1 / (2 * len(shares) - 2) + _SLACK

    def until(self, end: int) -> tuple[np.ndarray, np.ndarray]:
        """First places before ``end`` of draws that were not asked for yet, ascending, and the draws' keys.

        A key is ``last place * sources + source``, which sorts draws by their deadline.
        """
        opens, keys = [], []
        for source, share in enumerate(self.shares):
            draw = np.arange(self.following[source], math.floor(end * share + self.bound) + 2, dtype=np.float64)
            first = np.maximum(np.ceil((draw - self.bound) / share) - 1, 0)
            draw, first = draw[first < end], first[first < end]
            self.following[source] += len(draw)
            opens.append(first.astype(np.int64))
            keys.append(np.floor((draw - 1 + self.bound) / share).astype(np.int64) * len(self.shares) + source)
        joined = np.concatenate(opens)
        order = np.argsort(joined, kind="stable")
        return joined[order], np.concatenate(keys)[order]


def _earliest_first(arrivals: np.ndarray, keys: np.ndarray, open_keys: list[int]) -> np.ndarray:
    """The smallest key that is open, place by place.

    Args:
        arrivals: How many of ``keys`` open at each place.
        keys: In the order in which they open.
        open_keys: A heap of those that are open already; what is open at the end stays in it.
    """
    push, pop, push_pop = heapq.heappush, heapq.heappop, heapq.heappushpop
    following = iter(keys.tolist()).__next__
    taken = []
    for count in arrivals.tolist():
        if count > 1:
            for _ in range(count - 1):
                push(open_keys, following())
        taken.append(push_pop(open_keys, following()) if count else pop(open_keys))
    return np.array(taken)
