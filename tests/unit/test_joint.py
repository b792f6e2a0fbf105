"""The joint autoregressive loss: equal to Qwen3-VL's own, and independent of noise, chunks, splits and packing."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.method.corruption import NoiseContext, corrupt_batch, without_samples
from nemo_bard.method.layout import CONTEXT, NOISY, RowOptions, sample_layout
from nemo_bard.method.losses import BlockDiffusionCrossEntropy, DistillationLoss
from nemo_bard.method.objectives import UNIT_TOTALS, JointObjective, PBMObjective, StepTotals, SWDObjective, count
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.forward import batch_loss, model_inputs
from nemo_bard.train.swd import anchor_top_k


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("tiny")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4, context_attention="causal")
    model = BardVLForConditionalGeneration.from_pretrained(folder / "start").eval()
    source = Qwen3VLForConditionalGeneration.from_pretrained(folder / "source").eval()
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for own, theirs in zip(model.parameters(), source.parameters(), strict=True):
            # larger than the initial weights, so that attention matters
            own.add_(0.05 * torch.randn(own.shape, generator=generator))
            theirs.copy_(own)
    processor = AutoProcessor.from_pretrained(folder / "start")
    return SimpleNamespace(processor=processor, config=model.config, model=model, source=source)


def picture(seed):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (64, 64, 3), dtype=np.uint8))


def samples():
    def talk(index, *turns):
        return {
            "conversation": [
                {"role": ("user", "assistant")[i % 2], "content": [*parts[:-1], {"type": "text", "text": parts[-1]}]}
                for i, parts in enumerate(turns)
            ],
            "sample_index": index,
        }

    image = {"type": "image", "image": picture(0)}
    return [
        talk(0, [image, "Read the digits."], ["1 2 3 4 5 6 7"]),
        talk(1, ["Say a number"], ["eleven"]),
        talk(2, [image, "one"], ["no"], ["again"], ["yes yes yes 9"]),
        talk(3, ["Say it"], ["a"], ["more"], ["b c d e f g h i j k"]),
    ]


NEXT_TOKEN = RowOptions(next_token=True)


def joint(*, weight=0.7, reduction="mean"):
    return JointObjective(PBMObjective(BlockDiffusionCrossEntropy(reduction)), weight)


def plain():
    return PBMObjective(BlockDiffusionCrossEntropy())


def collator(tiny, rows=NEXT_TOKEN, **settings):
    return BlockDiffusionCollator(tiny.processor, tiny.config, options=rows, **settings)


def noised(tiny, batch, seed=3, **noise):
    context = NoiseContext(
        block_size=4, mask_token_id=tiny.config.mask_token_id, num_random_ids=100, seed=seed, epoch=0
    )
    return corrupt_batch(batch, NoiseSettings(**noise), context)


def step(tiny, batches, objective=None, totals=None, chunk=5):
    """Total loss, its parts (diffusion, autoregressive, ...) and gradients of an optimizer step over microbatches."""
    objective = objective or joint()
    totals = totals or count(batches)
    tiny.model.zero_grad()
    total, parts = 0.0, []
    for batch in batches:
        weighed = objective.weigh(batch, totals)
        loss, kept = batch_loss(tiny.model, tiny.config, objective, weighed, chunk_tokens=chunk)
        loss.backward()
        total += loss.item()
        parts.append(kept.parts())
    parts = torch.stack(parts).sum(0).tolist()
    return total, parts, {name: p.grad.clone() for name, p in tiny.model.named_parameters()}


def assert_equal_gradients(one, other):
    scale = max(gradient.abs().max() for gradient in one.values())
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= 1e-5 * scale, name


def source_losses(tiny, example, supervised):
    """Qwen3-VL's own loss on each of the responses, averaged over its tokens; the conversation as it is."""
    inputs = tiny.processor.apply_chat_template(
        example["conversation"], tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=False
    )
    maker = collator(tiny)
    spans = maker._responses(inputs["input_ids"][0], example["conversation"], 0)
    losses = []
    for index in supervised(spans):
        labels = torch.full_like(inputs["input_ids"], -100)
        start, end = spans[index]
        labels[:, start:end] = inputs["input_ids"][:, start:end]
        with torch.no_grad():
            losses.append(tiny.source(**inputs, labels=labels).loss.item())
    return losses


@pytest.mark.parametrize("turns", ["all", "last"])
def test_equals_the_loss_of_the_plain_qwen3_vl(tiny, turns):
    """Mean over each response's tokens, end token included, first token predicted from the prompt."""
    supervised = {"all": lambda spans: range(len(spans)), "last": lambda spans: [len(spans) - 1]}[turns]
    expected = [source_losses(tiny, example, supervised) for example in samples()]
    assert [len(losses) for losses in expected] == ([1, 1, 2, 2] if turns == "all" else [1, 1, 1, 1])
    make = collator(tiny, turns=turns)
    for example, losses in zip(samples(), expected, strict=True):
        _, (_, ar), _ = step(tiny, [noised(tiny, make([example]))])
        assert ar == pytest.approx(sum(losses), rel=1e-5)
    total, (diffusion, ar), _ = step(tiny, [noised(tiny, make(samples()))])
    assert ar == pytest.approx(sum(map(sum, expected)) / 4, rel=1e-5)
    assert total == pytest.approx(diffusion + 0.7 * ar, rel=1e-5)


def test_reduction_sum_is_the_mean_over_all_response_tokens(tiny):
    batch = noised(tiny, collator(tiny)(samples()))
    totals = count([batch])
    _, (_, ar), _ = step(tiny, [batch], joint(reduction="sum"))
    tokens, summed = 0, 0.0
    for example in samples():
        losses = source_losses(tiny, example, lambda spans: range(len(spans)))
        ids = tiny.processor.apply_chat_template(example["conversation"], tokenize=True, return_dict=True)["input_ids"]
        spans = collator(tiny)._responses(torch.tensor(ids).flatten(), example["conversation"], 0)
        sizes = [end - start for start, end in spans]
        tokens += sum(sizes)
        summed += sum(size * loss for size, loss in zip(sizes, losses, strict=True))
    assert totals.num_ar_tokens == tokens
    assert ar == pytest.approx(summed / tokens, rel=1e-5)


def test_the_diffusion_loss_is_what_it_is_without(tiny):
    """The longer context changes nothing for noisy tokens, nor does the weight 0."""
    with_ar, without = (
        noised(tiny, collator(tiny)(samples())),
        noised(tiny, collator(tiny, RowOptions())(samples())),
    )
    _, (diffusion, _), _ = step(tiny, [with_ar])
    expected, parts, gradients = step(tiny, [without], plain())
    assert parts == []
    assert "ar_response_ids" not in without
    assert diffusion == pytest.approx(expected, rel=1e-5)
    longer, _, other = step(tiny, [with_ar], plain())
    assert longer == pytest.approx(expected, rel=1e-5)
    assert_equal_gradients(gradients, other)


def test_the_context_does_not_depend_on_the_noise(tiny):
    make = collator(tiny)
    found = [
        step(tiny, [noised(tiny, make(samples()), **noise)])[1][1] for noise in ({}, {"seed": 4}, {"name": "mixed"})
    ]
    twice = collator(tiny, replace(NEXT_TOKEN, noisy_copies=2))(samples())
    found.append(step(tiny, [noised(tiny, twice, complementary=True)])[1][1])
    assert found == pytest.approx([found[0]] * 4, rel=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_chunks_microbatches_and_packing_change_nothing(tiny, reduction):
    make, examples = collator(tiny), samples()
    encoded = [make.encode(item) for item in examples]
    whole = noised(tiny, make(examples))
    runs = {
        "small chunks": ([whole], 3),
        "two batches": ([noised(tiny, make(examples[:1])), noised(tiny, make(examples[1:]))], 5),
        "four batches": ([noised(tiny, make([item])) for item in examples], 10**6),
        "packed": ([noised(tiny, {**make.stack([encoded[:2], encoded[2:]]), "num_dropped": 0})], 7),
    }
    loss, parts, gradients = step(tiny, [whole], joint(reduction=reduction), chunk=10**6)
    for batches, chunk in runs.values():
        other, other_parts, other_gradients = step(tiny, batches, joint(reduction=reduction), chunk=chunk)
        assert other == pytest.approx(loss, rel=1e-5)
        assert other_parts == pytest.approx(parts, rel=1e-5)
        assert_equal_gradients(gradients, other_gradients)


def test_gradients_equal_those_of_full_logits(tiny):
    """Both losses written out on the logits of the whole row."""
    batch = noised(tiny, collator(tiny)(samples()))
    weighed = joint().weigh(batch, count([batch]))
    loss, _, gradients = step(tiny, [batch])
    tiny.model.zero_grad()
    inputs = model_inputs(weighed, tiny.config)
    inputs["output_positions"] = torch.arange(batch["input_ids"].numel())
    log_p = tiny.model(**inputs).logits.log_softmax(-1)
    number, positions, weight = weighed["num_noisy"], weighed["output_positions"], weighed["output_weight"]
    noisy, context = positions[:number], positions[number:]
    full = -(log_p[noisy, batch["labels"].flatten()[noisy]] * weight[:number]).sum()
    following = batch["input_ids"].flatten()[context + 1]
    full = full - 0.7 * (log_p[context, following] * weight[number:]).sum()
    full.backward()
    assert full.item() == pytest.approx(loss, rel=1e-5)
    assert_equal_gradients(gradients, {name: p.grad for name, p in tiny.model.named_parameters()})


def test_what_the_context_predicts(tiny):
    """Every token of a supervised response once, in order, from the token before it."""
    batch = collator(tiny)(samples())
    decode, places = tiny.processor.tokenizer.decode, batch["ar_response_ids"].flatten()
    answers = ["1 2 3 4 5 6 7", "eleven", "no", "yes yes yes 9", "a", "b c d e f g h i j k"]
    for response, answer in enumerate(answers):
        at = (places == response).nonzero().flatten()
        assert (at.diff() == 1).all()
        assert decode(batch["input_ids"].flatten()[at + 1]) == answer + "<|im_end|>"
        row = at[0] // batch["input_ids"].shape[1]
        assert (batch["response_ids"][row] == response).any()
    assert (batch["branch_ids"].flatten()[places >= 0] == CONTEXT).all()
    assert (without_samples(batch, {0, 2})["ar_response_ids"].unique().tolist()) == [-1, 1, 4, 5]


@pytest.mark.parametrize("anchor", [None, 2])
def test_nothing_behind_the_last_supervised_response_is_laid_out(anchor):
    responses = [(5, 8), (12, 29), (33, 40)]
    for supervised, end in (([0, 1, 2], 40), ([1], 29), ([0], 8)):
        rows = RowOptions(anchor_block_size=anchor, next_token=True)
        layout = sample_layout(50, responses, 4, supervised=supervised, options=rows)
        assert int((layout.branch == CONTEXT).sum()) == end
        expected = [[index] * (b - a) for index, (a, b) in enumerate(responses) if index in supervised]
        assert layout.next_response[layout.next_response >= 0].tolist() == sum(expected, [])
        plain = sample_layout(50, responses, 4, supervised=supervised, options=replace(rows, next_token=False))
        noisy, own = layout.branch == NOISY, plain.branch == NOISY
        assert torch.equal(layout.block[noisy], plain.block[own])


def test_distillation_takes_the_joint_loss_too(tiny):
    """The anchor's part reads the noisy tokens only; the sum is the one of both losses."""
    make = collator(tiny, replace(NEXT_TOKEN, anchor_block_size=2))
    batch = noised(tiny, make(samples()))
    teach = partial(anchor_top_k, tiny.model, tiny.config, k=4)
    objective = JointObjective(SWDObjective(DistillationLoss(kd_top_k=4), teach), 0.7)
    assert objective.part_names() == ("diffusion_loss", "ar_loss", "ce_loss", "kd_loss")
    total, (diffusion, ar, ce, kd), _ = step(tiny, [batch], objective)
    logged = objective.reduce(total, (diffusion, ar, ce, kd), UNIT_TOTALS)
    assert logged.pop("loss") == pytest.approx(total, rel=1e-5)
    assert logged == {"diffusion_loss": diffusion, "ar_loss": ar, "ce_loss": ce, "kd_loss": kd}
    assert diffusion == pytest.approx(ce + 0.5 * kd, rel=1e-5)
    assert total == pytest.approx(diffusion + 0.7 * ar, rel=1e-5)
    _, (_, expected), _ = step(tiny, [batch], joint(reduction="sum"))
    assert ar == pytest.approx(expected, rel=1e-5)


def test_no_token_at_all(tiny):
    batch = noised(tiny, collator(tiny, max_length=1)(samples()))
    loss, parts, gradients = step(tiny, [batch], totals=StepTotals(0, 0, 0, 4))
    assert loss == 0
    assert parts == [0, 0]
    assert not any(gradient.any() for gradient in gradients.values())
