from __future__ import annotations

import pytest
import torch

from nemo_bard.generation.parameters import STRATEGIES, denoising_strategies, strategy_fields
from nemo_bard.generation.sampling import tokens_per_step
from nemo_bard.generation.strategies import EntropyBound, LowConfidenceDynamic, LowConfidenceStatic, StepState


def state_of(confidence, masked, *, quota=1, entropy=None) -> StepState:
    """A step's state as the loop builds it: confidence -inf and entropy inf where nothing is masked."""
    is_masked = torch.tensor(masked, dtype=torch.bool)
    confidence = torch.tensor(confidence).masked_fill(~is_masked, float("-inf"))
    entropy = None if entropy is None else torch.tensor(entropy).masked_fill(~is_masked, float("inf"))
    return StepState(confidence, entropy, is_masked, quota)


class TestStatic:
    def test_fixes_the_most_confident(self):
        state = state_of([[0.1, 0.9, 0.3, 0.8]], [[1, 0, 1, 1]], quota=2)
        assert LowConfidenceStatic().fix(state).int().tolist() == [[0, 0, 1, 1]]

    def test_fixes_all_when_fewer_are_masked_than_the_quota(self):
        state = state_of([[0.1, 0.9, 0.3, 0.8]], [[1, 0, 0, 0]], quota=3)
        assert LowConfidenceStatic().fix(state).int().tolist() == [[1, 0, 0, 0]]

    def test_ties_go_to_the_left(self):
        state = state_of([[0.5, 0.5, 0.5, 0.5]], [[0, 1, 1, 1]], quota=2)
        assert LowConfidenceStatic().fix(state).int().tolist() == [[0, 1, 1, 0]]


class TestDynamic:
    def test_fixes_all_above_the_threshold(self):
        state = state_of([[0.6, 0.9, 0.3, 0.8]], [[1, 0, 1, 1]], quota=1)
        assert LowConfidenceDynamic(confidence_threshold=0.5).fix(state).int().tolist() == [[1, 0, 0, 1]]

    def test_the_threshold_is_strict(self):
        state = state_of([[0.5, 0.7, 0.3, 0.2]], [[1, 1, 1, 1]], quota=1)
        assert LowConfidenceDynamic(confidence_threshold=0.5).fix(state).int().tolist() == [[0, 1, 0, 0]]

    def test_falls_back_to_the_quota_row_by_row(self):
        state = state_of([[0.6, 0.1, 0.3, 0.2], [0.6, 0.7, 0.8, 0.2]], [[1, 1, 1, 1]] * 2, quota=2)
        assert LowConfidenceDynamic(confidence_threshold=0.5).fix(state).int().tolist() == [[1, 0, 1, 0], [1, 1, 1, 0]]


class TestEntropyBound:
    entropy = ((0.3, 0.1, 0.5, 0.2),)

    @pytest.mark.parametrize(
        ("bound", "expected"),
        [
            (0.0, [[0, 1, 0, 0]]),
            (0.05, [[0, 1, 0, 0]]),
            (0.15, [[0, 1, 0, 1]]),  # 0.1 <= 0.15 < 0.1 + 0.2
            (0.35, [[1, 1, 0, 1]]),  # 0.1 + 0.2 <= 0.35 < 0.1 + 0.2 + 0.3
            (0.65, [[1, 1, 1, 1]]),
        ],
    )
    def test_fixes_while_the_sum_without_the_largest_stays_bounded(self, bound, expected):
        state = state_of([[0.5] * 4], [[1, 1, 1, 1]], entropy=self.entropy)
        assert EntropyBound(entropy_bound=bound).fix(state).int().tolist() == expected

    def test_fixed_tokens_do_not_count(self):
        state = state_of([[0.5] * 4], [[1, 0, 1, 1]], entropy=self.entropy)
        assert EntropyBound(entropy_bound=0.25).fix(state).int().tolist() == [[1, 0, 0, 1]]

    def test_at_least_the_quota(self):
        state = state_of([[0.5] * 4], [[1, 1, 1, 1]], quota=3, entropy=self.entropy)
        assert EntropyBound(entropy_bound=0.0).fix(state).int().tolist() == [[1, 1, 0, 1]]

    def test_certain_tokens_are_fixed_together(self):
        state = state_of([[1.0] * 4], [[1, 1, 1, 1]], entropy=[[0.0, 0.0, 0.0, 0.4]])
        assert EntropyBound(entropy_bound=0.0).fix(state).int().tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("steps", [1, 3, 8])
@pytest.mark.parametrize("name", denoising_strategies())
def test_every_strategy_fixes_masked_tokens_only_and_ends_in_time(name, steps):
    """One or more per unfinished row and step, nothing in finished rows, done within ``denoising_steps``."""
    g, rows, block_size = torch.Generator().manual_seed(0), 16, 8
    values = {"confidence_threshold": 0.8, "entropy_bound": 0.2}
    strategy = STRATEGIES.get(name)(**{key: values[key] for key in strategy_fields(name)})
    is_masked = torch.ones(rows, block_size, dtype=torch.bool)
    is_masked[0] = False
    for quota in tokens_per_step(block_size, steps):
        confidence = torch.rand(rows, block_size, generator=g).masked_fill(~is_masked, float("-inf"))
        entropy = torch.rand(rows, block_size, generator=g).masked_fill(~is_masked, float("inf"))
        given = entropy if strategy.needs_entropy else None
        fix = strategy.fix(StepState(confidence, given, is_masked, quota))
        assert fix.dtype == torch.bool
        assert not fix[~is_masked].any()
        assert torch.equal(fix.any(-1), is_masked.any(-1))
        assert (fix.sum(-1) >= torch.minimum(is_masked.sum(-1), torch.tensor(quota))).all()
        is_masked = is_masked & ~fix
    assert not is_masked.any()
