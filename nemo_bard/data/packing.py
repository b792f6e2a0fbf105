"""Packing: several samples in one training row, planned from their lengths.

Rows are as full as they can be and hold about equally many vision tokens, so that ranks wait little for each other
whichever rows they get. Which samples share a row is fixed for a run; a data loader may shuffle the rows.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.lengths import UNKNOWN_LENGTH
from nemo_bard.data.packs import Packs, none_fits
from nemo_bard.data.ranks import Ranks
from nemo_bard.data.row_lengths import measured_rows
from nemo_bard.data.stream import identity_of, is_ordered
from nemo_bard.data.windows import VISION_WEIGHT, WINDOW, plan_in_order

logger = logging.getLogger(__name__)


def plan_packs(
    lengths: np.ndarray,
    vision_tokens: np.ndarray,
    max_length: int,
    *,
    fits: np.ndarray | None = None,
    seed: int = 0,
    shuffle: bool = True,
    window: int = WINDOW,
) -> Packs:
    """Distribute samples over rows of at most ``max_length`` tokens.

    The samples, shuffled, are taken a window at a time, with as many rows as they fill. The longest first, a sample goes
    to the row with the smallest share of tokens (and, if it has any, of vision tokens) that has room; what fits nowhere
    waits for the next window. A row without vision tokens keeps one token free, because a batch without images
    ends in a hidden image token.

    Args:
        lengths: Tokens of each sample's training row, noisy copies included, ``[n]`` int.
        vision_tokens: Vision tokens among them, ``[n]`` int.
        max_length: Tokens of a row.
        fits: Samples that are to be trained on, ``[n]`` bool; those of at most ``max_length`` tokens if None. The others,
            which the collator drops and counts, are dealt out among the rows.
        seed: Seed of the shuffle.
        shuffle: Shuffle before packing; without, rows follow the order of the samples from window to window.
        window: Samples that are packed together.

    Returns:
        The rows, a pure function of the arguments; every sample is in exactly one.

    Raises:
        ValueError: If no sample fits into a row.
    """
    fits = lengths <= max_length if fits is None else fits
    if not fits.any():
        raise none_fits(lengths, max_length)
    assert lengths[fits].max() <= max_length
    order = np.flatnonzero(fits)
    if shuffle:
        order = np.random.default_rng(seed).permutation(order)
    rows: list[list[int]] = []
    waiting = order[:0]
    for start in tqdm(range(0, len(order), window), desc="packing", unit="window", disable=None, delay=2):
        taken = np.concatenate([waiting, order[start : start + window]])
        is_last = start + window >= len(order)
        packed, waiting = _pack(taken, lengths, vision_tokens, max_length, leave_over=not is_last)
        rows += packed
    for number, sample in enumerate(np.flatnonzero(~fits).tolist()):
        rows[number % len(rows)].append(sample)
    edges = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return Packs(edges=edges, members=np.array([sample for row in rows for sample in row], dtype=np.int64))


def _pack(
    samples: np.ndarray, lengths: np.ndarray, vision_tokens: np.ndarray, max_length: int, *, leave_over: bool
) -> tuple[list[list[int]], np.ndarray]:
    """Pack one window: its rows, and samples left over."""
    total = int(lengths[samples].sum())
    number = max(total // max_length if leave_over else -(-total // max_length), 1)
    room = np.full(number, max_length, dtype=np.int64)
    vision = np.zeros(number, dtype=np.int64)
    rows: list[list[int]] = [[] for _ in range(number)]
    vision_share = max(int(vision_tokens[samples].sum()) / number, 1.0)
    left: list[int] = []
    for sample in samples[np.argsort(-lengths[samples], kind="stable")].tolist():
        length, seen = int(lengths[sample]), int(vision_tokens[sample])
        load = -room / max_length + (VISION_WEIGHT / vision_share * vision if seen else 0.0)
        needed = length if seen else length + (vision == 0)
        load = np.where(room >= needed, load, np.inf)
        row = int(load.argmin())
        if np.isinf(load[row]):
            if leave_over and length < max_length:
                left.append(sample)
                continue
            row = len(rows)
            room, vision = np.append(room, max_length), np.append(vision, 0)
            rows.append([])
        rows[row].append(sample)
        room[row] -= length
        vision[row] += seen
    return [row for row in rows if row], np.array(left, dtype=np.int64)


class PackedDataset:
    """A map-style data set whose items are rows: lists of another one's items.

    Args:
        dataset: Sized and map-style.
        packs: Which of its items share a row.
    """

    def __init__(self, dataset: Any, packs: Packs) -> None:
        self.dataset, self.packs = dataset, packs
        self.ordered = is_ordered(dataset)

    def __len__(self) -> int:
        return len(self.packs)

    def identity(self) -> dict[str, str]:
        """What the rows depend on: the data set's own identity, and which samples share a row."""
        digest = hashlib.sha256(self.packs.edges.data)
        digest.update(self.packs.members.data)
        return {**identity_of(self.dataset), "packed rows": f"{len(self)} rows, {digest.hexdigest()[:16]}"}

    def __getitem__(self, index: int) -> list[dict[str, Any]]:
        """Return the samples of a row.

        Raises:
            IndexError: If ``index`` is outside the rows.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} rows")
        return [self.dataset[sample] for sample in self.packs[index]]


def pack_dataset(
    dataset: Any,
    collator: BlockDiffusionCollator,
    *,
    cache_dir: Path,
    seed: int,
    shuffle: bool,
    num_workers: int = 0,
    drop_bad: bool = False,
    ranks: Ranks | None = None,
) -> PackedDataset:
    """Measure a data set (or read its lengths from a file) and plan its rows.

    Args:
        dataset: Sized and map-style, see ``lengths.measure``.
        collator: What will lay the samples out; ``max_row_length`` is that of the rows.
        cache_dir: See ``lengths.measured_once``.
        seed: See ``plan_packs``.
        shuffle: See ``plan_packs``; a data set that is ``ordered`` keeps its order all the same (``windows.plan_in_order``).
        num_workers: Processes that measure.
        ranks: See ``lengths.measure``.
        drop_bad: Deal samples that cannot be measured out among the rows, as too long ones, instead of raising.

    Returns:
        The rows.

    Raises:
        ValueError: If a sample cannot be trained on, none fits, or one is too long with ``overlong: error``.
    """
    measured = measured_rows(dataset, collator, cache_dir, num_workers=num_workers, drop_bad=drop_bad, ranks=ranks)
    lengths, vision, path = measured.lengths, measured.vision_tokens, measured.file
    collator.lengths_file = path
    unknown = lengths >= UNKNOWN_LENGTH
    overlong = np.flatnonzero((lengths > collator.max_length) & ~unknown)
    if len(overlong) and collator.overlong == "error":
        first = int(overlong[0])
        raise ValueError(
            f"sample {first} takes {lengths[first]} tokens (noisy copies included), more than {collator.max_length}, and"
            f" so do {len(overlong) - 1} others; raise max_length or set collate_fn.overlong: drop"
        )
    fits = lengths <= collator.max_length
    if is_ordered(dataset):
        packs = plan_in_order(lengths, vision, collator.max_row_length, fits=fits, seed=seed)
    else:
        packs = plan_packs(lengths, vision, collator.max_row_length, fits=fits, seed=seed, shuffle=shuffle)
    lengths[~fits] = vision[~fits] = 0
    filled, seen = packs.sums(lengths), packs.sums(vision)
    logger.info(
        "packing: %d samples in %d rows of at most %d tokens, %.1f %% of them real; vision tokens per row %.0f +- %.0f;"
        " %d samples are too long and will be dropped, %d cannot be read",
        len(lengths) - len(overlong) - int(unknown.sum()),
        len(packs),
        collator.max_row_length,
        100 * filled.sum() / (len(packs) * collator.max_row_length),
        seen.mean(),
        seen.std(),
        len(overlong),
        unknown.sum(),
    )
    return PackedDataset(dataset, packs)
