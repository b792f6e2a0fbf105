"""How a response came about: the denoising step by step, as plain data that pages and pictures are drawn from."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from nemo_bard.data.conversation import MediaSource

MASK_TEXT = "\u2592"
"""What stands for a masked token in plain text."""


@dataclass(frozen=True, kw_only=True)
class Change:
    """A step fixed or replaced one token."""

    position: int
    """Place in the response, from 0."""
    text: str
    confidence: float
    """Probability of the token when it was chosen."""
    revised: bool
    """Whether it replaced a token that was visible before."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One denoising step of the row."""

    block: int
    """From 0."""
    step: int
    """Within the block, from 0."""
    changes: list[Change]
    proposals: dict[int, float]
    """Probability of the best token at positions that stayed masked."""
    text: str
    """The response after this step, ``MASK_TEXT`` for each masked token of the current block."""


@dataclass(frozen=True, kw_only=True)
class Trace:
    """Everything that the pictures show."""

    block_size: int
    tokens: list[str]
    """Final text of each token, whole blocks; what follows ``length`` was decoded but is not part of the response."""
    length: int
    """Response tokens, the end token included."""
    steps: list[Step]
    text: str
    """The whole response."""
    prompt: list[tuple[str, str]] = field(default_factory=list)
    """Role and text of the turns before, media as ``<image>`` and ``<video>``."""
    images: list[Image.Image] = field(default_factory=list)
    forwards: int | None = None
    """Forwards, where there are fewer than steps: in next-token decoding one can find tokens of several blocks."""

    @property
    def num_forwards(self) -> int:
        """Forwards that found tokens."""
        return len(self.steps) if self.forwards is None else self.forwards

    @property
    def tpf(self) -> float:
        """Response tokens per denoising forward."""
        return self.length / self.num_forwards

    @property
    def max_steps(self) -> int:
        """Most steps that a block took."""
        return max(step.step for step in self.steps) + 1


def make_trace(
    output: Any,
    tokenizer: Any,
    *,
    row: int = 0,
    conversation: Sequence[dict[str, Any]] = (),
) -> Trace:
    """Build a trace from what ``generate`` returned.

    Args:
        output: A ``BardGenerateOutput`` made with ``return_dict_in_generate=True, output_history=True``.
        tokenizer: The tokenizer of the model.
        row: Row of the batch.
        conversation: The prompt's turns, for display; images as PIL.

    Returns:
        The trace.

    Raises:
        ValueError: If the output has no history or no such row.
    """
    if not output.history:
        raise ValueError("generate returned no history; pass return_dict_in_generate=True, output_history=True")
    rows = len(output.lengths)
    if not 0 <= row < rows:
        raise ValueError(f"row must be 0 to {rows - 1}, got {row}")
    length = int(output.lengths[row])
    records = [record for record in output.history if row in record.rows]
    size = records[0].ids.shape[1]
    canvas: list[int | None] = [None] * (size * (records[-1].block + 1))
    steps = []
    for record in records:
        index = record.rows.index(row)
        begin = record.block * size
        changes, proposals = [], {}
        for offset in range(size):
            position = begin + offset
            token, confidence = int(record.ids[index, offset]), float(record.confidence[index, offset])
            if bool(record.fixed[index, offset]):
                changes.append(
                    Change(
                        position=position,
                        text=_token_text(tokenizer, token),
                        confidence=confidence,
                        revised=canvas[position] is not None,
                    )
                )
                canvas[position] = token
            elif canvas[position] is None and math.isfinite(confidence):
                proposals[position] = confidence
        text = _canvas_text(tokenizer, canvas[: min(begin + size, length)])
        steps.append(Step(block=record.block, step=record.step, changes=changes, proposals=proposals, text=text))
    prompt, images = _describe_prompt(conversation)
    return Trace(
        block_size=size,
        tokens=["" if token is None else _token_text(tokenizer, token) for token in canvas],
        length=length,
        steps=steps,
        text=tokenizer.decode(output.sequences[row, :length].tolist(), skip_special_tokens=True),
        prompt=prompt,
        images=images,
        forwards=int(output.block_step_counts[row].sum()),
    )


def _token_text(tokenizer: Any, token: int) -> str:
    return tokenizer.decode([token], skip_special_tokens=False)


def _canvas_text(tokenizer: Any, canvas: Sequence[int | None]) -> str:
    """Decode runs of visible tokens together, so that characters of several tokens come out whole."""
    parts: list[str] = []
    run: list[int] = []
    for token in [*canvas, None]:
        if token is not None:
            run.append(token)
            continue
        if run:
            parts.append(tokenizer.decode(run, skip_special_tokens=True))
            run = []
        parts.append(MASK_TEXT)
    return "".join(parts[:-1])


def _describe_prompt(conversation: Sequence[dict[str, Any]]) -> tuple[list[tuple[str, str]], list[Image.Image]]:
    turns, images = [], []
    for message in conversation:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            if part["type"] == "text":
                text += part["text"]
                continue
            text += f"<{part['type']}>"
            if part["type"] == "image":
                image = part["image"]
                images.append(image.open_image() if isinstance(image, MediaSource) else image)
        turns.append((message["role"], text))
    return turns, images
