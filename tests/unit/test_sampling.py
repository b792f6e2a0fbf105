from __future__ import annotations

import math

import pytest
import torch

from nemo_bard.generation.sampling import filter_logits, propose, tokens_per_step

PROBABILITIES = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


class TestFilterLogits:
    @pytest.mark.parametrize(
        ("top_k", "expected"),
        [(0, [[0, 1, 2, 3]] * 2), (1, [[0], [3]]), (2, [[0, 1], [2, 3]]), (9, [[0, 1, 2, 3]] * 2)],
    )
    def test_top_k(self, top_k, expected):
        assert kept(filter_logits(PROBABILITIES.log(), top_k=top_k, top_p=1.0)) == expected

    @pytest.mark.parametrize(
        ("top_p", "expected"),
        [
            (1e-6, [[0], [3]]),
            (0.45, [[0], [2, 3]]),
            (0.6, [[0, 1], [2, 3]]),
            (0.75, [[0, 1], [1, 2, 3]]),
            (0.96, [[0, 1, 2, 3], [0, 1, 2, 3]]),
        ],
    )
    def test_top_p_keeps_the_smallest_set_with_at_least_this_mass(self, top_p, expected):
        assert kept(filter_logits(PROBABILITIES.log(), top_k=0, top_p=top_p)) == expected

    def test_top_p_counts_what_top_k_left(self):
        """Of ids 0 and 1, with 5/8 and 3/8, the first alone has 0.6."""
        assert kept(filter_logits(PROBABILITIES[:1].log(), top_k=2, top_p=0.6)) == [[0]]

    def test_the_logits_are_not_modified(self):
        logits = PROBABILITIES.log()
        before = logits.clone()
        filter_logits(logits, top_k=1, top_p=0.5)
        assert torch.equal(logits, before)


class TestPropose:
    def test_temperature_zero_is_argmax_with_its_probability(self):
        out = propose(PROBABILITIES.log() + 7.0, with_entropy=True)
        assert out.ids.tolist() == [0, 3]
        torch.testing.assert_close(out.confidence, torch.tensor([0.5, 0.4]))
        torch.testing.assert_close(out.entropy, torch.distributions.Categorical(PROBABILITIES).entropy())
        assert propose(PROBABILITIES.log()).entropy is None

    def test_temperature_zero_ignores_top_k_and_top_p(self):
        plain, filtered = propose(PROBABILITIES.log()), propose(PROBABILITIES.log(), top_k=1, top_p=0.1)
        assert torch.equal(plain.ids, filtered.ids)
        assert torch.equal(plain.confidence, filtered.confidence)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_an_id_with_logit_minus_infinity_is_never_proposed(self, temperature):
        logits = PROBABILITIES.log()
        logits[:, 0] = logits[:, 3] = float("-inf")
        out = propose(logits.repeat(200, 1), temperature=temperature, with_entropy=True, generator=generator())
        assert set(out.ids.tolist()) <= {1, 2}
        assert out.confidence.isfinite().all()
        assert out.entropy.isfinite().all()

    @pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
    def test_draws_follow_the_tempered_softmax(self, temperature):
        draws = 20_000
        logits = PROBABILITIES[:1].log().expand(draws, -1)
        out = propose(logits, temperature=temperature, with_entropy=True, generator=generator())
        expected = (PROBABILITIES[0].log() / temperature).softmax(-1)
        torch.testing.assert_close(out.confidence, expected[out.ids])
        torch.testing.assert_close(out.entropy[0], torch.distributions.Categorical(expected).entropy())
        for token, p in enumerate(expected.tolist()):
            share = (out.ids == token).double().mean().item()
            assert abs(share - p) <= 4 * math.sqrt(p * (1 - p) / draws)

    def test_confidence_is_that_of_the_filtered_distribution(self):
        out = propose(PROBABILITIES[:1].log(), temperature=1.0, top_k=1, generator=generator())
        assert out.ids.tolist() == [0]
        assert out.confidence.item() == pytest.approx(1.0)

    def test_the_generator_decides(self):
        logits = torch.randn(500, 8, generator=generator())
        first = propose(logits, temperature=1.0, generator=generator(1)).ids
        torch.manual_seed(9)
        assert torch.equal(propose(logits, temperature=1.0, generator=generator(1)).ids, first)
        assert not torch.equal(propose(logits, temperature=1.0, generator=generator(2)).ids, first)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_half_precision_is_computed_in_float32(self, temperature):
        half = torch.randn(20, 8, generator=generator()).bfloat16()
        out = propose(half, temperature=temperature, generator=generator(1))
        same = propose(half.float(), temperature=temperature, generator=generator(1))
        assert out.confidence.dtype == torch.float32
        assert torch.equal(out.ids, same.ids)
        assert torch.equal(out.confidence, same.confidence)

    @pytest.mark.parametrize("temperature", [0.0, 1.0])
    def test_no_positions(self, temperature):
        out = propose(torch.zeros(0, 8), temperature=temperature, with_entropy=True)
        assert out.ids.shape == out.confidence.shape == out.entropy.shape == (0,)
        assert out.ids.dtype == torch.int64


@pytest.mark.parametrize("block_size", [1, 4, 8, 32])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 8, 32])
def test_tokens_per_step_splits_evenly_and_early(block_size, steps):
    quota = tokens_per_step(block_size, steps)
    assert len(quota) == steps
    assert sum(quota) == block_size
    assert quota == sorted(quota, reverse=True)
    assert max(quota) - min(quota) <= 1
