"""One denoising step: which token each masked position prefers, and which positions are fixed (torch only)."""

from __future__ import annotations

from collections.abc import Callable
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


class StepState(NamedTuple):
    """What a strategy sees of one step; tensors are ``[N, B]``."""

    confidence: Tensor
    """Probability of the proposed token; -inf where nothing is masked."""
    entropy: Tensor | None
    """Entropy in nats; inf where nothing is masked."""
    is_masked: Tensor
    """True where a token is masked."""
    quota: int
    """Tokens the even split gives to this step."""
    confidence_threshold: float
    entropy_bound: float


def _most_confident(state: StepState) -> Tensor:
    order = state.confidence.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order)
    )
    return (rank < state.quota) & state.is_masked


def low_confidence_static(state: StepState) -> Tensor:
    """Fix the ``quota`` most confident masked tokens."""
    return _most_confident(state)


def low_confidence_dynamic(state: StepState) -> Tensor:
    """Fix every masked token with confidence > threshold; where these are fewer than ``quota``, the most confident."""
    above = (state.confidence > state.confidence_threshold) & state.is_masked
    enough = above.sum(-1, keepdim=True) >= state.quota
    return torch.where(enough, above, _most_confident(state))


def entropy_bound(state: StepState) -> Tensor:
    """Fix the lowest-entropy tokens while their joint mutual information stays bounded, at least ``quota`` (EB-Sampler).

    With entropies sorted upwards, the ``k`` first are fixed while ``sum_i H_i - max_i H_i <= entropy_bound``
    (arXiv 2505.24857).
    """
    assert state.entropy is not None
    values, order = state.entropy.sort(dim=-1, stable=True)
    finite = torch.where(values.isfinite(), values, 0.0)
    keep = ((finite.cumsum(-1) - finite) <= state.entropy_bound) & values.isfinite()
    keep |= torch.arange(keep.shape[-1], device=keep.device) < state.quota
    return torch.zeros_like(keep).scatter(-1, order, keep) & state.is_masked


Strategy = Callable[[StepState], Tensor]
STRATEGIES: dict[str, Strategy] = {
    "low_confidence_static": low_confidence_static,
    "low_confidence_dynamic": low_confidence_dynamic,
    "entropy_bound": entropy_bound,
}
NEEDS_ENTROPY = ("entropy_bound",)
