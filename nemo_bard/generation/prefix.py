"""Attention of decoding without a mask: every query sees a prefix of its row's cache, so that lengths are enough.

That holds for all of block diffusion's decoding. A token of the prompt sees its own and earlier blocks, a token of a finished
block likewise, a masked token all of the context and its own block; with ``context_attention: causal`` a context token sees
what does not come later. Queries that see the same prefix are a sequence of flash attention's kernel for sequences of many
lengths (``torch.nn.attention.varlen``): no mask of queries by keys exists, and no key is copied. Where that kernel cannot
run (CPU, float32), PyTorch's attention with a dense mask takes its place.
"""

from __future__ import annotations

import functools
import inspect
import logging
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache, CacheLayerMixin

from nemo_bard.base.copies import own_name

logger = logging.getLogger(__name__)

NAME = own_name("bard_prefix", __name__)
KERNEL_ARGUMENTS = ("seqused_k", "enable_gqa")
CHECK_TOLERANCE = 2e-2
"""Largest difference from PyTorch's attention on values of size 1; bfloat16 rounds to 1/256 of them."""


@dataclass(kw_only=True)
class Sequences:
    """Queries in groups that see the same prefix (or, causally, prefixes that grow by one), as the kernel takes them."""

    edges: Tensor
    """Where the queries of a sequence begin and end, ``[S + 1]`` int32."""
    starts: Tensor
    """Where the keys of its row begin in the cache, ``[S + 1]`` int32; the last one is not read."""
    used: Tensor
    """Keys that its last query sees, ``[S]`` int32."""
    longest: int
    """Most queries of a sequence."""
    causal: bool = False
    queries: Tensor | None = None
    """Flat indices of the queries that belong to the sequences, int64; all of them if None."""


@dataclass(kw_only=True)
class Prefix:
    """What the tokens of a forward see, and where their keys and values go; tensors are ``[N, Q]`` int64."""

    columns: Tensor
    """Column of the cache that a token's key and value are written to."""
    visible: Tensor
    """How many columns its query sees, at least 1."""
    width: int
    """No query sees more columns than this."""
    capacity: int
    """Columns of the cache."""
    sequences: list[Sequences] = field(default_factory=list)
    """The same for the kernel; empty if it is not to be used."""
    mask: Tensor | None = None
    """The same as a dense mask, ``[N, 1, Q, width]`` bool; made of ``visible`` if there are no ``sequences``."""

    def __post_init__(self) -> None:
        rows = torch.arange(len(self.columns), device=self.columns.device).unsqueeze(1)
        self.slots = (rows * self.capacity + self.columns).flatten()
        """Flat indices of ``columns`` in the cache of all rows, ``[N * Q]``."""
        if not self.sequences and self.mask is None:
            self.mask = (torch.arange(self.width, device=rows.device) < self.visible.unsqueeze(2)).unsqueeze(1)


class PrefixCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[N * capacity, Hkv, D]``, written in place where the forward's ``Prefix`` says."""

    is_compileable = True
    is_sliding = False

    def __init__(self, owner: PrefixCache) -> None:
        super().__init__()
        self.owner = owner

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for states like ``[T, Hkv, D]``; zeros, since a dense mask only weighs what nobody sees with 0."""
        slots = self.owner.rows * self.owner.capacity
        self.keys = key_states.new_zeros(slots, *key_states.shape[1:])
        self.values = value_states.new_zeros(slots, *value_states.shape[1:])
        self.is_initialized = True

    def write(self, slots: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write ``[T, Hkv, D]`` at flat indices ``[T]``; returns all keys and values there are."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
        assert self.keys is not None
        assert self.values is not None
        return self.keys.index_copy_(0, slots, keys), self.values.index_copy_(0, slots, values)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of ``[N]``."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = (
            x.unflatten(0, (-1, self.owner.capacity))[rows].flatten(0, 1) for x in (self.keys, self.values)
        )

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states ``[N, Hkv, Q, D]`` of the forward's tokens and return all there are, flat."""
        assert self.owner.prefix is not None
        keys, values = (x.transpose(1, 2).flatten(0, 1) for x in (key_states, value_states))
        return self.write(self.owner.prefix.slots, keys, values)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        del query_length
        return self.owner.capacity, 0

    def get_seq_length(self) -> int:
        """Unknown here: rows have lengths of their own."""
        return 0

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.owner.capacity


class PrefixCache(Cache):
    """A cache of ``PrefixCacheLayer``.

    Args:
        layers: Layers of the language model.
        rows: Rows of the batch.
        capacity: Tokens of a row.
    """

    def __init__(self, layers: int, rows: int, capacity: int) -> None:
        self.rows, self.capacity = rows, capacity
        self.prefix: Prefix | None = None
        """Of the forward that runs."""
        super().__init__(layers=[PrefixCacheLayer(self) for _ in range(layers)])

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        for layer in self.layers:
            assert isinstance(layer, PrefixCacheLayer)
            layer.select(rows)
        self.rows = len(rows)


def attend(query: Tensor, keys: Tensor, values: Tensor, prefix: Prefix, scale: float | None = None) -> Tensor:
    """Attend to the prefixes.

    Args:
        query: ``[N * Q, H, D]``.
        keys: The cache of a layer, ``[N * capacity, Hkv, D]``.
        values: Likewise.
        prefix: What each query sees.
        scale: Factor on the scores, ``1 / sqrt(D)`` if None.

    Returns:
        ``[N * Q, H, D]``.
    """
    if prefix.sequences:
        return _attend_in_sequences(query, keys, values, prefix, scale)
    rows = len(prefix.columns)
    grouped = query.unflatten(0, (rows, -1)).transpose(1, 2)
    keys, values = (
        x.unflatten(0, (rows, -1))[:, : prefix.width].transpose(1, 2).to(query.dtype) for x in (keys, values)
    )
    out = nn.functional.scaled_dot_product_attention(
        grouped, keys, values, attn_mask=prefix.mask, scale=scale, enable_gqa=grouped.shape[1] != keys.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _attend_in_sequences(query: Tensor, keys: Tensor, values: Tensor, prefix: Prefix, scale: float | None) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    parts = []
    for group in prefix.sequences:
        part = varlen_attn(
            query if group.queries is None else query.index_select(0, group.queries),
            keys,
            values,
            group.edges,
            group.starts,
            group.longest,
            prefix.width,
            scale=scale,
            window_size=(-1, 0) if group.causal else (-1, -1),
            enable_gqa=query.shape[1] != keys.shape[1],
            seqused_k=group.used,
        )
        assert isinstance(part, Tensor)
        parts.append(part)
    if len(parts) == 1:
        return parts[0]
    out = torch.empty_like(query)
    for group, part in zip(prefix.sequences, parts, strict=True):
        assert group.queries is not None
        out.index_copy_(0, group.queries, part)
    return out


@functools.cache
def has_kernel(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> bool:
    """Whether the kernel for sequences does what is needed here: it is tried once, against PyTorch's attention.

    Args:
        device: Where the model is.
        dtype: Of queries, keys and values.
        heads: Query heads ``H``.
        kv_heads: Key heads ``Hkv``.
        size: Size of a head ``D``.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    try:
        difference = _difference_from_dense(device, dtype, heads, kv_heads, size)
    except (ImportError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        logger.warning("decoding attends with a dense mask: varlen_attn cannot be used here (%s)", reason)
        return False
    if not difference <= CHECK_TOLERANCE:
        logger.warning("decoding attends with a dense mask: varlen_attn is off by %.2g here", difference)
        return False
    return True


def _difference_from_dense(device: torch.device, dtype: torch.dtype, heads: int, kv_heads: int, size: int) -> float:
    from torch.nn.attention.varlen import varlen_attn

    missing = [name for name in KERNEL_ARGUMENTS if name not in inspect.signature(varlen_attn).parameters]
    if missing:
        raise TypeError(f"torch {torch.__version__} has no {' and no '.join(missing)} in it")
    source = torch.Generator().manual_seed(0)
    capacity, rows, width = 64, 2, 8
    shapes = [(rows * width, heads, size), *[(rows * capacity, kv_heads, size)] * 2]
    query, keys, values = (torch.randn(shape, generator=source).to(device, dtype) for shape in shapes)
    visible = torch.tensor([[5] * 4 + [9] * 4, [33] * 4 + [64] * 4], device=device)
    columns = torch.zeros_like(visible)
    dense = Prefix(columns=columns, visible=visible, width=capacity, capacity=capacity)
    groups = Sequences(
        edges=torch.arange(0, 17, 4, dtype=torch.int32, device=device),
        starts=torch.tensor([0, 0, capacity, capacity, 2 * capacity], dtype=torch.int32, device=device),
        used=visible[:, ::4].flatten().int(),
        longest=4,
    )
    kernel = Prefix(columns=columns, visible=visible, width=capacity, capacity=capacity, sequences=[groups])
    difference = attend(query, keys, values, kernel).float() - attend(query, keys, values, dense).float()
    return difference.abs().max().item()


def prefix_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    prefix: Prefix,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The backend that transformers' layers call; ``prefix`` is an argument of the model's forward.

    Args:
        module: The attention layer.
        query: ``[N, H, Q, D]``.
        key: What ``PrefixCacheLayer.update`` returned.
        value: Likewise.
        attention_mask: Not used.
        scaling: Factor on the scores, ``1 / sqrt(D)`` if None.
        dropout: Not used.
        prefix: What the queries see.
        **kwargs: Not used.

    Returns:
        ``[N, Q, H, D]`` and None.
    """
    del module, attention_mask, dropout, kwargs
    out = attend(query.transpose(1, 2).flatten(0, 1), key, value, prefix, scaling)
    return out.unflatten(0, (query.shape[0], -1)), None


AttentionInterface.register(NAME, prefix_attention)
