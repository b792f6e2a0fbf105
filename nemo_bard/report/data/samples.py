"""A few samples of a data set, as training sees them: texts, images, tokens and what of them is supervised."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from nemo_bard.base.errors import one_line
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.encode import encode
from nemo_bard.data.rejects import ERRORS
from nemo_bard.data.survey.measure import choose
from nemo_bard.data.survey.sources import Source
from nemo_bard.method.layout import SampleLayout, context_block_ids, find_responses, sample_layout

REPLACEMENT = "\ufffd"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Tokens that are shown together."""

    text: str
    tokens: int
    supervised: bool
    block: int = -1
    """Of the first one; -1 where blocks are not told apart."""
    media: bool = False
    """Whether they stand for an image or a video."""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A sample to show."""

    source: str
    where: str
    id: str | None
    images: list[Image.Image] = field(default_factory=list)
    turns: list[tuple[str, str]] = field(default_factory=list)
    """Role and text; images as ``<image>``."""
    pieces: list[Piece] = field(default_factory=list)
    """The context's tokens, in order; empty without a processor."""
    layout: SampleLayout | None = None
    """Its training row; None without a processor."""
    problem: str | None = None
    """Why it cannot be used, or None."""


def pick_samples(
    sources: list[Source], collator: BlockDiffusionCollator | None, *, number: int, seed: int
) -> list[Shown]:
    """Take samples from all sources in turn.

    Args:
        sources: At least one.
        collator: Tokenises and lays out; None for texts alone.
        number: How many samples, as far as there are.
        seed: Which.
    """
    chosen = [choose(source.rows, number, seed).tolist() for source in sources]
    turns = [(place, own) for place in range(number) for own in range(len(sources)) if place < len(chosen[own])]
    return [show_sample(sources[own], chosen[own][place], collator) for place, own in turns[:number]]


def show_sample(source: Source, index: int, collator: BlockDiffusionCollator | None) -> Shown:
    """Read one sample and lay it out; one that cannot be used says why."""
    try:
        told = source.describe(index)
    except ERRORS:  # what tells where it is may be what is damaged
        told = {"source": f"{source.name}:{index}", "id": None}
    facts: dict[str, Any] = {"source": source.name, "where": str(told["source"]), "id": told["id"]}
    try:
        item = source.data[index]
        facts["turns"], facts["images"] = read_turns(item["conversation"])
        if collator is not None:
            facts["pieces"], facts["layout"] = lay_out(item, collator)
    except ERRORS as error:
        facts["problem"] = one_line(error)
    return Shown(**facts)


def read_turns(conversation: list[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[Image.Image]]:
    """Role and text of the turns, and the images in order."""
    turns, images = [], []
    for message in conversation:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts]
        images += [part["image"] for part in parts if part["type"] == "image"]
        turns.append((message["role"], "".join(texts)))
    return turns, images


def lay_out(item: dict[str, Any], collator: BlockDiffusionCollator) -> tuple[list[Piece], SampleLayout]:
    """Tokens of an item's conversation with what is supervised, and its training row.

    Raises:
        ValueError: If it cannot be trained on.
    """
    collator.outline(item)
    ids = encode(collator.processor, [item["conversation"]])["input_ids"][0]
    config = collator.config
    responses = find_responses(ids, config.assistant_header_ids, config.end_ids)
    chosen = responses if collator.turns == "all" else responses[-1:]
    supervised = torch.zeros(len(ids), dtype=torch.bool)
    for start, end in chosen:
        supervised[start:end] = True
    blocks = context_block_ids(len(ids), responses, collator.block_size)
    row = sample_layout(
        len(ids),
        responses,
        collator.block_size,
        supervised=None if collator.turns == "all" else [len(responses) - 1],
        options=collator.options,
    )
    media = (ids == config.image_token_id) | (ids == config.video_token_id)
    return _pieces(ids, supervised, blocks, media, collator.processor.tokenizer), row


def _pieces(
    ids: torch.Tensor, supervised: torch.Tensor, blocks: torch.Tensor, media: torch.Tensor, tokenizer: Any
) -> list[Piece]:
    """Runs of context together, supervised tokens one by one, bytes of a character that several tokens make together."""
    pieces, place = [], 0
    flags = list(zip(supervised.tolist(), media.tolist(), strict=True))
    while place < len(ids):
        is_supervised, is_media = flags[place]
        end = place + 1
        if not is_supervised:
            while end < len(ids) and flags[end] == flags[place]:
                end += 1
        text = _decode(tokenizer, ids[place:end])
        while is_supervised and REPLACEMENT in text and end < min(len(ids), place + 8) and flags[end] == flags[place]:
            longer = _decode(tokenizer, ids[place : end + 1])
            end += 1
            text = longer
        pieces.append(
            Piece(
                text=f"{end - place} tokens of an image or video" if is_media else text,
                tokens=end - place,
                supervised=is_supervised,
                block=int(blocks[place]) if is_supervised else -1,
                media=is_media,
            )
        )
        place = end
    return pieces


def _decode(tokenizer: Any, ids: torch.Tensor) -> str:
    return tokenizer.decode(ids.tolist(), skip_special_tokens=False)
