from __future__ import annotations

import math

import pytest
import torch

from nemo_bard.method.noise import (
    NOISES,
    MaskNoise,
    MixedNoise,
    NoiseLevels,
    UniformNoise,
    make_noise,
    mixed_probabilities,
    sample_generator,
)

MASK, RANDOM_IDS, BLOCK = 509, 500, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def within_4_sigma(count: float, draws: int, probability: float) -> bool:
    sigma = math.sqrt(probability * (1 - probability) / draws)
    return abs(count / draws - probability) <= 4 * sigma + 1e-12


class TestNoiseLevels:
    @pytest.mark.parametrize(("low", "high"), [(1e-3, 1.0), (0.1, 0.5), (0.3, 0.3), (0.5, 1.0)])
    @pytest.mark.parametrize("num_blocks", [1, 2, 7, 32])
    def test_one_level_from_each_stratum(self, low, high, num_blocks):
        width = (high - low) / num_blocks
        for seed in range(50):
            t = NoiseLevels(low=low, high=high).sample(num_blocks, generator=generator(seed)).double()
            assert t.shape == (num_blocks,)
            edges = low + width * torch.arange(num_blocks + 1, dtype=torch.float64)
            assert (t.sort().values >= edges[:-1] - 1e-6).all()
            assert (t.sort().values <= edges[1:] + 1e-6).all()

    @pytest.mark.parametrize("per", NoiseLevels.PER)
    def test_low_and_high_bind(self, per):
        low, high = torch.tensor([0.1, 0.5])
        for seed in range(200):
            t = NoiseLevels(low=0.1, high=0.5, per=per).sample(16, generator=generator(seed))
            assert t.dtype == torch.float32
            assert (t >= low).all()
            assert (t <= high).all()

    def test_strata_are_shuffled(self):
        """Every position has the same mean."""
        draws = 4000
        t = torch.stack([NoiseLevels().sample(8, generator=generator(seed)) for seed in range(draws)])
        sigma = math.sqrt(1 / 12 / draws)
        assert ((t.mean(0) - 0.5005).abs() <= 4 * sigma).all()

    def test_per_sample_draws_one_level(self):
        levels = NoiseLevels(low=0.1, high=0.5, per="sample")
        draws = torch.stack([levels.sample(6, generator=generator(seed)) for seed in range(2000)])
        assert (draws == draws[:, :1]).all()
        assert abs(draws[:, 0].mean() - 0.3) <= 4 * 0.4 / math.sqrt(12 * 2000)

    @pytest.mark.parametrize(
        ("low", "high"), [(0.0, 1.0), (-0.1, 1.0), (0.6, 0.5), (0.1, 1.1), (math.nan, 1.0), (0.1, math.nan)]
    )
    def test_range_is_checked(self, low, high):
        with pytest.raises(ValueError, match="0 < low <= high <= 1, got low="):
            NoiseLevels(low=low, high=high)

    def test_per_is_checked(self):
        with pytest.raises(ValueError, match="'per' must be one of block, sample, got 'token'"):
            NoiseLevels(per="token")

    @pytest.mark.parametrize("per", NoiseLevels.PER)
    @pytest.mark.parametrize("num_blocks", [0, -1])
    def test_number_of_blocks_is_checked(self, per, num_blocks):
        with pytest.raises(ValueError, match="num_blocks must be >= 1"):
            NoiseLevels(per=per).sample(num_blocks)


class TestSampleGenerator:
    def numbers(self, *key: int, **stream: int) -> list[float]:
        return torch.rand(4, generator=sample_generator(*key, **stream)).tolist()

    def test_is_a_pure_function_of_its_arguments(self):
        torch.manual_seed(1)
        first = self.numbers(3, 1, 17, stream=2)
        torch.rand(100)
        assert self.numbers(3, 1, 17, stream=2) == first

    def test_leaves_the_global_generator_alone(self):
        before = torch.get_rng_state()
        self.numbers(3, 1, 17)
        assert torch.equal(torch.get_rng_state(), before)

    def test_every_argument_changes_the_numbers(self):
        keys = [
            (seed, epoch, index, stream)
            for seed in (0, 1, -1, 2**63)
            for epoch in range(3)
            for index in (0, 1, 2, 10**9)
            for stream in range(2)
        ]
        drawn = {tuple(self.numbers(*key[:3], stream=key[3])) for key in keys}
        assert len(drawn) == len(keys)

    def test_neighbouring_samples_are_uncorrelated(self):
        values = torch.tensor([self.numbers(0, 0, index)[0] for index in range(4000)])
        assert abs(values.mean() - 0.5) <= 4 / math.sqrt(12 * 4000)
        assert abs(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1]) <= 4 / math.sqrt(4000)


class TestMixedProbabilities:
    def test_at_both_ends(self):
        floor = 1e-3
        at_0, at_1 = mixed_probabilities(torch.tensor([0.0, 1.0]))
        torch.testing.assert_close(at_0, torch.tensor([floor, floor, 1.0]) / (1 + 2 * floor))
        torch.testing.assert_close(at_1, torch.tensor([1.0, floor, floor]) / (1 + 2 * floor))

    def test_in_the_middle(self):
        """At t = 1/2 the weights are 1 - 1/sqrt(2), sqrt(2) - 1, 1 - 1/sqrt(2)."""
        root = math.sqrt(0.5)
        total = 2 * (1 - root) + 2 * root - 1
        expected = torch.tensor([1 - root, 2 * root - 1, 1 - root]) / total
        torch.testing.assert_close(mixed_probabilities(torch.tensor(0.5)), expected)

    def test_sum_to_one_and_move_from_keep_to_mask(self):
        probabilities = mixed_probabilities(torch.linspace(0, 1, 101))
        torch.testing.assert_close(probabilities.sum(-1), torch.ones(101))
        assert (probabilities[1:, 0] >= probabilities[:-1, 0]).all()
        assert (probabilities[1:, 2] <= probabilities[:-1, 2]).all()


def corrupt(name: str, clean: torch.Tensor, t: torch.Tensor, seed: int = 0, **overrides):
    settings = {"mask_token_id": MASK, "num_random_ids": RANDOM_IDS, **overrides}
    return make_noise(name).corrupt(clean, t, generator=generator(seed), **settings)


@pytest.fixture
def clean() -> torch.Tensor:
    return torch.randint(RANDOM_IDS, (64 * BLOCK,), generator=generator(7))


@pytest.mark.parametrize("name", NOISES.names())
class TestEveryNoise:
    def test_keeps_the_clean_ids_and_unmarked_tokens(self, name, clean):
        t = torch.rand(clean.shape, generator=generator(1)).clamp_min(1e-3)
        before = clean.clone()
        out = corrupt(name, clean, t)
        assert torch.equal(clean, before)
        assert torch.equal(out.noisy_ids[~out.noise_mask], clean[~out.noise_mask])
        assert out.noisy_ids.dtype == torch.int64
        assert out.noise_mask.dtype == out.loss_mask.dtype == torch.bool
        assert out.noisy_ids.shape == out.noise_mask.shape == out.loss_mask.shape == clean.shape

    def test_only_the_mask_and_random_ids_appear(self, name, clean):
        out = corrupt(name, clean, torch.full(clean.shape, 0.6), num_random_ids=10)
        new = out.noisy_ids[out.noise_mask]
        assert ((new == MASK) | (new < 10)).all()

    def test_the_seed_fixes_the_noise(self, name, clean):
        t = torch.full(clean.shape, 0.5)
        torch.manual_seed(3)
        first = corrupt(name, clean, t, seed=5)
        torch.manual_seed(4)
        again = corrupt(name, clean, t, seed=5)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert not torch.equal(first.noisy_ids, corrupt(name, clean, t, seed=6).noisy_ids)

    def test_corrupted_tokens_that_differ_are_supervised(self, name, clean):
        out = corrupt(name, clean, torch.full(clean.shape, 0.5))
        assert out.loss_mask[out.noisy_ids != clean].all()

    def test_more_noise_corrupts_more(self, name, clean):
        shares = [corrupt(name, clean, torch.full(clean.shape, t)).noise_mask.float().mean() for t in (0.01, 0.5, 1.0)]
        assert shares[0] < 0.1 < shares[1] < 0.9 < shares[2]

    def test_an_empty_response_stays_empty(self, name):
        out = corrupt(name, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        assert out.noisy_ids.numel() == out.loss_mask.numel() == 0

    @pytest.mark.parametrize("level", [0.0, -0.5, 1.5, math.nan])
    def test_levels_are_checked(self, name, clean, level):
        t = torch.full(clean.shape, 0.5)
        t[3] = level
        with pytest.raises(ValueError, match=r"t must be in \(0, 1\], got values from"):
            corrupt(name, clean, t)

    def test_the_shape_of_the_levels_is_checked(self, name, clean):
        with pytest.raises(ValueError, match=r"t must have the shape of clean_ids \(512,\), got \(64,\)"):
            corrupt(name, clean, torch.full((64,), 0.5))


@pytest.mark.parametrize("name", ["uniform", "mixed"])
def test_the_number_of_random_ids_is_checked(name, clean):
    with pytest.raises(ValueError, match="num_random_ids must be >= 1, got 0"):
        corrupt(name, clean, torch.full(clean.shape, 0.5), num_random_ids=0)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.8])
def test_mask_noise(t):
    draws = 40_000
    clean = torch.randint(RANDOM_IDS, (draws,), generator=generator(7))
    out = corrupt("mask", clean, torch.full((draws,), t))
    assert (out.noisy_ids[out.noise_mask] == MASK).all()
    assert torch.equal(out.loss_mask, out.noise_mask)
    assert within_4_sigma(int(out.noise_mask.sum()), draws, t)


def test_mask_noise_at_level_one_masks_everything(clean):
    out = corrupt("mask", clean, torch.ones(clean.shape))
    assert (out.noisy_ids == MASK).all()


@pytest.mark.parametrize("t", [0.05, 0.3, 0.8, 1.0])
def test_uniform_noise(t):
    draws, ids = 40_000, 10
    clean = torch.full((draws,), 3)
    out = corrupt("uniform", clean, torch.full((draws,), t), num_random_ids=ids)
    assert out.loss_mask.all()
    level = min(t, UniformNoise().max_t)
    assert within_4_sigma(int(out.noise_mask.sum()), draws, level)
    for token in range(ids):  # drawn uniformly, the clean id included
        expected = level / ids + (1 - level) * (token == 3)
        assert within_4_sigma(int((out.noisy_ids == token).sum()), draws, expected)


@pytest.mark.parametrize("t", [0.05, 0.3, 0.8, 1.0])
def test_mixed_noise(t):
    draws, ids = 40_000, 10
    clean = torch.full((draws,), 3)
    out = corrupt("mixed", clean, torch.full((draws,), t), num_random_ids=ids)
    masked, replaced, kept = mixed_probabilities(torch.tensor(t)).double().tolist()
    assert torch.equal(out.loss_mask, out.noisy_ids != clean)
    assert within_4_sigma(int((out.noisy_ids == MASK).sum()), draws, masked)
    assert within_4_sigma(int((~out.noise_mask).sum()), draws, kept)
    for token in range(ids):
        expected = replaced / ids + kept * (token == 3)
        assert within_4_sigma(int((out.noisy_ids == token).sum()), draws, expected)


def test_the_level_of_each_token_counts():
    """Blocks with different levels in one response."""
    t = torch.tensor([0.1, 0.9]).repeat_interleave(20_000)
    out = corrupt("mask", torch.zeros(40_000, dtype=torch.int64), t)
    assert within_4_sigma(int(out.noise_mask[:20_000].sum()), 20_000, 0.1)
    assert within_4_sigma(int(out.noise_mask[20_000:].sum()), 20_000, 0.9)


def test_noises_by_name():
    assert {name: type(make_noise(name)) for name in NOISES} == {
        "mask": MaskNoise,
        "uniform": UniformNoise,
        "mixed": MixedNoise,
    }


def test_an_unknown_noise_names_the_nearest_and_all():
    with pytest.raises(
        ValueError, match=r"noise.name must be one of mask, uniform, mixed, got 'mixd' \(did you mean 'mixed'\?\)"
    ):
        make_noise("mixd")
