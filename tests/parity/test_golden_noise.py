"""Noise against the reference's: marginals exactly, draws statistically."""

from __future__ import annotations

import math

import pytest
import torch
from golden_data import golden_arrays, golden_cases

from nemo_bard.method.noise import MaskNoise, MixedNoise, NoiseLevels, mixed_probabilities

CASES = golden_cases("noise")
MIX = CASES["mix"]


@pytest.fixture(scope="module")
def marginals():
    return golden_arrays("noise", "mix_marginals.npz")


@pytest.fixture(scope="module")
def block_times():
    return golden_arrays("noise", "block_times.npz")


def test_mixed_marginals(marginals):
    ours = mixed_probabilities(marginals["t"]).double()
    assert (ours - marginals["prob"]).abs().max() <= 1e-6


def test_the_reference_draws_from_our_mixed_marginals(marginals):
    """Counts of its sampler (masked, another token, unchanged) lie within 4 sigma of our probabilities."""
    draws, ids = MIX["empirical_draws"], MIX["vocab_size"]
    masked, replaced, kept = mixed_probabilities(marginals["emp_t"]).double().unbind(-1)
    expected = torch.stack([masked, replaced * (ids - 1) / ids, kept + replaced / ids], -1)
    sigma = (expected * (1 - expected) / draws).sqrt()
    assert ((marginals["emp_counts"] / draws - expected).abs() <= 4 * sigma).all()


def test_our_mixed_noise_draws_like_the_reference(marginals):
    """Two samples of the same size, so the difference of two shares has sqrt(2) of one share's deviation."""
    draws = MIX["empirical_draws"]
    for t, counts in zip(marginals["emp_t"].tolist(), marginals["emp_counts"], strict=True):
        clean = torch.full((draws,), MIX["clean_token"])
        out = MixedNoise().corrupt(
            clean,
            torch.full((draws,), t),
            mask_token_id=MIX["mask_token_id"],
            num_random_ids=MIX["vocab_size"],
            generator=torch.Generator().manual_seed(0),
        )
        masked, same = out.noisy_ids == MIX["mask_token_id"], out.noisy_ids == clean
        ours = torch.stack([masked.sum(), (~masked & ~same).sum(), same.sum()]).double()
        share = (ours + counts) / (2 * draws)
        sigma = (2 * share * (1 - share) / draws).sqrt()
        assert ((ours - counts).abs() / draws <= 4 * sigma + 1e-12).all()


@pytest.mark.parametrize("case", CASES["block_times"], ids=lambda case: f"n{case['num_blocks']}-{case['low']}")
def test_block_times(case, block_times):
    """Strata of the reference cut [0, 1], ours [low, high]; they agree where these are the same but for ``low``."""
    index, blocks, low, high = case["index"], case["num_blocks"], case["low"], case["high"]
    edges = torch.arange(blocks + 1, dtype=torch.float64) / blocks
    smallest, largest = block_times[f"stratum_min_{index}"], block_times[f"stratum_max_{index}"]
    assert (smallest >= edges[:-1] + low / blocks - 1e-6).all()
    assert (largest <= edges[:-1] + high / blocks + 1e-6).all()

    if low == 0.0:
        with pytest.raises(ValueError, match="0 < low"):
            NoiseLevels(low=low, high=high)
        return
    draws, generator = 4000, torch.Generator().manual_seed(index)
    levels = NoiseLevels(low=low, high=high)
    ours = torch.stack([levels.sample(blocks, generator=generator) for _ in range(draws)]).double().sort(-1).values
    assert (ours >= low + (high - low) * edges[:-1] - 1e-6).all()
    assert (ours <= low + (high - low) * edges[1:] + 1e-6).all()
    rescaled = (ours.mean(0) - low) / (high - low)
    sigma = math.sqrt(1 / 12 / draws) / blocks
    assert ((rescaled - (edges[:-1] + edges[1:]) / 2).abs() <= 4 * sigma).all()
    if (low, high) == (0.001, 1.0):
        both = sigma * math.sqrt(1 + draws / case["draws"])
        shift = low / blocks  # the reference clamps where ours rescales
        assert ((ours.mean(0) - block_times[f"stratum_mean_{index}"]).abs() <= 4 * both + shift).all()


def test_our_masks_mean_the_same_by_t(block_times):
    """At the levels of the reference's blocks our shares of masked tokens differ from its by chance only.

    Two independent shares of a block, so that the difference has twice the variance of one.
    """
    t, share = block_times["mask_t"], block_times["mask_frac"].double()
    tokens = CASES["mask_fraction"]["block_size"]
    out = MaskNoise().corrupt(
        torch.zeros(t.numel() * tokens, dtype=torch.int64),
        t.flatten().float().repeat_interleave(tokens),
        mask_token_id=1,
        num_random_ids=1,
        generator=torch.Generator().manual_seed(0),
    )
    ours = out.noise_mask.view(*t.shape, tokens).double().mean(-1)
    difference, variance = ours - share, 2 * t.double() * (1 - t.double()) / tokens
    assert abs(difference.sum() / variance.sum().sqrt()) <= 4
    spread = (difference**2).sum() / variance.sum()
    assert abs(spread - 1) <= 4 * math.sqrt(2 / t.numel()) * 2  # the squared deviations are no normal variables
