"""Two noisy copies of a response, noise and complement: each token supervised once, the objective unchanged."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.method.corruption import NoiseContext, corrupt_batch
from nemo_bard.method.layout import CONTEXT, NOISY, PADDING, RowOptions, TokenIds, attention_mask, sample_layout
from nemo_bard.method.losses import BlockDiffusionCrossEntropy
from nemo_bard.method.objectives import PBMObjective, StepTotals, count
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.forward import model_inputs

LENGTH, RESPONSES = 41, [(5, 8), (12, 29), (33, 41)]  # of 3, 17 and 8 tokens
MASK = 999
COMPLEMENTARY = NoiseSettings(complementary=True)


def weigh(batch, reduction, totals):
    return PBMObjective(BlockDiffusionCrossEntropy(reduction)).weigh(batch, totals)


def seen_by(layout, block, context_attention):
    """``{(copy, response, index): what it sees}`` of noisy tokens; copies count in the order of the row."""
    ids = TokenIds(torch.zeros_like(block), layout.branch, block, torch.arange(len(layout)))
    mask = attention_mask(ids, ids, context_attention=context_attention)
    names, counts = [], {}
    for place in range(len(layout)):
        response = int(layout.response[place])
        if response < 0:
            names.append(("context", place))
            continue
        index = counts[response] = counts.get(response, -1) + 1
        start, end = RESPONSES[response]
        padded = -(-(end - start) // 4) * 4
        names.append((index // padded, response, index % padded))
    return {
        names[query]: {names[key] for key in mask[query].nonzero().flatten().tolist()} for query in range(len(layout))
    }


@pytest.mark.parametrize("context_attention", ["block", "causal"])
@pytest.mark.parametrize("supervised", [[0, 1, 2], [2], [1]])
@pytest.mark.parametrize("anchor", [None, 2])
def test_each_copy_sees_what_a_single_copy_sees(supervised, context_attention, anchor):
    one_copy = RowOptions(anchor_block_size=anchor)
    one = sample_layout(LENGTH, RESPONSES, 4, supervised=supervised, options=one_copy)
    two = sample_layout(LENGTH, RESPONSES, 4, supervised=supervised, options=replace(one_copy, noisy_copies=2))
    assert (two.branch == CONTEXT).sum() == (one.branch == CONTEXT).sum()
    for block in ("block", "anchor_block") if anchor else ("block",):
        own, both = getattr(one, block), getattr(two, block)
        assert int((both == PADDING).sum()) == 2 * int((own == PADDING).sum())
        single, double = seen_by(one, own, context_attention), seen_by(two, both, context_attention)
        copies = [name for name in double if name[0] == 1]
        assert len(copies) == (one.branch == NOISY).sum()
        for name, keys in double.items():
            if name[0] == "context":
                assert keys == single[name]
                continue
            copy, *rest = name
            if both is two.anchor_block and not any(key[0] == "context" for key in single[(0, *rest)]):
                continue  # not taught by the anchor
            expected = {key if key[0] == "context" else (copy, *key[1:]) for key in single[(0, *rest)]}
            assert keys == expected, name


def test_one_copy_is_what_it_was():
    layout = sample_layout(LENGTH, RESPONSES, 4, options=RowOptions(noisy_copies=1))
    plain = sample_layout(LENGTH, RESPONSES, 4)
    assert torch.equal(layout.block, plain.block)


# ---------------------------------------------------------------- noise of a batch


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("tiny")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4)
    model = BardVLForConditionalGeneration.from_pretrained(folder / "start").eval()
    processor = AutoProcessor.from_pretrained(folder / "start")
    return SimpleNamespace(processor=processor, config=model.config, model=model)


def samples():
    def talk(index, *answers):
        turns = [({"role": "user", "content": f"ask {a}"}, {"role": "assistant", "content": a}) for a in answers]
        return {"conversation": [message for turn in turns for message in turn], "sample_index": index}

    return [talk(0, "1 2 3 4 5 6 7"), talk(1, "eleven", "a b c d e"), talk(2, "x")]


def context_of(tiny, seed=3):
    return NoiseContext(block_size=4, mask_token_id=tiny.config.mask_token_id, num_random_ids=100, seed=seed, epoch=0)


@pytest.mark.parametrize("per", ["block", "sample"])
def test_every_response_token_is_supervised_exactly_once(tiny, per):
    make = BlockDiffusionCollator(tiny.processor, tiny.config, options=RowOptions(noisy_copies=2))
    clean = make(samples())
    batch = corrupt_batch(clean, NoiseSettings(complementary=True, per=per), context_of(tiny))
    assert batch["num_samples"] == 3
    mask_id = tiny.config.mask_token_id
    for response in range(4):
        places = (clean["response_ids"] == response).flatten().nonzero().flatten()
        first, second = places.chunk(2)
        flat = {key: batch[key].flatten() for key in ("input_ids", "loss_mask", "loss_weight", "padding_mask")}
        ids = clean["input_ids"].flatten()
        assert torch.equal(ids[first], ids[second])
        assert torch.equal(flat["loss_mask"][first], ~flat["loss_mask"][second])
        for copy in (first, second):
            supervised = flat["loss_mask"][copy]
            assert torch.equal(flat["input_ids"][copy], ids[copy].masked_fill(supervised, mask_id))
        half = torch.where(flat["padding_mask"], 0.5, 1.0)
        levels = [half[copy] / flat["loss_weight"][copy] for copy in (first, second)]
        torch.testing.assert_close(levels[0] + levels[1], torch.ones(len(first)))
        for level in levels:
            assert level.min() >= 1e-3 * (1 - 1e-4)
    assert int(batch["loss_mask"].sum()) * 2 == int((clean["response_ids"] >= 0).sum())


def test_levels_come_from_the_symmetric_part_of_the_range():
    for low, high, expected in ((1e-3, 1.0, 1e-3), (0.1, 0.7, 0.3), (0.2, 0.8, 0.2), (0.4, 0.9, 0.4), (0.5, 0.5, 0.5)):
        levels = NoiseSettings(complementary=True, low=low, high=high).levels()
        assert levels.low == pytest.approx(expected)
        assert levels.high == pytest.approx(1 - expected)


def fake_batch(copies):
    """One response of two blocks of two tokens behind a prefix of one; ids 1 to 4."""
    layout = sample_layout(5, [(1, 5)], 2, options=RowOptions(noisy_copies=copies))
    ids = layout.source.clone()[None]
    return {
        "input_ids": ids,
        "labels": ids,
        "sample_ids": torch.zeros_like(ids),
        "branch_ids": layout.branch[None],
        "block_ids": layout.block[None],
        "response_ids": layout.response[None],
        "padding_mask": layout.padding[None],
        "noise_keys": [(0, 0, 0)],
        "num_samples": 1,
        "num_dropped": 0,
    }


def pretend_loss(visible):
    """An arbitrary loss of each token of a block given which of its two tokens are visible; ``[..., 2]``."""
    left, right = visible[..., 0].double(), visible[..., 1].double()
    return torch.stack([1.0 - 0.8 * right, 3.0 - 2.5 * left], -1)


def exact_objective(low, high):
    """Mean over tokens of E over t ~ U[low, high] and masks of ``masked / t * loss``, in closed form of the masks."""
    t = low + (high - low) * (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    total = torch.zeros((), dtype=torch.float64)
    for mask in product((False, True), repeat=2):
        masked = torch.tensor(mask)
        probability = torch.where(masked, t[:, None], 1 - t[:, None]).prod(-1)
        total += (probability * ((pretend_loss(~masked) * masked).sum() / t)).mean() / 2
    return total.item()


@pytest.mark.parametrize(("low", "high"), [(0.1, 0.9), (0.05, 1.0)])
def test_the_expected_loss_is_the_plain_objective(low, high):
    """Over the symmetric range; with a variance that is smaller than that of as many independent draws."""
    draws = 1500
    settings = NoiseSettings(low=low, high=high, complementary=True)
    bounds = settings.levels()
    values = {}
    for copies, noise in ((2, settings), (1, NoiseSettings(low=bounds.low, high=bounds.high))):
        batch, found = fake_batch(copies), []
        for seed in range(draws):
            context = NoiseContext(block_size=2, mask_token_id=MASK, num_random_ids=10, seed=seed, epoch=0)
            drawn = corrupt_batch(batch, noise, context)
            weighed = weigh(drawn, "mean", StepTotals(1, int(drawn["loss_mask"].sum()), 0, 0))
            noisy = drawn["branch_ids"] == NOISY
            masked = (drawn["input_ids"] == MASK)[noisy].reshape(-1, 2)
            loss = pretend_loss(~masked)[drawn["loss_mask"][noisy].reshape(-1, 2)]
            found.append((loss * weighed["output_weight"]).sum().item())
        values[copies] = torch.tensor(found, dtype=torch.float64)
    exact = exact_objective(bounds.low, bounds.high)
    for found in values.values():
        assert abs(found.mean() - exact) <= 4 * found.std() / draws**0.5
    assert values[2].var() < values[1].var() / 2


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_loss_is_the_mean_of_both_copies_laid_out_alone(tiny, reduction):
    """Same ids, two rows instead of one: ``mean`` averages the pair, ``sum`` divides by all supervised tokens."""
    make = BlockDiffusionCollator(tiny.processor, tiny.config, options=RowOptions(noisy_copies=2))
    single = BlockDiffusionCollator(tiny.processor, tiny.config)
    both = corrupt_batch(make(samples()), COMPLEMENTARY, context_of(tiny))
    halves = [single(samples()) for _ in range(2)]
    for number, half in enumerate(halves):
        half.update(loss_mask=torch.zeros_like(half["padding_mask"]), loss_weight=torch.zeros(half["labels"].shape))
        for response in range(4):
            source = (both["response_ids"] == response).flatten().nonzero().flatten().chunk(2)[number]
            for key in ("input_ids", "loss_mask", "loss_weight"):
                half[key].view(-1)[(half["response_ids"] == response).flatten()] = both[key].flatten()[source]
    totals = count([both])
    assert totals.num_samples == 3

    def loss_of(batch, totals):
        batch = weigh(batch, reduction, totals)
        where = batch["output_positions"]
        with torch.no_grad():
            logits = tiny.model(**model_inputs(batch, tiny.config)).logits
        loss = BlockDiffusionCrossEntropy(reduction)
        return loss(logits, batch["labels"].flatten()[where], weight=batch["output_weight"]).item()

    found = loss_of(both, totals)
    parts = [loss_of(half, totals) for half in halves]
    expected = sum(parts) / 2 if reduction == "mean" else sum(parts)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "mixed"}, "noise.complementary needs noise.name: mask, got 'mixed'"),
        ({"high": 0.5}, "noise.complementary needs low < 0.5 < high"),
        ({"low": 0.6}, "noise.complementary needs low < 0.5 < high"),
        ({"per": "sample", "min_masked": 1}, "does not go with noise.min_masked=1; set it to 0"),
        ({"complementary": "yes"}, "noise.complementary must be true or false, got 'yes'"),
    ],
)
def test_bad_settings_are_one_line(values, message):
    with pytest.raises(ValueError, match="^[^\n]*$") as caught:
        NoiseSettings.from_dict({"complementary": True, **values})
    assert message in str(caught.value)


def test_a_batch_with_one_copy_is_refused(tiny):
    batch = BlockDiffusionCollator(tiny.processor, tiny.config)(samples())
    with pytest.raises(AssertionError, match="two noisy copies"):
        corrupt_batch(batch, COMPLEMENTARY, context_of(tiny))
