"""Small operations of a Qwen3-VL layer, between its products: as they are, or compiled to a kernel each.

Compiled ones are called while a CUDA graph is captured; nothing of the compiler is left in the loop that replays it. Each
model has compiled code of its own, so that the compiler's limits, which count by function, are not shared.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

BACKEND = "inductor"
"""Of ``torch.compile``."""


def rms_norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Qwen3-VL's RMSNorm over the last dimension: in float32, rounded before the weight is applied."""
    wide = hidden.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
    return weight * wide.to(hidden.dtype)


def add_norm(hidden: Tensor, update: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """Add the output of a sublayer, ``[T, H]`` each; returns the sum and its norm."""
    hidden = hidden + update
    return hidden, rms_norm(hidden, weight, epsilon)


def gate(packed: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]``."""
    gated, up = packed.chunk(2, -1)
    return silu(gated) * up


def rotate(
    packed: Tensor,
    query_norm: Tensor,
    key_norm: Tensor,
    epsilon: float,
    cos: Tensor,
    sin: Tensor,
    groups: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split what the joined projection gave; normalise queries and keys and rotate them (RoPE, arXiv 2104.09864).

    Args:
        packed: Queries, keys and values side by side, ``[T, (H + 2 Hkv) D]``.
        query_norm: Weight of the queries' norm, ``[D]``.
        key_norm: Of the keys', ``[D]``.
        epsilon: Of both norms.
        cos: Cosines of the angles, ``[T, D]``.
        sin: Sines.
        groups: Query heads per key head.

    Returns:
        Queries ``[T, H, D]``, keys and values ``[T, Hkv, D]``.
    """
    heads = packed.unflatten(-1, (-1, query_norm.shape[0]))
    kv_heads = heads.shape[1] // (groups + 2)
    query, key, value = heads.split([groups * kv_heads, kv_heads, kv_heads], 1)
    query, key = rms_norm(query, query_norm, epsilon), rms_norm(key, key_norm, epsilon)
    return _turn(query, cos, sin), _turn(key, cos, sin), value


def _turn(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = heads.chunk(2, -1)
    return heads * cos.unsqueeze(1) + torch.cat([-second, first], -1) * sin.unsqueeze(1)


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The operations above, as one call of ``generate`` uses them."""

    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    add_norm: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor]] = add_norm
    rotate: Callable[..., tuple[Tensor, Tensor, Tensor]] = rotate
    gate: Callable[[Tensor], Tensor] = gate

    @classmethod
    def compiled(cls) -> Kernels:
        """Compile all of them, for one model; a shape costs a compilation of each, and too many of them an error."""
        return cls(**{field.name: _compile(field.default) for field in fields(cls)})


def _compile(function: Any) -> Any:
    own = FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
    return torch.compile(own, fullgraph=True, dynamic=False, backend=BACKEND)
