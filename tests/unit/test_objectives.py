"""Objectives: totals that are known before a pass and after it, their parts, and objectives that a loss brings along."""

import pytest
import torch

from nemo_bard.method.losses import BlockDiffusionCrossEntropy, DistillationLoss
from nemo_bard.method.objectives import (
    UNIT_TOTALS,
    JointObjective,
    PBMObjective,
    StepTotals,
    SWDObjective,
    add_up,
    make_objective,
)

VOCABULARY, LENGTH = 13, 24


def batch_of(seed, samples=2):
    """Two responses a row, the second with padding; half of the noisy tokens are supervised."""
    generator = torch.Generator().manual_seed(seed)
    shape = (samples, LENGTH)
    response = torch.full(shape, -1)
    for row in range(samples):
        response[row, 8:16], response[row, 16:24] = 2 * row, 2 * row + 1
    noisy = response >= 0
    following = torch.full(shape, -1)
    following[:, 2:6] = response[:, 8:12]
    return {
        "input_ids": torch.randint(VOCABULARY, shape, generator=generator),
        "labels": torch.randint(VOCABULARY, shape, generator=generator),
        "response_ids": response,
        "loss_mask": noisy & (torch.rand(shape, generator=generator) < 0.5),
        "loss_weight": torch.rand(shape, generator=generator) + 0.5,
        "anchor_block_ids": torch.where(noisy & (torch.rand(shape, generator=generator) < 0.8), 1, -1),
        "ar_response_ids": following,
        "sample_ids": torch.zeros(shape, dtype=torch.int64),
        "num_samples": samples,
        "num_dropped": 0,
        "rejects": [],
    }


def logits_of(batch, seed=7):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch["input_ids"].numel(), VOCABULARY, generator=generator, dtype=torch.float64)


def teach(batch):
    top = logits_of(batch, 8)[batch["output_positions"]].topk(3)
    return top.values, top.indices


OBJECTIVES = {
    "pbm": lambda reduction: PBMObjective(BlockDiffusionCrossEntropy(reduction)),
    "swd": lambda _: SWDObjective(DistillationLoss(kd_top_k=3), teach),
    "joint": lambda reduction: JointObjective(PBMObjective(BlockDiffusionCrossEntropy(reduction)), 0.3),
    "joint swd": lambda _: JointObjective(SWDObjective(DistillationLoss(kd_top_k=3), teach), 0.3),
}


def run(objective, batches, totals, chunk):
    """Sums of losses and parts, the LM head in chunks."""
    total, parts = 0.0, []
    for batch in batches:
        weighed = objective.weigh(batch, totals)
        assert weighed["output_positions"].shape == weighed["output_weight"].shape
        loss, logits = objective.loss(weighed), logits_of(batch)[weighed["output_positions"]]
        for start in range(0, len(logits), chunk):
            part = slice(start, min(start + chunk, len(logits)))
            total += float(loss(logits[part].clone(), part))
        parts.append(loss.parts())
    return total, torch.stack(parts).sum(0).tolist()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_totals_of_the_end_give_what_totals_of_the_start_give(name, reduction):
    """A step knows its totals before it runs, a validation at its end; chunks of the LM head change nothing."""
    from nemo_bard.method.objectives import count

    objective, batches = OBJECTIVES[name](reduction), [batch_of(0), batch_of(1, samples=3)]
    totals = count(batches)
    step = objective.reduce(*run(objective, batches, totals, 5), UNIT_TOTALS)
    whole = objective.reduce(*run(objective, batches, UNIT_TOTALS, 10**6), totals)
    assert step == pytest.approx(whole, rel=1e-6)
    assert set(step) == {"loss", *objective.part_names()}


def test_parts_add_up_with_their_weights():
    objective = OBJECTIVES["joint swd"]("sum")
    total, sums = run(objective, [batch_of(0)], StepTotals(2, 9, 0, 0, num_ar_tokens=8), 4)
    found = objective.reduce(total, sums, UNIT_TOTALS)
    assert found["diffusion_loss"] == pytest.approx(found["ce_loss"] + 0.5 * found["kd_loss"], rel=1e-6)
    assert total == pytest.approx(found["diffusion_loss"] + 0.3 * found["ar_loss"], rel=1e-6)


def test_totals_of_nothing_are_zero():
    assert add_up([]) == StepTotals(0, 0, 0, 0)
    assert add_up([StepTotals(1, 2, 3, 4), StepTotals(1, 1, 1, 1, num_bad=1)]) == StepTotals(2, 3, 4, 5, num_bad=1)
    assert OBJECTIVES["pbm"]("mean").reduce(0.0, [], StepTotals(0, 0, 0, 0)) == {"loss": 0.0}


def test_a_loss_may_bring_its_objective():
    class Own(PBMObjective):
        pass

    class Loss(BlockDiffusionCrossEntropy):
        objective_class = Own

    assert type(make_objective(BlockDiffusionCrossEntropy(), PBMObjective)) is PBMObjective
    assert type(make_objective(Loss(), PBMObjective)) is Own
