"""Packing of samples whose order counts: window by window, many samples at a time."""

from __future__ import annotations

import numpy as np
from tqdm import tqdm

from nemo_bard.data.packs import Packs, none_fits

WINDOW = 4096
"""Samples that are packed together: enough for full rows, few enough that long and short samples stay mixed."""
VISION_WEIGHT = 3.0
"""How much more than by its length a row is chosen by its vision tokens, for a sample that has some."""
_ROOMY = 0.75
"""Rows with at least this part of the largest room get samples together."""
_TIGHT = 0.9
"""From this part of the largest room on, a sample is long: rows are filled up, each with the longest sample that fits."""


def plan_in_order(
    lengths: np.ndarray,
    vision_tokens: np.ndarray,
    max_length: int,
    *,
    fits: np.ndarray | None = None,
    seed: int = 0,
    window: int = WINDOW,
) -> Packs:
    """Distribute samples whose order counts over rows of at most ``max_length`` tokens, many samples at a time.

    Samples are taken a window at a time, with as many rows as they fill; see ``pack_window``. What fits nowhere waits for
    the next window, where it comes first. A row without vision tokens keeps one token free, because a batch without
    images ends in a hidden image token. The rows of a window are shuffled among themselves.

    Args:
        lengths: Tokens of each sample's training row, noisy copies included, ``[n]`` int.
        vision_tokens: Vision tokens among them, ``[n]`` int.
        max_length: Tokens of a row.
        fits: Samples that are to be trained on, ``[n]`` bool; those of at most ``max_length`` tokens if None. The others,
            which the collator drops and counts, are dealt out among the rows of their window.
        seed: Seed of the shuffles.
        window: Samples that are packed together.

    Returns:
        The rows, a pure function of the arguments; every sample is in exactly one. More samples give the same rows up to
        the last window.

    Raises:
        ValueError: If no sample fits into a row.
    """
    fits = lengths <= max_length if fits is None else fits
    if not fits.any():
        raise none_fits(lengths, max_length)
    assert lengths[fits].max() <= max_length
    members = np.empty(len(lengths), dtype=np.int32 if len(lengths) < 2**31 else np.int64)
    sizes: list[np.ndarray] = []
    filled = 0
    waiting = others = np.empty(0, dtype=np.int64)
    for start in tqdm(range(0, len(lengths), window), desc="packing", unit="window", disable=None, delay=2):
        end = min(start + window, len(lengths))
        new = np.arange(start, end)
        taken, others = np.concatenate([waiting, new[fits[new]]]), np.concatenate([others, new[~fits[new]]])
        if not len(taken):
            continue
        row_of = pack_window(
            lengths[taken], vision_tokens[taken], max_length, leave_over=end < len(lengths), waited=len(waiting)
        )
        waiting, taken, row_of = taken[row_of < 0], taken[row_of >= 0], row_of[row_of >= 0]
        if len(taken):
            there, counts = _rows_of(taken, row_of, others, np.random.default_rng([seed, start]))
            members[filled : filled + len(there)] = there
            sizes.append(counts)
            filled, others = filled + len(there), others[:0]
    members[filled:] = others
    sizes[-1][-1] += len(others)
    return Packs(edges=np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64), members=members)


def _rows_of(
    samples: np.ndarray, row_of: np.ndarray, others: np.ndarray, dice: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Samples in the order of their rows, ``others`` dealt out evenly among them, and how many each row has."""
    used, row_of = np.unique(row_of, return_inverse=True)
    row_of = dice.permutation(len(used))[row_of]
    row_of = np.concatenate([row_of, np.arange(len(others)) * len(used) // max(len(others), 1)])
    return np.concatenate([samples, others])[np.argsort(row_of, kind="stable")], np.bincount(row_of)


def pack_window(
    lengths: np.ndarray, vision_tokens: np.ndarray, max_length: int, *, leave_over: bool, waited: int = 0
) -> np.ndarray:
    """Distribute samples over rows of at most ``max_length`` tokens.

    The longest first, many at a time, samples go to the rows with the most room, those with images to the rows with the
    smallest share of tokens and of vision tokens. At the end every row takes the longest sample that still fits.

    Args:
        lengths: Tokens of each sample, ``[n]`` int, at most ``max_length``.
        vision_tokens: Vision tokens among them, ``[n]`` int.
        max_length: Tokens of a row; a row without vision tokens, unless one sample fills it, keeps one free.
        leave_over: Make no more rows than the samples fill, and leave over what does not fit.
        waited: Samples at the beginning that were left over before; they come first, or the shortest would wait for ever.

    Returns:
        Row of each sample, ``[n]`` int64, from 0 on, -1 if it is left over.
    """
    row_of = np.full(len(lengths), -1, dtype=np.int64)
    alone = np.flatnonzero(lengths == max_length)
    row_of[alone] = np.arange(len(alone))
    others = np.flatnonzero(lengths < max_length)
    sizes, vision = lengths[others], vision_tokens[others]
    by_size = np.argsort(-sizes, kind="stable")
    early = others[by_size] < waited
    turns = [by_size[early], by_size[~early]]
    total = int(sizes.sum())
    rows = max(total // max_length if leave_over else -(-total // max_length), 1)
    dealt = _deal(sizes, vision, turns, rows, max_length)
    while not leave_over and (left := dealt < 0).any():
        rows += -(-int(sizes[left].sum()) // max_length)
        dealt = _deal(sizes, vision, turns, rows, max_length)
    row_of[others] = np.where(dealt < 0, -1, dealt + len(alone))
    return row_of


class _Rows:
    """Rows that are being filled."""

    def __init__(self, number: int, max_length: int, vision_share: float) -> None:
        self.max_length, self.weight = max_length, VISION_WEIGHT / max(vision_share, 1.0)
        self.room = np.full(number, max_length, dtype=np.int64)
        self.seen = np.zeros(number, dtype=np.int64)

    @property
    def free(self) -> np.ndarray:
        """Tokens that any sample may take."""
        return self.room - (self.seen == 0)

    def take(self, rows: np.ndarray, lengths: np.ndarray, vision: np.ndarray) -> None:
        """Put samples into rows."""
        self.room -= np.bincount(rows, weights=lengths, minlength=len(self.room)).astype(np.int64)
        self.seen += np.bincount(rows, weights=vision, minlength=len(self.seen)).astype(np.int64)

    def least_loaded_first(self, rows: np.ndarray) -> np.ndarray:
        """``rows`` in the order in which samples with images go to them."""
        load = self.weight * self.seen[rows] - self.room[rows] / self.max_length
        return rows[np.argsort(load, kind="stable")]


def _deal(lengths: np.ndarray, vision: np.ndarray, turns: list[np.ndarray], number: int, max_length: int) -> np.ndarray:
    """Row of each sample, -1 if it fits nowhere; ``turns`` are samples, the longest first, that come one after the other."""
    row_of = np.full(len(lengths), -1, dtype=np.int64)
    rows = _Rows(number, max_length, int(vision.sum()) / number)
    for pending in turns:
        while True:
            free = rows.free
            most = int(free.max())
            pending = pending[np.searchsorted(-lengths[pending], -most) :]
            if not len(pending):
                break
            longest = int(lengths[pending[0]])
            if longest > _TIGHT * most:
                places, into = _fill_up(lengths[pending], free)
            else:
                roomy = np.flatnonzero(free >= max(longest, _ROOMY * most))
                times = max(int(_ROOMY * most) // (2 * longest), 1)
                slots = _in_turns(rows.least_loaded_first(roomy), times)
                places = np.arange(min(len(slots), len(pending)))
                into = _by_kind(vision[pending[places]], slots, rows.room)
            chosen = pending[places]
            row_of[chosen] = into
            rows.take(into, lengths[chosen], vision[chosen])
            pending = np.delete(pending, places)
    return row_of


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
