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
    uniform: Tensor | None = None,
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
        uniform: For temperature > 0: numbers in [0, 1) that decide the draws, ``[K]`` float64, see ``uniform_numbers``.
        generator: Draws ``uniform`` where it is None; on the logits' device, the global one if None.

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
    if uniform is None:
        uniform = torch.rand(len(logits), dtype=torch.float64, device=logits.device, generator=generator)
    ids = _draw(probabilities, uniform)
    confidence = probabilities.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    entropy = torch.special.entr(probabilities).sum(-1) if with_entropy else None
    return Candidates(ids, confidence, entropy)


def _draw(probabilities: Tensor, uniform: Tensor) -> Tensor:
    """Invert the cumulative distribution of each row of ``[K, V]`` at ``[K]``; in float64, so that rare tokens count too."""
    cumulative = probabilities.double().cumsum(-1)
    total = cumulative[:, -1:]
    at = torch.minimum(uniform.unsqueeze(1) * total, total.nextafter(torch.zeros_like(total)))
    return torch.searchsorted(cumulative, at, right=True).squeeze(1)


def draw_seeds(rows: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor:
    """One seed for each row of a batch, ``[rows]`` int64, from a generator on ``device`` (the global one if None)."""
    return torch.randint(2**63 - 1, (rows,), device=device, generator=generator)


def uniform_numbers(seeds: Tensor, block: Tensor, step: Tensor, size: int) -> Tensor:
    """Numbers in [0, 1) for the positions of a block, which depend on nothing but what is given here.

    So a row draws the same in whatever engine, and at whatever time its step comes. Splitmix64 (Steele et al., 2014)
    is applied to seed, block, step and column in turn.

    Args:
        seeds: Of the rows, ``[N]`` int64.
        block: Number of each row's block, ``[N]`` int64.
        step: Steps that each block has had, ``[N]`` int64.
        size: Tokens of a block, ``B``.

    Returns:
        ``[N, B]`` float64.
    """
    state = _mix(_mix(seeds + block) + step).unsqueeze(1) + torch.arange(size, device=seeds.device)
    return _shift(_mix(state), 11).double() * 2.0**-53


def _mix(state: Tensor) -> Tensor:
    """A step of splitmix64 on int64, which wraps around."""
    state = state - 0x61C8864680B583EB  # + 0x9E3779B97F4A7C15 modulo 2**64
    state = (state ^ _shift(state, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
    state = (state ^ _shift(state, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
    return state ^ _shift(state, 31)


def _shift(state: Tensor, bits: int) -> Tensor:
    """Shift right, zeros coming in."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def tokens_per_step(block_size: int, denoising_steps: int) -> list[int]:
    """Split ``block_size`` over ``denoising_steps`` as evenly as possible, earlier steps taking the remainder."""
    base, extra = divmod(block_size, denoising_steps)
    return [base + (step < extra) for step in range(denoising_steps)]
