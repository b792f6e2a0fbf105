"""The attention backend ``bard``: transformers' ``sdpa``, without repeating keys and values, and flex block masks.

Registered under that name with transformers. With a dense mask transformers' ``sdpa`` copies the whole cache once per
query-head group and layer; here the heads of a group share it. Training on a CPU leaves out the parts of a dense mask in
which nobody sees anybody: half of a sample's, and nearly all between the samples of a packed row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from nemo_bard.base.copies import own_name
from nemo_bard.model.sequences import Sequences, sequence_attention
from nemo_bard.upstream.torch import cpu_attention, cpu_attention_backward

NAME = own_name("bard", __name__)
MAX_FOLDED_QUERIES = 128
FLEX_GRAPHS = 32
"""Most graphs of flex_attention in a process; a chain of stages takes about 10 (tests/unit/test_flex.py)."""
STRIP_QUERIES = 256
"""Queries of a strip of a training row on CPU; shorter rows are not worth cutting."""
STRIP_KEYS = 64
"""Keys that a strip takes or leaves out together."""


def fused_flex(query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, scale: float | None) -> Any:
    """flex_attention under a code object of our own, so that nobody else's graphs count as ours."""
    grouped = query.shape[1] != key.shape[1]
    return flex_attention(query, key, value, block_mask=block_mask, scale=scale, enable_gqa=grouped)


def compile_flex(backend: str | Callable[..., Any] = "inductor") -> Callable[..., Tensor]:
    """Compile ``fused_flex``.

    Shapes become dynamic once they change, so rows of many lengths share a graph. Beyond ``FLEX_GRAPHS`` graphs a call
    raises: flex_attention would run uncompiled, with all scores in memory, and say so in a warning only.

    Args:
        backend: Of ``torch.compile``.
    """
    make: Any = torch.compile  # its annotations lack the limit
    return make(fused_flex, backend=backend, fullgraph=True, recompile_limit=FLEX_GRAPHS)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """``compile_flex`` for all models of a process (CUDA; flex_attention has no CPU backward)."""
    return compile_flex()


def bard_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sequences: Sequences | None = None,
    **kwargs: Any,
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
        sequences: What a row is made of, in place of a mask: the frames of the vision tower.
        **kwargs: Passed on to transformers' ``sdpa``.

    Returns:
        ``[N, Q, H, D]`` and None.
    """
    if sequences is not None:
        return sequence_attention(module, query, key, value, sequences, scaling=scaling, dropout=dropout, **kwargs)
    groups = query.shape[1] // key.shape[1]
    if isinstance(attention_mask, BlockMask):
        attend = compiled_flex() if query.is_cuda else fused_flex
        # Under autocast the norms of queries and keys leave them in float32; flex_attention wants one dtype.
        query, key = query.to(value.dtype), key.to(value.dtype)
        out = attend(query, key, value, attention_mask, scaling)
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
    elif (
        torch.is_grad_enabled()
        and attention_mask.dtype == torch.bool
        and STRIP_QUERIES < length == key.shape[2]
        and dropout == 0.0
    ):
        if torch.is_autocast_enabled("cpu"):
            query, key, value = (x.to(torch.get_autocast_dtype("cpu")) for x in (query, key, value))
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        out = _StripAttention.apply(query, key, value, _strips(attention_mask, query.dtype), scale)
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
        owner: Any = mask
        owner._additive = kept  # lives as long as the mask
    return kept


class _Strip(NamedTuple):
    """Consecutive queries, and the keys that any of them sees."""

    queries: slice
    keys: tuple[slice, ...]
    mask: Tensor
    """0 and -inf, ``[N, 1, queries, keys]``."""

    def gather(self, x: Tensor) -> Tensor:
        """The strip's keys or values, ``[N, Hkv, keys, D]``."""
        parts = [x[:, :, part] for part in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def add_to(self, total: Tensor, x: Tensor) -> None:
        """Add ``[N, Hkv, keys, D]`` to where the keys came from."""
        sizes = [part.stop - part.start for part in self.keys]
        for part, piece in zip(self.keys, x.split(sizes, 2), strict=True):
            total[:, :, part] += piece


def _strips(mask: Tensor, dtype: torch.dtype) -> list[_Strip]:
    """Cut a bool mask ``[N, 1, L, L]`` into strips, once for all layers of a forward."""
    kept = getattr(mask, "_strips", None)
    if kept is not None and kept[0].mask.dtype == dtype:
        return kept
    seen = mask.any(0).any(0)
    length, strips = len(seen), []
    for start in range(0, length, STRIP_QUERIES):
        rows = slice(start, min(start + STRIP_QUERIES, length))
        some = nn.functional.pad(seen[rows].any(0), (0, -length % STRIP_KEYS)).unflatten(0, (-1, STRIP_KEYS)).any(1)
        edges = torch.diff(some.int(), prepend=torch.zeros(1), append=torch.zeros(1)).nonzero().flatten() * STRIP_KEYS
        keys = tuple(slice(a, min(b, length)) for a, b in edges.view(-1, 2).tolist()) or (slice(0, STRIP_KEYS),)
        part = torch.cat([mask[:, :, rows, columns] for columns in keys], 3)
        additive = torch.zeros(part.shape, dtype=dtype).masked_fill_(~part, float("-inf"))
        strips.append(_Strip(rows, keys, additive))
    owner: Any = mask
    owner._strips = strips  # lives as long as the mask
    return strips


class _StripAttention(torch.autograd.Function):
    """PyTorch's CPU kernel, strip by strip; the kernel and its backward are what autograd would call for the whole."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, strips: list[_Strip], scale: float) -> Tensor:
        """``[N, H, L, D]`` from the same, and ``[N, Hkv, L, D]``."""
        out, log_sums = query.new_empty(query.transpose(1, 2).shape).transpose(1, 2), []
        for strip in strips:
            part, log_sum = cpu_attention(
                query[:, :, strip.queries], strip.gather(key), strip.gather(value), strip.mask, scale
            )
            out[:, :, strip.queries] = part
            log_sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *log_sums)
        ctx.strips, ctx.scale = strips, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Gradients of keys and values are summed over the strips that see them."""
        query, key, value, out, *log_sums = ctx.saved_tensors
        query_grad = torch.empty_like(query)
        key_grad, value_grad = torch.zeros_like(key), torch.zeros_like(value)
        for strip, log_sum in zip(ctx.strips, log_sums, strict=True):
            rows = strip.queries
            inputs = (query[:, :, rows], strip.gather(key), strip.gather(value))
            of_query, of_key, of_value = cpu_attention_backward(
                grad[:, :, rows], inputs, out[:, :, rows], log_sum, strip.mask, ctx.scale
            )
            query_grad[:, :, rows] = of_query
            strip.add_to(key_grad, of_key)
            strip.add_to(value_grad, of_value)
        return query_grad, key_grad, value_grad, None, None


AttentionInterface.register(NAME, bard_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
