"""The joint autoregressive loss: the context predicts the responses too, token by token.

With ``context_attention: causal`` the context is what the autoregressive source computes, and this is the source's own
training loss on the responses: the token at place ``i`` predicts the one at ``i + 1``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_bard.method.chunked import ChunkLoss
from nemo_bard.method.losses import token_scale


class NextTokens(NamedTuple):
    """What the context of a microbatch predicts; every field is ``[A]``."""

    positions: Tensor
    """Flat indices into ``[N * L]`` of the tokens that predict."""
    labels: Tensor
    """Ids of the tokens behind them."""
    weight: Tensor
    """Normalisation; the autoregressive loss of the step is the weighted sum."""


def weigh_next_tokens(
    batch: Mapping[str, Any], reduction: str, *, num_samples: int, num_tokens: int
) -> dict[str, Tensor]:
    """Keys that ``next_tokens`` reads, for a microbatch with ``ar_response_ids``.

    Normalised like the diffusion loss (``losses.token_scale``), over the tokens of the responses without padding:
    ``mean`` averages over a response's tokens, sums over responses and divides by the samples; ``sum`` divides by all.

    Args:
        batch: A collated microbatch, corrupted or not: the context never is.
        reduction: ``mean`` or ``sum``.
        num_samples: Samples in the whole optimizer step.
        num_tokens: Tokens that contexts predict in the whole optimizer step.
    """
    ids = batch["ar_response_ids"]
    scale = token_scale(reduction, ids, num_samples=num_samples, num_loss_tokens=num_tokens).flatten()
    positions = (ids.flatten() >= 0).nonzero().flatten()
    return {"ar_positions": positions, "ar_weight": scale[positions]}


def next_tokens(batch: Mapping[str, Any]) -> NextTokens:
    """Collect what the context predicts; the next token always lies right behind, see ``layout.sample_layout``."""
    positions = batch["ar_positions"]
    return NextTokens(positions, batch["input_ids"].flatten()[positions + 1], batch["ar_weight"])


class JointLoss:
    """A ``ChunkLoss`` over ``K`` noisy tokens and, behind them, ``A`` context tokens; keeps the sums of both."""

    def __init__(self, diffusion: ChunkLoss, num_diffusion: int, following: NextTokens, *, ar_weight: float) -> None:
        """Create the loss.

        Args:
            diffusion: Loss of the noisy tokens.
            num_diffusion: ``K``.
            following: What the context tokens predict.
            ar_weight: Weight of the autoregressive sum in the total, > 0.
        """
        self.diffusion, self.num_diffusion, self.following, self.ar_weight = (
            diffusion, num_diffusion, following, ar_weight,
        )  # fmt: skip
        self.parts = torch.zeros(2, dtype=torch.float64, device=following.positions.device)
        """Diffusion loss and autoregressive loss so far, without ``ar_weight``; no gradient."""

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """Total of a chunk, which may hold tokens of both kinds."""
        cut = min(max(self.num_diffusion - part.start, 0), len(logits))
        total = logits.new_zeros((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        if cut:
            value = self.diffusion(logits[:cut], slice(part.start, part.start + cut))
            self.parts[0] += value.detach()
            total = total + value
        if cut < len(logits):
            rest = slice(part.start + cut - self.num_diffusion, part.stop - self.num_diffusion)
            own = logits[cut:] if logits.dtype == torch.float64 else logits[cut:].float()
            per_token = F.cross_entropy(own, self.following.labels[rest], reduction="none")
            value = (per_token * self.following.weight[rest].to(per_token.dtype)).sum()
            self.parts[1] += value.detach()
            total = total + self.ar_weight * value
        return total
