"""Attention masks of a training batch, made on its device from per-token ids: dense, or a flex ``BlockMask``.

``layout.may_attend`` says who sees whom; both forms evaluate it. The workers send ids alone, ``O(L)`` per row.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from nemo_bard.method.layout import PADDING, TokenIds, attention_mask, check_context_attention, may_attend
from nemo_bard.model.attention import NAME
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.upstream.transformers import attn_implementation, text_section

FLEX_TILE = 128
"""Rows and columns of a tile of a ``BlockMask``; on the flex path rows are padded to a multiple of it."""
FLEX_SHORTEST_ROW = 2 * FLEX_TILE
"""A row of a single tile would take a graph of its own."""
STRIP_TILES = 4
"""Tiles of queries whose pairs exist at once while a ``BlockMask`` is built."""

MaskMod = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def uses_flex(config: BardVLConfig, device: torch.device) -> bool:
    """Whether a model with this configuration trains with flex_attention: backend ``bard`` on CUDA.

    flex_attention has no backward on CPU.
    """
    return device.type == "cuda" and attn_implementation(text_section(config)) == NAME


def make_mask(batch: Mapping[str, Any], config: BardVLConfig) -> Tensor | BlockMask:
    """The mask of a microbatch in the form that the model's attention backend takes on the device of its ids."""
    if uses_flex(config, batch["input_ids"].device):
        return block_mask(batch, config.context_attention)
    return dense_mask(batch, config.context_attention)


def dense_mask(batch: Mapping[str, Any], context_attention: str) -> Tensor:
    """Attention mask of a microbatch on the device of its ids, ``[N, 1, L, L]`` bool.

    Tokens of no sample (row padding) see themselves, because some attention kernels give NaN for a row without keys;
    nobody sees them.
    """
    order = torch.arange(batch["input_ids"].shape[1], device=batch["input_ids"].device)
    ids = TokenIds(batch["sample_ids"], batch["branch_ids"], batch["block_ids"], order.expand_as(batch["input_ids"]))
    allowed = attention_mask(ids, ids, context_attention=context_attention)
    idle = torch.diag_embed(batch["sample_ids"] == PADDING)
    return (allowed | idle).unsqueeze(1)


def mask_mod(batch: Mapping[str, Any], context_attention: str) -> MaskMod:
    """The same mask as a function of (row, head, query index, key index), for flex_attention.

    Args:
        batch: Holds ``sample_ids``, ``branch_ids`` and ``block_ids``, each ``[N, L]``.
        context_attention: ``block`` or ``causal``.

    Raises:
        ValueError: If ``context_attention`` is unknown.
    """
    check_context_attention(context_attention)
    # int32: the kernel reads the ids of every pair inside a tile that is neither empty nor full
    sample, branch, block = (batch[f"{name}_ids"].int() for name in ("sample", "branch", "block"))

    def allowed(row: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        del head
        query = TokenIds(sample[row, q], branch[row, q], block[row, q], q)
        key = TokenIds(sample[row, k], branch[row, k], block[row, k], k)
        idle = (query.sample == PADDING) & (q == k)
        return may_attend(query, key, context_attention=context_attention) | idle

    return allowed


def block_mask(batch: Mapping[str, Any], context_attention: str) -> BlockMask:
    """Attention mask of a microbatch for flex_attention, one for all heads, on the device of its ids.

    What ``create_block_mask`` builds, a few tiles of queries at a time, so that there is never an ``[L, L]`` tensor
    (compiled or not, ``create_block_mask`` writes one). Inside tiles that are neither empty nor full the kernel evaluates
    ``mask_mod`` again.

    Args:
        batch: See ``mask_mod``.
        context_attention: ``block`` or ``causal``.

    Returns:
        A mask of shape ``[N, 1, L, L]``.
    """
    rows, length = batch["sample_ids"].shape
    device = batch["sample_ids"].device
    allowed = mask_mod(batch, context_attention)
    row, keys = torch.arange(rows, device=device).view(-1, 1, 1), torch.arange(length, device=device)
    tiles = -(-length // FLEX_TILE)
    some, every = (torch.zeros(rows, tiles, tiles, dtype=torch.bool, device=device) for _ in range(2))
    for first in range(0, tiles, STRIP_TILES):
        strip = slice(first * FLEX_TILE, min((first + STRIP_TILES) * FLEX_TILE, length))
        pairs = allowed(row, row, keys[strip].view(1, -1, 1), keys.view(1, 1, -1))
        missing = (0, -pairs.shape[2] % FLEX_TILE, 0, -pairs.shape[1] % FLEX_TILE)
        pairs = nn.functional.pad(pairs, missing).unflatten(2, (-1, FLEX_TILE)).unflatten(1, (-1, FLEX_TILE))
        some[:, first : first + STRIP_TILES] = pairs.any(4).any(2)
        every[:, first : first + STRIP_TILES] = pairs.all(4).all(2)
    return BlockMask.from_kv_blocks(
        *_ordered(some & ~every),
        *_ordered(every),
        BLOCK_SIZE=FLEX_TILE,
        mask_mod=allowed,
        seq_lengths=(length, length),
    )


def _ordered(tiles: Tensor) -> tuple[Tensor, Tensor]:
    """Number of True key tiles of each query tile ``[N, 1, T]``, and their indices first ``[N, 1, T, T]``; int32."""
    number = tiles.sum(-1).int()
    return number.unsqueeze(1), tiles.int().argsort(dim=-1, descending=True, stable=True).int().unsqueeze(1)
