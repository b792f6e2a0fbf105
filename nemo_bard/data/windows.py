"""Packing of one window: which of a few thousand samples share a row."""

from __future__ import annotations

import numpy as np

VISION_WEIGHT = 3.0
"""How much more than by its length a row is chosen by its vision tokens, for a sample that has some."""
_ROOMY = 0.75
"""Rows with at least this part of the largest room get samples together."""
_TIGHT = 0.9
"""From this part of the largest room on, a sample is long: rows are filled up, each with the longest sample that fits."""


def pack_window(lengths: np.ndarray, vision_tokens: np.ndarray, max_length: int, *, leave_over: bool) -> np.ndarray:
    """Distribute samples over rows of at most ``max_length`` tokens.

    The longest first, many at a time, samples go to the rows with the most room, those with images to the rows with the
    smallest share of tokens and of vision tokens. At the end every row takes the longest sample that still fits.

    Args:
        lengths: Tokens of each sample, ``[n]`` int, at most ``max_length``.
        vision_tokens: Vision tokens among them, ``[n]`` int.
        max_length: Tokens of a row; a row without vision tokens, unless one sample fills it, keeps one free.
        leave_over: Make no more rows than the samples fill, and leave over what does not fit.

    Returns:
        Row of each sample, ``[n]`` int64, -1 if it is left over. With ``leave_over`` too, the longest possible samples
        have a place.
    """
    order = np.argsort(-lengths, kind="stable")
    longest_first, vision = lengths[order], vision_tokens[order]
    alone = int(np.searchsorted(-longest_first, -max_length, side="right"))
    longest_first, vision = longest_first[alone:], vision[alone:]
    total = int(longest_first.sum())
    rows = max(total // max_length if leave_over else -(-total // max_length), 1)
    row_of = _deal(longest_first, vision, rows, max_length)
    while not leave_over and (left := row_of < 0).any():
        rows += -(-int(longest_first[left].sum()) // max_length)
        row_of = _deal(longest_first, vision, rows, max_length)
    result = np.empty(len(order), dtype=np.int64)
    result[order] = np.concatenate([np.arange(alone), np.where(row_of < 0, -1, row_of + alone)])
    return result


def _deal(lengths: np.ndarray, vision: np.ndarray, rows: int, max_length: int) -> np.ndarray:
    """Row of each sample, -1 if it fits nowhere; ``lengths`` descend."""
    row_of = np.full(len(lengths), -1, dtype=np.int64)
    room = np.full(rows, max_length, dtype=np.int64)
    seen = np.zeros(rows, dtype=np.int64)
    weight = VISION_WEIGHT / max(int(vision.sum()) / rows, 1.0)
    pending = np.arange(len(lengths))
    while True:
        free = room - (seen == 0)
        most = int(free.max())
        pending = pending[np.searchsorted(-lengths[pending], -most) :]
        if not len(pending):
            return row_of
        longest = int(lengths[pending[0]])
        if longest > _TIGHT * most:
            places, into = _fill_up(lengths[pending], free)
        else:
            roomy = np.flatnonzero(free >= max(longest, _ROOMY * most))
            times = max(int(_ROOMY * most) // (2 * longest), 1)
            slots = _in_turns(roomy[np.argsort(weight * seen[roomy] - room[roomy] / max_length, kind="stable")], times)
            places = np.arange(min(len(slots), len(pending)))
            into = _by_kind(vision[pending[places]], slots, room)
        chosen = pending[places]
        row_of[chosen] = into
        room -= np.bincount(into, weights=lengths[chosen], minlength=rows).astype(np.int64)
        seen += np.bincount(into, weights=vision[chosen], minlength=rows).astype(np.int64)
        pending = np.delete(pending, places)


def _fill_up(lengths: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Give each row, the roomiest first, the longest sample that fits and no row before it has: samples and their rows."""
    rows = np.argsort(-free, kind="stable")
    turn = np.arange(len(rows))
    places = np.maximum.accumulate(np.searchsorted(-lengths, -free[rows]) - turn) + turn
    there = places < len(lengths)
    return places[there], rows[there]


def _in_turns(rows: np.ndarray, times: int) -> np.ndarray:
    """``rows`` forwards, backwards, forwards, ..., ``times`` times in all."""
    turns = np.tile(rows, (times, 1))
    turns[1::2] = turns[1::2, ::-1]
    return turns.ravel()


def _by_kind(vision: np.ndarray, slots: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Rows of samples: the first slots to those with images, most vision tokens first; of the others the roomiest to the rest.

    Args:
        vision: Vision tokens of the samples, the longest sample first.
        slots: Rows, the one with the smallest load first.
        room: Free tokens of every row.
    """
    into = np.empty(len(vision), dtype=np.int64)
    pictured, plain = np.flatnonzero(vision), np.flatnonzero(vision == 0)
    into[pictured[np.argsort(-vision[pictured], kind="stable")]] = slots[: len(pictured)]
    rest = slots[len(pictured) :]
    into[plain] = rest[np.argsort(-room[rest], kind="stable")][: len(plain)]
    return into
