"""The attention backend ``bard``: transformers' ``sdpa``, without repeating keys and values, and flex block masks.

Registered under that name with transformers. With a dense mask transformers' ``sdpa`` copies the whole cache once per
query-head group and layer; here the heads of a group share it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "bard"
MAX_FOLDED_QUERIES = 128


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """Return flex_attention compiled (CUDA; it has no CPU backward).

    Shapes become dynamic once they change: rows of many lengths must not reach the limit of recompilations, beyond
    which flex_attention would run uncompiled, with all scores in memory.
    """
    return torch.compile(flex_attention)


def bard_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, None]:
    """Attend with a dense bool mask or a flex ``BlockMask``.

    Args:
        module: The attention layer.
        query: ``[N, H, Q, D]``.
        key: ``[N, Hkv, K, D]``.
        value: ``[N, Hkv, K, D]``.
        attention_mask: Bool ``[N, 1, Q, K]``, a ``BlockMask``, or None (then as transformers' ``sdpa``).
        scaling: Factor on the scores, ``1 / sqrt(D)`` if None.
        dropout: Dropout probability.
        **kwargs: Passed on to transformers' ``sdpa``.

    Returns:
        ``[N, Q, H, D]`` and None.
    """
    groups = query.shape[1] // key.shape[1]
    if isinstance(attention_mask, BlockMask):
        attend = compiled_flex() if query.is_cuda else flex_attention
        # Under autocast the norms of queries and keys leave them in float32; flex_attention wants one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = attend(query, key, value, block_mask=attention_mask, scale=scaling, enable_gqa=groups > 1)
        return out.transpose(1, 2).contiguous(), None
    if not isinstance(attention_mask, Tensor) or groups == 1:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows, heads, length, size = query.shape
    if query.is_cuda and length <= MAX_FOLDED_QUERIES:
        # CUDA's masked kernels know no grouped heads; the queries of a group become one longer query instead.
        folded = query.reshape(rows, heads // groups, groups * length, size)
        out = nn.functional.scaled_dot_product_attention(
            folded, key, value, attn_mask=attention_mask.repeat(1, 1, groups, 1), dropout_p=dropout, scale=scaling
        ).reshape(rows, heads, length, size)
    elif query.is_cuda:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    else:
        out = nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=_additive(attention_mask, query.dtype),
            dropout_p=dropout,
            scale=scaling,
            enable_gqa=True,
        )
    return out.transpose(1, 2).contiguous(), None


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """The bool mask as 0 and -inf, made once for all layers of a forward.

    PyTorch's CPU kernel makes the same of a bool mask, once for each layer, and autograd keeps all of them.
    """
    if mask.dtype != torch.bool:
        return mask
    kept = getattr(mask, "_additive", None)
    if kept is None or kept.dtype != dtype:
        kept = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, float("-inf"))
        mask._additive = kept  # lives as long as the mask
    return kept


AttentionInterface.register(NAME, bard_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
