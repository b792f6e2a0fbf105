"""Looking at a part of a source: sizes of texts and images, and, with a processor, tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.collate import BlockDiffusionCollator, Outline
from nemo_bard.data.lengths import SampleSizes, kept_sizes, lengths_name
from nemo_bard.data.ranks import deal_out
from nemo_bard.data.rejects import ERRORS
from nemo_bard.data.survey.sources import Source


class Glance(NamedTuple):
    """What is seen of one sample."""

    words: int
    """Of all turns."""
    response_words: int
    """Of the assistant's turns."""
    characters: int
    turns: int
    """Turns of user and assistant."""
    images: int


class Unusable(NamedTuple):
    """A row that cannot be used."""

    row: int
    where: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What was seen of a source."""

    looked: int
    """Rows that were looked at."""
    glances: np.ndarray
    """``[n, 5]`` int64, the fields of ``Glance`` of those that can be used."""
    pixels: np.ndarray
    """Of each of their images, ``[images]`` int64."""
    unusable: list[Unusable]
    sizes: SampleSizes | None
    """In tokens; None without a processor."""
    sizes_of_all: bool
    """Whether ``sizes`` is of every sample of the source, rather than of those that were looked at."""

    def column(self, name: str) -> np.ndarray:
        """One field of ``Glance``, ``[n]`` int64."""
        return self.glances[:, Glance._fields.index(name)]


class Seen(NamedTuple):
    """A sample that can be used."""

    glance: Glance
    pixels: list[int]
    """Of each image."""
    outline: Outline | None
    """None without a processor."""


def glance(item: dict[str, Any]) -> tuple[Glance, list[int]]:
    """Count words and turns of an item of a data set, and the pixels of each of its images."""
    words = response_words = characters = turns = 0
    pixels = []
    for message in item["conversation"]:
        content = message["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        turns += message["role"] != "system"
        for part in parts:
            if part["type"] == "text":
                count = len(part["text"].split())
                words += count
                characters += len(part["text"])
                response_words += count * (message["role"] == "assistant")
            elif part["type"] == "image":
                width, height = part["image"].size
                pixels.append(width * height)
    return Glance(words, response_words, characters, turns, len(pixels)), pixels


class _Look:
    """From the place of a row among those to be looked at to what is seen of it; travels to other processes."""

    def __init__(self, source: Source, chosen: np.ndarray, collator: BlockDiffusionCollator | None) -> None:
        self.source, self.chosen, self.collator = source, chosen, collator

    def __call__(self, place: int) -> Seen | Unusable:
        index = int(self.chosen[place])
        try:
            item = self.source.peek(index)
            return Seen(*glance(item), None if self.collator is None else self.collator.outline(item))
        except ERRORS as error:
            return Unusable(index, self._where(index), one_line(error))

    def _where(self, index: int) -> str:
        try:
            return str(self.source.describe(index)["source"])
        except ERRORS:  # what tells where it is may be what is damaged
            return f"{self.source.name}:{index}"


def choose(rows: int, most: int | None, seed: int) -> np.ndarray:
    """A seeded part of the rows.

    Args:
        rows: How many there are.
        most: How many to take; all if None.
        seed: The same seed takes the same rows.

    Returns:
        Row numbers in order, ``[min(rows, most)]`` int64.
    """
    if most is None or most >= rows:
        return np.arange(rows, dtype=np.int64)
    return np.sort(np.random.default_rng(seed).choice(rows, size=most, replace=False)).astype(np.int64)


def measure(
    source: Source, collator: BlockDiffusionCollator | None, *, most: int | None, seed: int, jobs: int = 1
) -> Measured:
    """Look at a seeded part of a source.

    Args:
        source: What to look at; pixels stay unread where sizes are known.
        collator: Counts tokens; None for words and characters alone. Lengths that lie in a prepared folder for the same
            processor are used, of all samples.
        most: Rows to look at; all if None.
        seed: Which.
        jobs: Processes.

    Returns:
        What was seen; rows that cannot be used are listed.
    """
    kept = None
    if collator is not None and source.folder is not None:
        kept = kept_sizes(source.folder / lengths_name(source.data.fingerprint(), collator), source.rows)
    chosen = choose(source.rows, most, seed)
    look = _Look(source, chosen, None if kept is not None else collator)
    workers, doing = jobs if jobs > 1 else 0, f"looking at {source.name}"
    parts = deal_out(look, len(chosen), join=list, num_workers=workers, doing=doing) if len(chosen) else []
    seen = [one for part in parts for one in part]
    usable = [one for one in seen if not isinstance(one, Unusable)]
    sizes = kept
    if kept is None and collator is not None:
        sizes = SampleSizes.from_outlines([one.outline for one in usable if one.outline is not None])
    return Measured(
        looked=len(chosen),
        glances=np.array([one.glance for one in usable], dtype=np.int64).reshape(-1, len(Glance._fields)),
        pixels=np.array([count for one in usable for count in one.pixels], dtype=np.int64),
        unusable=[one for one in seen if isinstance(one, Unusable)],
        sizes=sizes,
        sizes_of_all=kept is not None or (sizes is not None and len(chosen) == source.rows),
    )
