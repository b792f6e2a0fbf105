"""Which token each masked position prefers in a denoising step, and how many a step fixes (torch only)."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """What the model proposes at ``K`` positions; every field is ``[K]``."""

    ids: Tensor
    """Proposed token, int64."""
    confidence: Tensor
    """Its probability, float32."""
    entropy: Tensor | None
    """Entropy of the distribution in nats, float32; None unless asked for."""


def filter_logits(logits: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Set logits outside the ``top_k`` largest, then outside the nucleus of mass ``top_p``, to -inf.

    Args:
        logits: ``[K, V]`` float.
        top_k: Number kept, 0 for all.
        top_p: Smallest set with at least this probability is kept (the most likely token always), in (0, 1].

    Returns:
        ``[K, V]``, a new tensor if anything is filtered.
    """
    if 0 < top_k < logits.shape[-1]:
        kth = logits.topk(top_k, -1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, float("-inf"))
    if top_p < 1.0:
        values, order = logits.sort(-1, descending=True)
        before = values.softmax(-1).cumsum(-1) - values.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(drop, float("-inf"))
    return logits


def propose(
    logits: Tensor,
    *,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    with_entropy: bool = False,
    generator: torch.Generator | None = None,
) -> Candidates:
    """Pick one token per position.

    Temperature 0 is argmax with its softmax probability as confidence; otherwise one draw from the filtered softmax of
    ``logits / temperature``, with its probability there.

    Args:
        logits: ``[K, V]``; computed in float32 (or float64).
        temperature: >= 0.
        top_k: See ``filter_logits``.
        top_p: See ``filter_logits``.
        with_entropy: Also return the entropy of the distribution drawn from.
        generator: Source of randomness on the logits' device; the global one if None.

    Returns:
        The candidates.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if temperature == 0.0:
        best, ids = logits.max(-1)
        log_z = logits.logsumexp(-1)
        entropy = None
        if with_entropy:
            log_p = logits - log_z.unsqueeze(-1)
            entropy = -(log_p.exp() * log_p.clamp_min(torch.finfo(log_p.dtype).min)).sum(-1)
        return Candidates(ids, (best - log_z).exp(), entropy)
    probabilities = filter_logits(logits / temperature, top_k=top_k, top_p=top_p).softmax(-1)
    if probabilities.shape[0] == 0:
        ids = torch.zeros(0, dtype=torch.int64, device=logits.device)
    else:
        ids = torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
    confidence = probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = torch.special.entr(probabilities).sum(-1) if with_entropy else None
    return Candidates(ids, confidence, entropy)


def tokens_per_step(block_size: int, denoising_steps: int) -> list[int]:
    """Split ``block_size`` over ``denoising_steps`` as evenly as possible, earlier steps taking the remainder."""
    base, extra = divmod(block_size, denoising_steps)
    return [base + (step < extra) for step in range(denoising_steps)]
