"""The collator against the reference's collate cases and on real conversations; noise and weights of a batch."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.data.collate import IGNORE_INDEX, BlockDiffusionCollator, lay_out_sample
from nemo_bard.data.encode import find_media
from nemo_bard.method.corruption import NoiseContext, corrupt_batch, loss_weight, without_samples
from nemo_bard.method.layout import NOISY, PADDING, find_responses
from nemo_bard.method.losses import BlockDiffusionCrossEntropy, MixturePathKL
from nemo_bard.method.noise import NOISES
from nemo_bard.method.objectives import PBMObjective, StepTotals, count
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.masks import dense_mask

GOLDEN = Path(__file__).parents[1] / "golden" / "collate"
CASES = json.loads((GOLDEN / "cases.json").read_text())


@pytest.fixture(scope="module")
def golden_config():
    return BardVLConfig.from_pretrained(
        GOLDEN.parent / "models" / "tiny_tied",
        mask_token_id=509,
        eos_token_id=505,
        assistant_header_ids=[504, 507, 508],
        block_size=8,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Processor, configuration and model of a tiny checkpoint at block size 4."""
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("tiny")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4)
    processor = AutoProcessor.from_pretrained(folder / "start")
    model = BardVLForConditionalGeneration.from_pretrained(folder / "start").eval()
    return SimpleNamespace(processor=processor, config=model.config, model=model)


def weigh(batch, reduction, totals):
    return PBMObjective(BlockDiffusionCrossEntropy(reduction)).weigh(batch, totals)


def collator(tiny, **options):
    return BlockDiffusionCollator(tiny.processor, tiny.config, **options)


def picture(seed, size=64):
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 3), dtype=np.uint8)
    return {"type": "image", "image": Image.fromarray(pixels)}


def text(value):
    return {"type": "text", "text": value}


def sample(index, *turns):
    """Turns are lists of parts or texts; users and assistants take them in turns, the user first."""
    conversation = [
        {"role": ("user", "assistant")[i % 2], "content": turn if isinstance(turn, list) else [text(turn)]}
        for i, turn in enumerate(turns)
    ]
    return {"conversation": conversation, "sample_index": index}


def mixed_samples():
    return [
        sample(0, [picture(0), text("Read the digits.")], "1 2 3 4 5 6 7"),
        sample(1, "Say a number", "eleven"),
        sample(2, [picture(1), text("and"), picture(2, 32)], "no", [text("again"), picture(3)], "yes yes yes yes 9"),
        sample(3, "Say it", "a", "more", "b c d e f g h i j k"),
    ]


# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_rows_are_the_reference_rows(case, golden_config):
    """Positions, labels and weights of the noisy copy; the context but for clean padding and the last clean block."""
    golden = np.load(GOLDEN / case["file"])
    stub = BlockDiffusionCollator(None, golden_config)
    for i, spans in enumerate(case["samples"]):
        start, end, padded = (spans[k] for k in ("response_start", "response_end", "response_len_padded"))
        ids = torch.from_numpy(golden[f"raw_ids_{i}"])
        grids = golden.get(f"image_grid_thw_{i}")
        inputs = {} if grids is None else {"image_grid_thw": torch.from_numpy(grids)}
        responses = find_responses(ids, [504, 507, 508], [505])
        assert responses[-1] == (start, end)
        ours = lay_out_sample(
            ids,
            stub._positions(ids, inputs),
            responses,
            case["block_size"],
            supervised=[len(responses) - 1],
            pad_token_id=case["pad_token_id"],
        )
        noisy = ours.branch == NOISY
        theirs = slice(start + padded, start + 2 * padded)
        assert spans["full_len"] == start + 2 * padded
        assert noisy.sum() == padded
        torch.testing.assert_close(ours.labels[noisy], torch.from_numpy(golden["labels"][i, theirs]))
        torch.testing.assert_close(ours.position_ids[:, noisy], torch.from_numpy(golden["position_ids"][:, i, theirs]))
        kept = int((~noisy).sum())
        assert kept == end - 1 - (end - 1 - start) % case["block_size"]
        torch.testing.assert_close(ours.input_ids[:kept], ids[:kept])
        torch.testing.assert_close(ours.position_ids[:, :kept], torch.from_numpy(golden["position_ids"][:, i, :kept]))
        assert (ours.labels[:kept] == IGNORE_INDEX).all()
        drawn = torch.from_numpy(golden[f"noisy_t_{i}"])
        batch = {"padding_mask": ours.padding[noisy], "response_ids": ours.response[noisy]}
        level = golden["t"][i, theirs] if case["prior_dist"] != "Uniform" else None
        if level is not None:
            torch.testing.assert_close(loss_weight(drawn, batch), 1 / torch.from_numpy(level), rtol=1e-6, atol=0)
        torch.testing.assert_close(
            batch["padding_mask"], torch.arange(padded) >= end - start, msg="padding starts behind the end token"
        )


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_loss_mask_follows_the_reference(case, golden_config, monkeypatch):
    """Given the noisy ids that the reference drew, the same tokens are supervised."""
    golden = np.load(GOLDEN / case["file"])
    name = {"Mask": "mask", "Uniform": "uniform", "Mix": "mixed"}[case["prior_dist"]]
    stub = BlockDiffusionCollator(None, golden_config)
    rows, drawn = [], []
    for i, spans in enumerate(case["samples"]):
        ids = torch.from_numpy(golden[f"raw_ids_{i}"])
        ids = ids.masked_fill(ids == golden_config.image_token_id, 1)
        span = (spans["response_start"], spans["response_end"])
        positions = torch.arange(len(ids)).expand(3, -1)
        pad = case["pad_token_id"]
        rows.append([lay_out_sample(ids, positions, [span], case["block_size"], pad_token_id=pad, sample_index=i)])
        drawn.append(torch.from_numpy(golden[f"noisy_ids_{i}"]))

    class Replay(NOISES.get(name)):
        def corrupt(self, clean_ids, t, **kwargs):
            real = super().corrupt(clean_ids, t, **kwargs)
            noisy = drawn.pop(0)
            rule = {
                "mask": noisy == 509,
                "uniform": torch.ones_like(noisy, dtype=torch.bool),
                "mixed": noisy != clean_ids,
            }
            return real._replace(noisy_ids=noisy, loss_mask=rule[name])

    monkeypatch.setitem(NOISES._things, name, Replay)
    context = NoiseContext(block_size=case["block_size"], mask_token_id=509, num_random_ids=500, seed=0, epoch=0)
    batch = corrupt_batch(stub.stack(rows), NoiseSettings(name=name), context)
    for i, spans in enumerate(case["samples"]):
        padded = spans["response_len_padded"]
        theirs = slice(spans["response_start"] + padded, spans["response_start"] + 2 * padded)
        noisy = (batch["branch_ids"][i] == NOISY) & (batch["sample_ids"][i] != PADDING)
        torch.testing.assert_close(batch["input_ids"][i][noisy], torch.from_numpy(golden["input_ids"][i, theirs]))
        torch.testing.assert_close(batch["loss_mask"][i][noisy], torch.from_numpy(golden["loss_mask"][i, theirs]))
        assert not batch["loss_mask"][i][~noisy].any()


# ---------------------------------------------------------------- batches


def test_batch_is_what_the_architecture_says(tiny):
    batch = collator(tiny, pad_to_multiple_of=16)(mixed_samples())
    rows, length = batch["input_ids"].shape
    assert rows == 4
    assert length % 16 == 0
    assert batch["position_ids"].shape == (3, rows, length)
    for name in ("labels", "sample_ids", "branch_ids", "block_ids", "response_ids", "padding_mask"):
        assert batch[name].shape == (rows, length), name
    assert batch["noise_keys"] == [(i, 0, i) for i in range(4)]
    assert batch["num_samples"] == 4
    assert batch["num_dropped"] == 0
    noisy = batch["branch_ids"] == NOISY
    assert ((batch["labels"] != IGNORE_INDEX) == noisy).all()
    assert (batch["input_ids"][noisy] == batch["labels"][noisy]).all()
    assert ((batch["response_ids"] >= 0) == noisy).all()
    assert batch["response_ids"].unique().tolist() == [-1, 0, 1, 2, 3, 4, 5]
    assert batch["image_grid_thw"].shape == (4, 3)
    end = tiny.config.end_ids[0]
    assert (batch["labels"][batch["padding_mask"]] == end).all()
    images = (batch["input_ids"] == tiny.config.image_token_id).sum()
    assert images == batch["image_grid_thw"].prod(-1).sum() // 4


def test_noisy_copy_decodes_to_the_answer_and_sits_at_its_positions(tiny):
    batch = collator(tiny)([mixed_samples()[2]])
    decode = tiny.processor.tokenizer.decode
    row = batch["response_ids"][0]
    answers = [decode(batch["labels"][0][row == r], skip_special_tokens=True) for r in (0, 1)]
    assert answers == ["no", "yes yes yes yes 9"]
    first = row == 0
    clean = tiny.processor.tokenizer("no<|im_end|>").input_ids
    context = batch["input_ids"][0][batch["branch_ids"][0] != NOISY].tolist()
    start = next(i for i in range(len(context)) if context[i : i + len(clean)] == clean)
    expected = batch["position_ids"][:, 0, start : start + len(clean)]
    torch.testing.assert_close(batch["position_ids"][:, 0, first][:, : len(clean)], expected)
    steps = batch["position_ids"][0, 0, first].diff()
    assert (steps == 1).all(), "padding goes on counting"


def test_last_turn_only(tiny):
    batch = collator(tiny, turns="last")([mixed_samples()[3]])
    assert batch["response_ids"].unique().tolist() == [-1, 0]
    decoded = tiny.processor.tokenizer.decode(
        batch["labels"][0][batch["response_ids"][0] == 0], skip_special_tokens=True
    )
    assert decoded == "b c d e f g h i j k"


def test_overlong_sample_is_dropped_counted_and_logged_or_refused(tiny, caplog):
    samples = mixed_samples()
    lengths = [len(collator(tiny).encode(s)) for s in samples]
    limit = sorted(lengths)[-2]
    batch = collator(tiny, max_length=limit)(samples)
    assert batch["num_samples"] == 3
    assert batch["num_dropped"] == 1
    assert batch["slots"] == [i for i in range(4) if i != lengths.index(max(lengths))]
    assert f"takes {max(lengths)} tokens" in caplog.text
    with pytest.raises(ValueError, match=r"sample 3 takes \d+ tokens .*max_length"):
        collator(tiny, max_length=limit, overlong="error")(samples)


def test_pixels_come_in_the_dtype_that_is_asked_for(tiny):
    make, rows = collator(tiny), [sample(0, [picture(0), text("what?")], "a picture"), sample(1, "hello", "hello you")]
    plain = [make(examples) for examples in (rows, rows[1:])]
    make.pixel_dtype = torch.bfloat16
    for before, after in zip(plain, (make(examples) for examples in (rows, rows[1:])), strict=True):
        assert before["pixel_values"].dtype == torch.float32
        assert after["pixel_values"].dtype == torch.bfloat16
        assert torch.equal(before["pixel_values"].bfloat16(), after["pixel_values"])


def test_rows_are_padded_to_the_shortest_that_is_asked_for(tiny):
    make = collator(tiny, pad_to_multiple_of=128)
    assert make([sample(0, "hello", "hello you")])["input_ids"].shape == (1, 128)
    make.shortest_row = 256
    assert make([sample(0, "hello", "hello you")])["input_ids"].shape == (1, 256)


def test_batch_without_any_sample_still_runs_the_vision_tower(tiny):
    batch = collator(tiny, max_length=1)(mixed_samples())
    assert batch["num_samples"] == 0
    assert (batch["sample_ids"] == PADDING).all()
    batch = weigh(corrupt_batch(batch, NoiseSettings(), context_of(tiny)), "mean", StepTotals(0, 0, 0, 0))
    loss, gradients = loss_and_gradients(tiny.model, [batch])
    assert loss == 0
    assert all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_media_behind_the_last_answer_is_left_out(tiny):
    item = mixed_samples()[0]
    item["conversation"].append({"role": "user", "content": [picture(9), text("thanks")]})
    batch = collator(tiny)([item])
    assert len(batch["image_grid_thw"]) == 1


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (["hello"], "sample 7 has no assistant turn"),
        (["hello", ""], "sample 7: assistant turn 0 is empty"),
        (["<|im_start|>assistant\nhello<|im_end|>", "a"], "sample 7 has 1 assistant turns but 2 responses"),
        (["<|image_pad|>", "a"], "sample 7: 1 image tokens but 0 images of 0 tokens"),
    ],
)
def test_conversation_that_cannot_be_trained_on_is_refused(tiny, turns, message):
    with pytest.raises(ValueError, match=message):
        collator(tiny)([sample(7, *turns)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"turns": "first"}, "turns must be one of all, last, got 'first'"),
        ({"overlong": "cut"}, "overlong must be one of drop, error"),
        ({"max_length": 0}, "max_length must be an integer >= 1"),
        ({"pad_to_multiple_of": 1.5}, "pad_to_multiple_of must be an integer"),
    ],
)
def test_wrong_setting_is_refused(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        collator(tiny, **options)


def test_configuration_without_block_size_is_refused(tiny):
    config = BardVLConfig(**{**tiny.config.to_dict(), "block_size": None})
    with pytest.raises(ValueError, match="config.json has no block_size"):
        BlockDiffusionCollator(tiny.processor, config)([sample(7, "hello", "a")])


# ---------------------------------------------------------------- noise of a batch


def context_of(tiny, **changes):
    values = {
        "block_size": tiny.config.block_size,
        "mask_token_id": tiny.config.mask_token_id,
        "num_random_ids": tiny.processor.tokenizer.vocab_size,
        "seed": 5,
        "epoch": 0,
    }
    return NoiseContext(**{**values, **changes})


def noisy_part(batch, number):
    row, sample_id, _ = batch["noise_keys"][number]
    inside = (batch["sample_ids"][row] == sample_id) & (batch["branch_ids"][row] == NOISY)
    return {k: batch[k][row][inside] for k in ("input_ids", "labels", "loss_mask", "loss_weight")}


@pytest.mark.parametrize("name", list(NOISES))
@pytest.mark.parametrize("per", ["block", "sample"])
def test_noise_depends_on_the_sample_alone(tiny, name, per):
    settings, samples, make = NoiseSettings(name=name, per=per), mixed_samples(), collator(tiny)
    together = corrupt_batch(make(samples), settings, context_of(tiny))
    packed = corrupt_batch(
        make.stack([[make.encode(samples[3]), make.encode(samples[1])], [make.encode(samples[2])]]),
        settings,
        context_of(tiny),
    )
    for number, index in enumerate((3, 1, 2)):
        for key, value in noisy_part(packed, number).items():
            torch.testing.assert_close(value, noisy_part(together, index)[key])
    other = corrupt_batch(make(samples), settings, context_of(tiny, epoch=1))
    assert not torch.equal(other["input_ids"], together["input_ids"])


@pytest.mark.parametrize("name", list(NOISES))
def test_corruption_leaves_the_context_and_the_clean_ids_alone(tiny, name):
    clean = collator(tiny)(mixed_samples())
    before = clean["input_ids"].clone()
    noised = corrupt_batch(clean, NoiseSettings(name=name), context_of(tiny))
    torch.testing.assert_close(clean["input_ids"], before)
    context = clean["branch_ids"] != NOISY
    torch.testing.assert_close(noised["input_ids"][context], before[context])
    assert (noised["labels"][noised["loss_mask"]] == before[noised["loss_mask"]]).all()
    assert (noised["labels"][~noised["loss_mask"]] == IGNORE_INDEX).all()
    masked = noised["input_ids"] == tiny.config.mask_token_id
    if name == "mask":
        torch.testing.assert_close(noised["loss_mask"], masked)
    elif name == "uniform":
        assert not masked.any()
        torch.testing.assert_close(noised["loss_mask"], ~context)


def test_weight_is_one_over_t_and_half_on_padding(tiny):
    noised = corrupt_batch(collator(tiny)(mixed_samples()), NoiseSettings(low=0.25, high=0.25), context_of(tiny))
    noisy = noised["branch_ids"] == NOISY
    expected = torch.where(noised["padding_mask"], 2.0, 4.0) * noisy
    torch.testing.assert_close(noised["loss_weight"], expected)


def test_one_level_per_sample(tiny):
    noised = corrupt_batch(collator(tiny)(mixed_samples()), NoiseSettings(per="sample"), context_of(tiny))
    for number in range(4):
        row = noised["noise_keys"][number][0]
        text_tokens = (noised["branch_ids"][row] == NOISY) & ~noised["padding_mask"][row]
        assert len(noised["loss_weight"][row][text_tokens].unique()) == 1


def test_repeated_samples_do_not_count(tiny):
    full = collator(tiny)(mixed_samples())
    batch = without_samples(full, {1, 3})
    assert batch["num_samples"] == 2
    assert batch["noise_keys"] == [(0, 0, 0), (2, 0, 2)]
    noised = corrupt_batch(batch, NoiseSettings(name="uniform"), context_of(tiny))
    assert not noised["loss_mask"][[1, 3]].any()
    assert noised["loss_mask"][[0, 2]].any(-1).all()
    assert without_samples(full, set()) is full


# ---------------------------------------------------------------- loss and gradients


def run_model(model, batch):
    return model(
        input_ids=batch["input_ids"],
        attention_mask=dense_mask(batch, model.config.context_attention),
        position_ids=batch["position_ids"],
        pixel_values=batch["pixel_values"],
        image_grid_thw=batch["image_grid_thw"],
        output_positions=batch["output_positions"],
    ).logits


def loss_and_gradients(model, batches, loss_fn=None):
    loss_fn = loss_fn or BlockDiffusionCrossEntropy()
    model.zero_grad()
    total = 0.0
    for batch in batches:
        where = batch["output_positions"]
        loss = loss_fn(
            run_model(model, batch),
            batch["labels"].flatten()[where],
            weight=batch["output_weight"],
            noisy_ids=batch["input_ids"].flatten()[where],
        )
        loss.backward()
        total += loss.item()
    return total, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def assert_equal_gradients(one, other):
    scale = max(gradient.abs().max() for gradient in one.values())
    for name, gradient in one.items():
        assert (gradient - other[name]).abs().max() <= 1e-5 * scale, name


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("noise", "loss"), [("mask", BlockDiffusionCrossEntropy), ("uniform", MixturePathKL)])
def test_loss_and_gradients_do_not_depend_on_the_split_or_on_packing(tiny, reduction, noise, loss):
    settings, context, make, samples = NoiseSettings(name=noise), context_of(tiny), collator(tiny), mixed_samples()
    encoded = [make.encode(item) for item in samples]
    layouts = {
        "one batch": [make(samples)],
        "two batches": [make(samples[:1]), make(samples[1:])],
        "four batches": [make([item]) for item in samples],
        "packed": [make.stack([encoded[:2], encoded[2:]])],
        "packed in one row": [make.stack([encoded])],
    }
    results = {}
    for name, batches in layouts.items():
        noised = [corrupt_batch(batch, settings, context) for batch in batches]
        totals = StepTotals(4, sum(int(batch["loss_mask"].sum()) for batch in noised), 0, 0)
        weighed = [weigh(batch, reduction, totals) for batch in noised]
        results[name] = loss_and_gradients(tiny.model, weighed, loss(reduction))
    whole_loss, whole = results.pop("one batch")
    assert whole_loss > 0
    for value, gradients in results.values():
        assert value == pytest.approx(whole_loss, rel=1e-5)
        assert_equal_gradients(whole, gradients)


def test_nobody_sees_the_hidden_image(tiny):
    """A text-only batch gives the loss that it gives without its hidden image, and the vision tower a zero gradient."""
    batch = corrupt_batch(collator(tiny)([mixed_samples()[1]]), NoiseSettings(low=0.5), context_of(tiny))
    batch = weigh(batch, "mean", StepTotals(1, 1, 0, 0))
    assert (batch["input_ids"] == tiny.config.image_token_id).sum() == 1
    logits = run_model(tiny.model, batch)
    bare = {**batch, "pixel_values": None, "image_grid_thw": None}
    other = run_model(tiny.model, {**bare, "input_ids": batch["input_ids"].masked_fill(batch["sample_ids"] < 0, 3)})
    torch.testing.assert_close(logits, other, rtol=0, atol=1e-5)
    _, gradients = loss_and_gradients(tiny.model, [batch])
    vision = [gradient for name, gradient in gradients.items() if "visual" in name]
    assert vision
    assert not any(gradient.any() for gradient in vision)


def test_padding_gives_no_nan(tiny):
    batch = collator(tiny, pad_to_multiple_of=256)(mixed_samples()[:2])
    batch = weigh(corrupt_batch(batch, NoiseSettings(), context_of(tiny)), "mean", StepTotals(2, 1, 0, 0))
    loss, gradients = loss_and_gradients(tiny.model, [batch])
    assert np.isfinite(loss)
    assert all(gradient.isfinite().all() for gradient in gradients.values())


def test_videos_among_images_give_the_features_that_qwen3_vl_gives(tiny):
    """Patches of images and videos join in the order of their placeholders; logits equal Qwen3-VL's own."""
    generator = torch.Generator().manual_seed(0)
    ids = tiny.config
    video, image = ids.video_token_id, ids.image_token_id
    opening = ids.vision_start_token_id
    tokens = [5, opening, *[video] * 2, 6, opening, *[video] * 2, 7, opening, image, 8, opening, *[video] * 2, 9, 10]
    input_ids = torch.tensor(tokens)
    inputs = {
        "pixel_values": torch.randn(4, 1536, generator=generator),
        "image_grid_thw": torch.tensor([[1, 2, 2]]),
        "pixel_values_videos": torch.randn(16 + 8, 1536, generator=generator),
        "video_grid_thw": torch.tensor([[2, 2, 4], [1, 2, 4]]),
    }
    make = collator(tiny)
    positions = make._positions(input_ids, inputs)
    media = find_media(input_ids, inputs, make._media_tokens)
    assert [tuple(medium.grid.tolist()) for medium in media] == [(2, 2, 4), (1, 2, 2), (1, 2, 4)]
    mask = torch.ones(len(tokens), len(tokens), dtype=torch.bool).tril()[None, None]
    common = {"attention_mask": mask, "position_ids": positions[:, None]}
    with torch.no_grad():
        theirs = tiny.model(input_ids=input_ids[None], **common, **inputs).logits
        ours = tiny.model(
            input_ids=input_ids.masked_fill(input_ids == video, image)[None],
            pixel_values=torch.cat([medium.patches for medium in media]),
            image_grid_thw=torch.stack([medium.grid for medium in media]),
            **common,
        ).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_counts_of_a_step(tiny):
    noised = [corrupt_batch(collator(tiny)(mixed_samples()), NoiseSettings(name="uniform"), context_of(tiny))] * 2
    totals = count(noised)
    assert totals.num_samples == 8
    assert totals.num_loss_tokens == 2 * int((noised[0]["branch_ids"] == NOISY).sum())
    assert totals.num_tokens == 2 * int((noised[0]["sample_ids"] != PADDING).sum())
