"""Packing: several samples in one training row, planned from their lengths.

Rows are as full as they can be and hold about equally many vision tokens, so that ranks wait little for each other
whichever rows they get. Which samples share a row is fixed for a run; a data loader may shuffle the rows.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.lengths import UNKNOWN_LENGTH
from nemo_bard.data.ranks import Ranks
from nemo_bard.data.row_lengths import measured_rows
from nemo_bard.data.stream import identity_of, is_ordered
from nemo_bard.data.windows import pack_window

logger = logging.getLogger(__name__)

WINDOW = 4096
"""Samples that are packed together: enough for full rows, few enough that long and short samples stay mixed."""


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
        return np.add.reduceat(values[self.members], self.edges[:-1])


def plan_packs(
    lengths: np.ndarray,
    vision_tokens: np.ndarray,
    max_length: int,
    *,
    fits: np.ndarray | None = None,
    seed: int = 0,
    shuffle: bool = True,
    mix_rows: bool = False,
    window: int = WINDOW,
) -> Packs:
    """Distribute samples over rows of at most ``max_length`` tokens.

    The samples, shuffled, are taken a window at a time, with as many rows as they fill; see ``windows.pack_window``. What
    fits nowhere waits for the next window. A row without vision tokens keeps one token free, because a batch without
    images ends in a hidden image token.

    Args:
        lengths: Tokens of each sample's training row, noisy copies included, ``[n]`` int.
        vision_tokens: Vision tokens among them, ``[n]`` int.
        max_length: Tokens of a row.
        fits: Samples that are to be trained on, ``[n]`` bool; those of at most ``max_length`` tokens if None. The others,
            which the collator drops and counts, are dealt out among the rows.
        seed: Seed of the shuffle.
        shuffle: Shuffle before packing; without, rows follow the order of the samples from window to window.
        mix_rows: Shuffle the rows of each window among themselves; without, those with the longest samples come first.
        window: Samples that are packed together.

    Returns:
        The rows, a pure function of the arguments; every sample is in exactly one. Without ``shuffle``, more samples
        give the same rows up to the last window.

    Raises:
        ValueError: If no sample fits into a row.
    """
    fits = lengths <= max_length if fits is None else fits
    if not fits.any():
        raise ValueError(
            f"none of the {len(lengths)} samples fits into max_length or a row of {max_length} tokens; the shortest takes"
            f" {lengths.min()}"
        )
    assert lengths[fits].max() <= max_length
    order = np.random.default_rng(seed).permutation(len(lengths)) if shuffle else None
    members = np.empty(len(lengths), dtype=np.int32 if len(lengths) < 2**31 else np.int64)
    sizes: list[np.ndarray] = []
    filled = 0
    waiting = others = np.empty(0, dtype=np.int64)
    for start in tqdm(range(0, len(lengths), window), desc="packing", unit="window", disable=None, delay=2):
        end = min(start + window, len(lengths))
        new = np.arange(start, end) if order is None else order[start:end]
        taken, others = np.concatenate([waiting, new[fits[new]]]), np.concatenate([others, new[~fits[new]]])
        if not len(taken):
            continue
        row_of = pack_window(
            lengths[taken], vision_tokens[taken], max_length, leave_over=end < len(lengths), waited=len(waiting)
        )
        waiting, taken, row_of = taken[row_of < 0], taken[row_of >= 0], row_of[row_of >= 0]
        if len(taken):
            dice = np.random.default_rng([seed, start]) if mix_rows else None
            there, counts = _rows_of(taken, row_of, others, dice)
            members[filled : filled + len(there)] = there
            sizes.append(counts)
            filled, others = filled + len(there), others[:0]
    members[filled:] = others
    sizes[-1][-1] += len(others)
    return Packs(edges=np.cumsum(np.concatenate([[0], *sizes]), dtype=np.int64), members=members)


def _rows_of(
    samples: np.ndarray, row_of: np.ndarray, others: np.ndarray, dice: np.random.Generator | None
) -> tuple[np.ndarray, np.ndarray]:
    """Samples in the order of their rows, ``others`` dealt out evenly among them, and how many each row has."""
    used, row_of = np.unique(row_of, return_inverse=True)
    if dice is not None:
        row_of = dice.permutation(len(used))[row_of]
    row_of = np.concatenate([row_of, np.arange(len(others)) * len(used) // max(len(others), 1)])
    return np.concatenate([samples, others])[np.argsort(row_of, kind="stable")], np.bincount(row_of)


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
        shuffle: See ``plan_packs``; a data set that is ``ordered`` is packed in its order all the same.
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
    ordered = is_ordered(dataset)
    packs = plan_packs(
        lengths,
        vision,
        collator.max_row_length,
        fits=fits,
        seed=seed,
        shuffle=shuffle and not ordered,
        mix_rows=ordered,
    )
    filled, seen = packs.sums(lengths * fits), packs.sums(vision * fits)
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
