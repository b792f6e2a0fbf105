"""Lengths of the training rows of a data set, as packing needs them; of one that repeats samples of others too."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.lengths import SampleSizes, kept_sizes, lengths_name, measure, measured_once, processor_digest
from nemo_bard.data.ranks import Ranks

logger = logging.getLogger(__name__)

_CHUNK = 2**18
"""Samples whose rows are counted at once."""


@dataclass(frozen=True, kw_only=True)
class RowLengths:
    """What packing needs to know of the samples of a data set."""

    lengths: np.ndarray
    """Tokens of every sample's training row, ``[n]`` int32."""
    vision_tokens: np.ndarray
    """Vision tokens among them, likewise."""
    file: Path | None
    """Where the lengths are kept, if they are: a file, or the folder of several."""

    @classmethod
    def of(cls, sizes: SampleSizes, collator: BlockDiffusionCollator, file: Path | None) -> RowLengths:
        """What a collator will make of samples of known sizes."""
        block, options = collator.block_size, collator.options
        lengths, vision = (np.empty(len(sizes), dtype=np.int32) for _ in range(2))
        for start in range(0, len(sizes), _CHUNK):
            part, end = sizes.part(start, start + _CHUNK), start + _CHUNK
            own = part.row_lengths(block, turns=collator.turns, options=options)
            lengths[start:end] = np.minimum(own, np.iinfo(np.int32).max)  # of unknown length, with their noisy copies
            vision[start:end] = part.vision_tokens(block, options=options)
        return cls(lengths=lengths, vision_tokens=vision, file=file)


def measured_rows(
    dataset: Any,
    collator: BlockDiffusionCollator,
    cache_dir: Path,
    *,
    num_workers: int = 0,
    drop_bad: bool = False,
    ranks: Ranks | None = None,
) -> RowLengths:
    """``lengths.measured_once``, for the rows of a collator.

    A data set with ``measured_parts()`` is made of samples of sources of a prepared folder, and ``of_samples`` says which:
    each source is measured once, and its lengths are kept in its own folder, or in ``cache_dir`` if that cannot be
    written.

    Args:
        dataset: See ``lengths.measured_once``.
        collator: What will lay the samples out.
        cache_dir: Likewise.
        num_workers: Likewise.
        drop_bad: Likewise.
        ranks: Likewise.

    Returns:
        The lengths, in the data set's order.

    Raises:
        ValueError: As ``lengths.measured_once``.
        RunError: As ``Ranks.exchange``.
    """
    if not hasattr(dataset, "measured_parts"):
        sizes, path = measured_once(
            dataset, collator, cache_dir, num_workers=num_workers, drop_bad=drop_bad, ranks=ranks
        )
        return RowLengths.of(sizes, collator, path)
    ranks = ranks or Ranks()
    of_part = _of_part(collator, cache_dir, num_workers=num_workers, drop_bad=drop_bad, ranks=ranks)
    parts = [of_part(part) for part in dataset.measured_parts()]
    lengths, vision = (
        dataset.of_samples(np.concatenate([getattr(part, name) for part in parts]))
        for name in ("lengths", "vision_tokens")
    )
    return RowLengths(lengths=lengths, vision_tokens=vision, file=dataset.path)


class _Numbered:
    """A source of a prepared folder as a data set of its own: what is measured."""

    def __init__(self, source: Any) -> None:
        self.source = source

    def __len__(self) -> int:
        return len(self.source)

    def peek(self, index: int) -> dict[str, Any]:
        try:
            return {**self.source.peek(index), "sample_index": index}
        except ValueError as error:
            raise ValueError(f"{self.source.describe(index)['source']}: {error}") from error

    __getitem__ = peek


def _of_part(
    collator: BlockDiffusionCollator, cache_dir: Path, *, num_workers: int, drop_bad: bool, ranks: Ranks
) -> Callable[[Any], RowLengths]:
    """From a source to the lengths of its rows."""
    doing = "reading measured lengths"
    processor = ranks.on_first(lambda: processor_digest(collator), doing)

    def kept(source: Any) -> RowLengths | None:
        name = lengths_name(source.fingerprint(), collator, processor=processor)
        for path in (source.folder / name, cache_dir / name):
            sizes = kept_sizes(path, len(source))
            if sizes is not None and (drop_bad or not sizes.has_unknown()):
                return RowLengths.of(sizes, collator, path)
        return None

    def of_part(source: Any) -> RowLengths:
        if (rows := ranks.on_first(lambda: kept(source), doing)) is not None:
            return rows
        sizes = measure(_Numbered(source), collator, num_workers=num_workers, drop_bad=drop_bad, ranks=ranks)
        name = lengths_name(source.fingerprint(), collator, processor=processor)
        path = ranks.on_first(lambda: _write(sizes, (source.folder, cache_dir), name), "writing measured lengths")
        logger.info("lengths of %d samples of %s written to %s", len(sizes), source.entry.name, path)
        return RowLengths.of(sizes, collator, path)

    return of_part


def _write(sizes: SampleSizes, folders: tuple[Path, ...], name: str) -> Path:
    """Write into the first folder that can be written."""
    *first, last = folders
    for folder in first:
        try:
            sizes.save(folder / name)
        except OSError as error:
            logger.info("%s cannot be written (%s); lengths go to %s", folder, one_line(error), last)
        else:
            return folder / name
    sizes.save(last / name)
    return last / name
