"""Products of a few tokens with a weight, on a CPU.

MKL multiplies ``x [K, H]`` by ``weight [V, H]`` transposed slowly while ``K`` is as small as a block. The same product the other
way round, ``weight @ x^T`` with ``K`` filled up to whole vectors, is faster, and gave the same bits wherever it was measured
(figures: ``benchmarks/README.md``). An engine says in ``layers`` that its view of the model has such layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from nemo_bard.generation.low_rank import LowRankLinear
from nemo_bard.method.chunked import OutputHead

FEWEST_ROWS, MOST_ROWS = 4, 320
"""Tokens for which the turned product was never the slower one."""
VECTOR = 16
"""Float32 numbers of a vector of AVX-512; tokens are filled up to a multiple of it."""


def turned_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear``, as ``weight @ input^T`` where that is faster.

    Args:
        input: ``[..., H]``.
        weight: ``[V, H]``.
        bias: ``[V]``.

    Returns:
        ``[..., V]``.
    """
    rows = input.numel() // max(input.shape[-1], 1)
    if not FEWEST_ROWS <= rows <= MOST_ROWS or not _suits(input, weight):
        return linear(input, weight, bias)
    flat = input.reshape(rows, -1)
    out = (weight @ pad(flat, (0, 0, 0, -rows % VECTOR)).t())[:, :rows].t().contiguous()
    if bias is not None:
        out += bias
    return out.reshape(*input.shape[:-1], -1)


def _suits(input: Tensor, weight: Tensor) -> bool:
    return (
        input.device.type == "cpu"
        and input.dtype == weight.dtype == torch.float32
        and type(weight) in (Tensor, nn.Parameter)  # not a shard, not a quantised weight
        and not torch.is_autocast_enabled("cpu")
        and torch.backends.mkl.is_available()
    )


class TurnedLinear(nn.Linear):
    """A linear layer that computes ``turned_linear``."""

    def forward(self, input: Tensor) -> Tensor:
        """``[..., V]`` of ``[..., H]``."""
        return turned_linear(input, self.weight, self.bias)


class TurnedLowRankLinear(LowRankLinear):
    """A linear layer with an adapter beside it that computes ``turned_linear``; the small products stay torch's."""

    def product(self, input: Tensor) -> Tensor:
        """``[..., V]`` of ``[..., H]``."""
        return turned_linear(input, self.weight, self.bias)


class TurnedHead(OutputHead):
    """An LM head that computes ``turned_linear``."""

    def forward(self, input: Tensor, output_fn: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """See ``OutputHead``."""
        return super().forward(input, turned_linear if output_fn is None else output_fn)


TURNED: dict[type[nn.Module], type[nn.Module]] = {
    nn.Linear: TurnedLinear,
    LowRankLinear: TurnedLowRankLinear,
    OutputHead: TurnedHead,
}
"""What takes the place of a layer of exactly this class."""
