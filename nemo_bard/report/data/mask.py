"""Who may attend to whom in a training row, drawn from ``layout.attention_mask`` itself."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from nemo_bard.method.layout import NOISY, SampleLayout, TokenIds, attention_mask

MOST_TOKENS = 512
"""A row of more tokens is drawn with one line per block, all of whose tokens see the same."""
MOST_LINES = 1536
"""Of blocks; beyond, every second, third, ... one is drawn."""
PIXELS = 640
"""Least side of a picture."""
CONTEXT_COLOR, EARLIER_COLOR, OWN_COLOR, EDGE_COLOR = (
    (68, 119, 170, 255),
    (34, 136, 51, 255),
    (204, 102, 119, 255),
    (138, 147, 158, 110),
)
"""A context token sees context; a noisy token sees context; it sees its own block; where the noisy copies begin."""


class MaskPicture(NamedTuple):
    """A picture of a mask, and what its lines are."""

    image: Image.Image
    unit: str


def draw_mask(layout: SampleLayout, *, context_attention: str = "block") -> MaskPicture:
    """Draw the mask of a training row: queries from top to bottom, keys from left to right.

    Args:
        layout: The row.
        context_attention: See ``layout.attention_mask``.

    Returns:
        A picture with a transparent ground, and what one of its lines stands for.
    """
    chosen, unit = _chosen(layout, context_attention)
    branch, block = layout.branch[chosen], layout.block[chosen]
    ids = TokenIds(torch.zeros_like(branch), branch, block, chosen)
    seen = attention_mask(ids, ids, context_attention=context_attention).numpy()
    noisy = (branch == NOISY).numpy()
    pixels = np.zeros((*seen.shape, 4), dtype=np.uint8)
    pixels[seen] = CONTEXT_COLOR
    pixels[seen & noisy[:, None]] = EARLIER_COLOR
    pixels[seen & noisy[:, None] & noisy[None, :]] = OWN_COLOR
    scale = max(1, -(-PIXELS // len(pixels)))
    pixels = pixels.repeat(scale, 0).repeat(scale, 1)
    if noisy.any():
        first = int(noisy.argmax()) * scale
        for line in (pixels[first], pixels[:, first]):
            line[line[:, 3] == 0] = EDGE_COLOR
    return MaskPicture(Image.fromarray(pixels, "RGBA"), unit)


def _chosen(layout: SampleLayout, context_attention: str) -> tuple[torch.Tensor, str]:
    """Tokens whose lines are drawn, and what they stand for."""
    if len(layout) <= MOST_TOKENS:
        return torch.arange(len(layout)), "token"
    runs = torch.stack([layout.branch, layout.block])
    starts = torch.cat([torch.ones(1, dtype=torch.bool), (runs[:, 1:] != runs[:, :-1]).any(0)]).nonzero().flatten()
    step = -(-len(starts) // MOST_LINES)
    unit = "block" if step == 1 else f"{step} blocks"
    return starts[::step], unit if context_attention == "block" else f"first token of {unit}"


def png_uri(image: Image.Image) -> str:
    """A picture as a ``data:`` address."""
    stream = io.BytesIO()
    image.save(stream, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
