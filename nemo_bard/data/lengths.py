"""How long the training rows of a data set are, without reading pixels: measured once, kept in a file.

What is measured does not depend on block size, supervised turns or an anchor, so that all stages of a chain share it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from nemo_bard.data.collate import BlockDiffusionCollator, Outline
from nemo_bard.data.ranks import Ranks, deal_out
from nemo_bard.data.rejects import ERRORS
from nemo_bard.method.layout import PLAIN_ROW, RowOptions
from nemo_bard.upstream.transformers import vision_section

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of the file; part of its name."""
UNKNOWN_LENGTH = 2**30
"""Length of the response of a sample that could not be measured: it fits into no row."""


@dataclass(frozen=True, kw_only=True)
class SampleSizes:
    """Where responses and media of each of ``n`` samples lie, in tokens of its conversation."""

    response_edges: np.ndarray
    """``[n + 1]`` int64: sample ``i`` has ``responses[response_edges[i] : response_edges[i + 1]]``, at least one."""
    responses: np.ndarray
    """Half-open spans, ``[*, 2]`` int32."""
    media_edges: np.ndarray
    """``[n + 1]`` int64, the same for ``media``."""
    media: np.ndarray
    """First placeholder and number of tokens of every image and video, ``[*, 2]`` int32."""

    @classmethod
    def from_outlines(cls, outlines: list[Outline]) -> SampleSizes:
        """Join the outlines of a data set's samples, in order."""

        def edges(counts: list[int]) -> np.ndarray:
            return np.concatenate([[0], np.cumsum(counts, dtype=np.int64)]).astype(np.int64)

        def join(pairs: list[Any]) -> np.ndarray:
            return np.array([pair for sample in pairs for pair in sample], dtype=np.int32).reshape(-1, 2)

        responses, media = [o.responses for o in outlines], [o.media for o in outlines]
        return cls(
            response_edges=edges([len(r) for r in responses]),
            responses=join(responses),
            media_edges=edges([len(m) for m in media]),
            media=join(media),
        )

    @classmethod
    def join(cls, parts: list[SampleSizes]) -> SampleSizes:
        """Put the sizes of successive parts of a data set together."""

        def edges(name: str) -> np.ndarray:
            counts = [np.diff(getattr(part, name)) for part in parts]
            return np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)

        return cls(
            response_edges=edges("response_edges"),
            responses=np.concatenate([part.responses for part in parts]),
            media_edges=edges("media_edges"),
            media=np.concatenate([part.media for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.response_edges) - 1

    def part(self, start: int, end: int) -> SampleSizes:
        """The samples of a range."""
        responses, media = (edges[start : end + 1] for edges in (self.response_edges, self.media_edges))
        return SampleSizes(
            response_edges=responses - responses[0],
            responses=self.responses[responses[0] : responses[-1]],
            media_edges=media - media[0],
            media=self.media[media[0] : media[-1]],
        )

    def has_unknown(self) -> bool:
        """Whether there is a sample that could not be measured."""
        return bool((self.responses[:, 1] >= UNKNOWN_LENGTH).any())

    def _kept(self, block_size: int) -> np.ndarray:
        """Context tokens that are laid out, ``[n]`` (``layout.sample_layout``)."""
        start, end = self.responses[self.response_edges[1:] - 1].astype(np.int64).T
        return start + (end - start - 1) // block_size * block_size

    def row_lengths(
        self,
        block_size: int,
        *,
        turns: str = "all",
        options: RowOptions = PLAIN_ROW,
    ) -> np.ndarray:
        """Tokens of every sample's training row, ``[n]`` int64; arguments as ``BlockDiffusionCollator``'s."""
        sizes = (self.responses[:, 1] - self.responses[:, 0]).astype(np.int64)
        padded = -(-sizes // block_size) * block_size
        last = self.response_edges[1:] - 1
        noisy = padded[last] if turns == "last" else np.add.reduceat(padded, self.response_edges[:-1])
        if options.next_token:
            kept = self.responses[last, 1].astype(np.int64)
        else:
            kept = self._kept(options.anchor_block_size or block_size)
        return kept + options.noisy_copies * noisy

    def vision_tokens(self, block_size: int, *, options: RowOptions = PLAIN_ROW) -> np.ndarray:
        """Image and video tokens of every sample's training row, ``[n]`` int64."""
        owner = np.repeat(np.arange(len(self)), np.diff(self.media_edges))
        laid_out = self.media[:, 0] < self._kept(options.anchor_block_size or block_size)[owner]
        counts = np.bincount(owner, weights=self.media[:, 1] * laid_out, minlength=len(self))
        return counts.astype(np.int64)

    def save(self, path: Path) -> None:
        """Write the file, at once or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f"{path.stem}.{os.getpid()}.unfinished.npz")
        np.savez(unfinished, **{field.name: getattr(self, field.name) for field in fields(self)})
        unfinished.replace(path)

    @classmethod
    def load(cls, path: Path) -> SampleSizes:
        """Read a file written by ``save``.

        Raises:
            ValueError: If it cannot be read.
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls(**{field.name: file[field.name] for field in fields(cls)})
        except (OSError, KeyError, ValueError, BadZipFile) as error:
            raise ValueError(f"{path} cannot be read ({' '.join(str(error).split())}); delete it") from error


class Outliner:
    """From the number of a sample to its outline.

    Args:
        dataset: Sized and map-style, perhaps with ``peek``.
        collator: What will lay the samples out.
        drop_bad: Give a sample that cannot be used a response of ``UNKNOWN_LENGTH`` instead of raising.
    """

    def __init__(self, dataset: Any, collator: BlockDiffusionCollator, *, drop_bad: bool) -> None:
        self.collator, self.drop_bad = collator, drop_bad
        self.read = getattr(dataset, "peek", dataset.__getitem__)

    def __call__(self, index: int) -> Outline:
        """The outline of a sample."""
        try:
            return self.collator.outline(self.read(index))
        except ERRORS:
            if self.drop_bad:
                return Outline([(0, UNKNOWN_LENGTH)], [])
            raise


def last_line_of_worker_error(error: ValueError) -> ValueError:
    """The error that a user needs from one that a data loader's worker sent, whose message is its traceback."""
    lines = str(error).strip().splitlines()
    if not lines or "DataLoader worker" not in lines[0]:
        return error
    return ValueError(lines[-1].removeprefix("ValueError: "))


def measure(
    dataset: Any,
    collator: BlockDiffusionCollator,
    *,
    num_workers: int = 0,
    drop_bad: bool = False,
    ranks: Ranks | None = None,
) -> SampleSizes:
    """Measure every sample of a data set.

    Args:
        dataset: Sized and map-style. If it has ``peek(index)``, that is read instead of an item: the same with images
            that know their ``size`` only.
        collator: What will lay the samples out.
        num_workers: Processes of each rank that measure.
        drop_bad: Give a sample that cannot be used a response of ``UNKNOWN_LENGTH`` instead of raising.
        ranks: Who shares the work; this process alone if None.

    Returns:
        The sizes, in the data set's order.

    Raises:
        ValueError: If a sample cannot be trained on; names it.
        RunError: As ``Ranks.exchange``.
    """
    outline = Outliner(dataset, collator, drop_bad=drop_bad)
    parts = deal_out(
        outline,
        len(dataset),
        join=SampleSizes.from_outlines,
        ranks=ranks,
        num_workers=num_workers,
        doing="measuring samples",
    )
    return SampleSizes.join(parts)


def measured_once(
    dataset: Any,
    collator: BlockDiffusionCollator,
    cache_dir: Path,
    *,
    num_workers: int = 0,
    drop_bad: bool = False,
    ranks: Ranks | None = None,
) -> tuple[SampleSizes, Path | None]:
    """``measure``, or what an earlier call wrote into ``cache_dir`` for the same data set and processor.

    Args:
        dataset: With ``fingerprint()``, a text that changes with its samples; without, nothing is kept.
        collator: See ``measure``.
        cache_dir: Folder of the files; made if needed, read and written by the first rank only.
        num_workers: See ``measure``.
        drop_bad: Likewise. Without, a file in which samples could not be measured does not count.
        ranks: Likewise.

    Returns:
        The sizes, and their file (None if nothing is kept).

    Raises:
        ValueError: As ``measure``, and if the file cannot be read or written, or holds another number of samples.
        RunError: As ``Ranks.exchange``.
    """
    ranks = ranks or Ranks()
    if not hasattr(dataset, "fingerprint"):
        if ranks.rank == 0:
            name = type(dataset).__name__
            logger.warning("%s has no fingerprint(): its samples are measured at every start", name)
        return measure(dataset, collator, num_workers=num_workers, drop_bad=drop_bad, ranks=ranks), None
    doing = "reading measured lengths"
    path = ranks.on_first(lambda: cache_dir / lengths_name(dataset.fingerprint(), collator), doing)
    sizes = ranks.on_first(lambda: kept_sizes(path, len(dataset)), doing)
    if sizes is not None and (drop_bad or not sizes.has_unknown()):
        return sizes, path
    sizes = measure(dataset, collator, num_workers=num_workers, drop_bad=drop_bad, ranks=ranks)
    ranks.on_first(lambda: sizes.save(path), "writing measured lengths")
    logger.info("lengths of %d samples written to %s", len(sizes), path)
    return sizes, path


def kept_sizes(path: Path, num_samples: int) -> SampleSizes | None:
    """What a file of lengths holds, None if there is none.

    Raises:
        ValueError: If it cannot be read, or holds another number of samples.
    """
    if not path.is_file():
        return None
    sizes = SampleSizes.load(path)
    if len(sizes) != num_samples:
        raise ValueError(f"{path} holds {len(sizes)} samples, the data set {num_samples}; delete the file")
    return sizes


def lengths_name(fingerprint: str, collator: BlockDiffusionCollator, *, processor: str | None = None) -> str:
    """Name of the file that holds the sizes of a data set's samples.

    Args:
        fingerprint: The data set's.
        collator: What measured, or will measure, them.
        processor: Its ``processor_digest``, for who asks for many names.
    """
    return f"lengths-{_digest((FORMAT, fingerprint, processor or processor_digest(collator)))[:16]}.npz"


def processor_digest(collator: BlockDiffusionCollator) -> str:
    """Digest of all that an outline depends on besides the sample."""
    processor, config = collator.processor, collator.config
    return _digest(
        (
            json.dumps(processor.chat_template, sort_keys=True),
            processor.tokenizer.backend_tokenizer.to_str(),
            *(getattr(processor, name).to_json_string() for name in ("image_processor", "video_processor")),
            config.assistant_header_ids,
            config.end_ids,
            config.image_token_id,
            config.video_token_id,
            vision_section(config).spatial_merge_size,
        )
    )


def _digest(parts: Iterable[object]) -> str:
    return hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()
