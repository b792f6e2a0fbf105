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
_CHUNK = 2**16
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
    opens, keys = _windows([weight / total for weight in weights], samples)
    return _earliest_first(np.bincount(opens, minlength=samples)[:samples], keys, len(weights))


def _windows(shares: Sequence[float], samples: int) -> tuple[np.ndarray, np.ndarray]:
    """First place of every draw, ascending, and ``last place * sources + source``, which sorts draws by their deadline."""
    sources = len(shares)
    bound = 1 - 1 / (2 * sources - 2) + _SLACK
    opens, keys = [], []
    for source, share in enumerate(shares):
        draw = np.arange(1, math.floor(samples * share + bound) + 1, dtype=np.float64)
        opens.append(np.maximum(np.ceil((draw - bound) / share) - 1, 0).astype(np.int64))
        keys.append(np.floor((draw - 1 + bound) / share).astype(np.int64) * sources + source)
    first, key = np.concatenate(opens), np.concatenate(keys)
    order = np.argsort(first, kind="stable")
    return first[order], key[order]


def _earliest_first(arrivals: np.ndarray, keys: np.ndarray, sources: int) -> np.ndarray:
    """The source of the smallest key that is open, place by place.

    Args:
        arrivals: How many of ``keys`` open at each place.
        keys: In the order in which they open.
        sources: How many there are.
    """
    source_of = np.empty(len(arrivals), dtype=np.uint16)
    push, pop, push_pop = heapq.heappush, heapq.heappop, heapq.heappushpop
    open_keys: list[int] = []
    start = 0
    for place in range(0, len(arrivals), _CHUNK):
        counts = arrivals[place : place + _CHUNK]
        end = start + int(counts.sum())
        following = iter(keys[start:end].tolist()).__next__
        start = end
        taken = []
        for count in counts.tolist():
            if count > 1:
                for _ in range(count - 1):
                    push(open_keys, following())
            taken.append(push_pop(open_keys, following()) if count else pop(open_keys))
        source_of[place : place + len(taken)] = np.array(taken) % sources
    return source_of
