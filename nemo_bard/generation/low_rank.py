"""A linear layer with a LoRA adapter that is kept apart from its weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.functional import linear


class Factors(NamedTuple):
    """An adapter of one layer: it adds ``up @ down`` to the weight ``[out, in]``."""

    down: Tensor
    """``[rank, in]``."""
    up: Tensor
    """``[out, rank]``, with the adapter's scale in it."""

    def like(self, weight: Tensor) -> Factors:
        """The same where a weight is, and of its type."""
        return Factors(self.down.to(weight), self.up.to(weight))


class LowRankLinear(nn.Linear):
    """What a linear layer becomes in a call's view of the model: the same weight, and the factors beside it."""

    factors: Factors

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``."""
        return self.product(input) + linear(linear(input, self.factors.down), self.factors.up)

    def product(self, input: Tensor) -> Tensor:
        """What the layer gives without its adapter."""
        return linear(input, self.weight, self.bias)
