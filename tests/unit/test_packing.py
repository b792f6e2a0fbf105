"""Lengths measured without pixels are exact; rows are full, balanced and hold every sample once."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_collate import assert_equal_gradients, context_of, loss_and_gradients, mixed_samples, picture, sample, text
from torch.utils.data import DistributedSampler

from nemo_bard import BardVLForConditionalGeneration
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.digits import make_digits
from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.lengths import SampleSizes, measure, measured_once
from nemo_bard.data.packing import pack_dataset, plan_packs
from nemo_bard.method.corruption import corrupt_batch
from nemo_bard.method.layout import PADDING, RowOptions
from nemo_bard.method.losses import BlockDiffusionCrossEntropy
from nemo_bard.method.objectives import PBMObjective, StepTotals
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.train.pbm import PBMRecipe

ROW = 8192


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("tiny")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4)
    processor = AutoProcessor.from_pretrained(folder / "start")
    model = BardVLForConditionalGeneration.from_pretrained(folder / "start").eval()
    return SimpleNamespace(processor=processor, config=model.config, model=model)


def collator(tiny, block_size=4, **options):
    config = type(tiny.config)(**{**tiny.config.to_dict(), "block_size": block_size})
    return BlockDiffusionCollator(tiny.processor, config, **options)


def many_samples(count=24, largest=300):
    """Text only, one image, three images, several turns; many sizes."""
    dice = np.random.default_rng(0)
    out = []
    for index in range(count):
        turns = []
        for _ in range(1 + index % 3):
            images = [picture(index, int(dice.integers(20, largest))) for _ in range((0, 1, 3)[index % 5 % 3])]
            turns += [[*images, text("word " * int(dice.integers(1, 30)))], "1 2" * int(dice.integers(1, 20))]
        out.append(sample(index, *turns))
    out[-1]["conversation"].append({"role": "user", "content": [picture(1), text("thanks")]})
    return out


# ---------------------------------------------------------------- lengths


@pytest.mark.parametrize("turns", ["all", "last"])
@pytest.mark.parametrize(
    ("block_size", "options"),
    [
        (1, RowOptions()),
        (4, RowOptions(noisy_copies=2)),
        (8, RowOptions(anchor_block_size=4)),
        (8, RowOptions(anchor_block_size=4, noisy_copies=2, next_token=True)),
        (32, RowOptions(next_token=True)),
    ],
)
def test_measured_lengths_are_exact(tiny, block_size, options, turns):
    items = many_samples()
    make = collator(tiny, block_size, turns=turns, options=options)
    sizes = measure(items, make)
    encoded = [make.encode(item) for item in items]
    lengths = sizes.row_lengths(block_size, turns=turns, options=options)
    assert lengths.tolist() == [len(one) for one in encoded]
    vision = sizes.vision_tokens(block_size, options=options)
    assert vision.tolist() == [0 if one.grid_thw is None else int(one.grid_thw.prod(-1).sum()) // 4 for one in encoded]
    assert 0 in vision
    assert vision.max() > 30


def test_pixels_are_not_read(tiny, tmp_path, monkeypatch):
    """A JSONL data set is measured from image headers; an EXIF rotation changes no number of tokens."""
    rotated = Image.new("RGB", (200, 90)).getexif()
    rotated[0x0112] = 6
    Image.new("RGB", (200, 90)).save(tmp_path / "a.jpg", exif=rotated)
    turns = [{"role": "user", "content": "<image>What?"}, {"role": "assistant", "content": "Nothing."}]
    line = json.dumps({"messages": turns, "images": ["a.jpg"]})
    (tmp_path / "train.jsonl").write_text(f"{line}\n{line}\n")
    data, make = JsonlDataset(tmp_path / "train.jsonl"), collator(tiny)
    expected = [len(make.encode(data[i])) for i in range(2)]
    monkeypatch.setattr("nemo_bard.data.collate.encode", None)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", None)
    assert measure(data, make).row_lengths(4).tolist() == expected


def test_lengths_are_measured_once_and_again_when_data_or_processor_change(tiny, tmp_path, monkeypatch):
    data, make = make_digits("train", 70), collator(tiny)
    sizes, path = measured_once(data, make, tmp_path / "cache")
    assert len(sizes) == 70
    lengths, eights = sizes.row_lengths(8), collator(tiny, 8)
    for i in (0, 1, 63, 64, 69):  # on both sides of a chunk of 64
        assert lengths[i] == len(eights.encode(data[i]))
    monkeypatch.setattr("nemo_bard.data.lengths.measure", None)
    again, same = measured_once(data, collator(tiny, 32, max_length=64), tmp_path / "cache")
    assert same == path
    assert (again.responses == sizes.responses).all()
    monkeypatch.undo()
    assert measured_once(make_digits("train", 70, seed=1), make, tmp_path / "cache")[1] != path
    before = make.processor.image_processor.size
    try:
        make.processor.image_processor.size = {"shortest_edge": 1024, "longest_edge": 4096}
        assert measured_once(data, make, tmp_path / "cache")[1] != path
    finally:
        make.processor.image_processor.size = before
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"lengths-\w+\.npz cannot be read .*delete it"):
        measured_once(data, make, tmp_path / "cache")


def test_a_sample_that_cannot_be_trained_on_is_named_also_by_workers(tiny):
    items = [*many_samples(2), sample(7, "hello", "")]
    for workers in (0, 1):
        with pytest.raises(ValueError, match=r"^sample 7: assistant turn 0 is empty$"):
            measure(items, collator(tiny), num_workers=workers)


# ---------------------------------------------------------------- rows


def like_llava_onevision(count, seed=0, images=True):
    """Log-normal lengths, median 700, of context and noisy copies; with ``images`` vision tokens come on top."""
    dice = np.random.default_rng(seed)
    lengths = np.exp(dice.normal(np.log(700), 0.8, count)).astype(np.int64) + 8
    if not images:
        return lengths, np.zeros(count, dtype=np.int64)
    vision = np.clip(np.exp(dice.normal(np.log(500), 0.7, count)), 64, 3000).astype(np.int64)
    vision *= dice.random(count) < 0.7
    return lengths + vision, vision


@pytest.mark.parametrize("images", [False, True])
@pytest.mark.parametrize("count", [3000, 20000])
def test_rows_are_full_balanced_and_hold_every_sample_once(images, count):
    lengths, vision = like_llava_onevision(count, images=images)
    packs = plan_packs(lengths, vision, ROW, seed=3)
    assert sorted(packs.members.tolist()) == list(range(count))
    assert (np.diff(packs.edges) > 0).all()
    fits = lengths <= ROW
    filled = packs.sums(lengths * fits)
    assert filled.max() <= ROW - (not images), "without images one token is kept free"
    assert filled.sum() / (len(packs) * ROW) >= 0.97
    if images:
        seen = packs.sums(vision * fits)
        shuffled = np.random.default_rng(0).permutation(np.flatnonzero(fits))
        in_turn = np.cumsum(lengths[shuffled]) // ROW
        blind = np.bincount(in_turn, weights=vision[shuffled])[:-1]
        assert seen.std() / seen.mean() < 0.6 * blind.std() / blind.mean()
        # what a step waits for: the largest of 8 ranks' rows
        steps = np.random.default_rng(1).permutation(seen)[: len(seen) // 8 * 8].reshape(-1, 8)
        assert steps.max(1).mean() / seen.mean() < 1.4


def test_rows_are_a_function_of_seed_and_samples():
    lengths, vision = like_llava_onevision(3000)
    one, two, other = (plan_packs(lengths, vision, ROW, seed=seed) for seed in (1, 1, 2))
    assert (one.members == two.members).all()
    assert (one.edges == two.edges).all()
    assert len(other.members) == len(one.members)
    assert (one.members != other.members).any()
    ordered = plan_packs(lengths, vision, ROW, shuffle=False, window=1000)
    first = np.concatenate([ordered[i] for i in range(50)])
    first = first[lengths[first] <= ROW]
    assert first.max() < 1000, "without shuffle, rows follow the data set from window to window"


def test_text_only_rows_leave_room_for_the_hidden_image():
    lengths, vision = np.array([50, 50, 49, 51, 100, 10]), np.array([0, 0, 0, 20, 0, 0])
    packs = plan_packs(lengths, vision, 100, shuffle=False)
    rows = {tuple(sorted(packs[i])) for i in range(len(packs))}
    assert all(lengths[list(r)].sum() <= 100 - (vision[list(r)].sum() == 0) or r == (4,) for r in rows)
    assert (4,) in rows, "a sample of the whole length has a row of its own"


def test_too_long_samples_are_dealt_out_or_refused(tiny, tmp_path, caplog):
    items = many_samples(12)
    make = collator(tiny)
    lengths = sorted(len(make.encode(item)) for item in items)
    limit = lengths[-3]
    data = SimpleList(items)
    packed = pack_dataset(data, collator(tiny, max_length=limit), cache_dir=tmp_path, seed=0, shuffle=True)
    assert sorted(packed.packs.members.tolist()) == list(range(12))
    batches = [collator(tiny, max_length=limit)([packed[i]]) for i in range(len(packed))]
    assert sum(batch["num_dropped"] for batch in batches) == 2
    assert sum(batch["num_samples"] for batch in batches) == 10
    strict = collator(tiny, max_length=limit, overlong="error")
    with pytest.raises(ValueError, match=r"^sample \d+ takes \d+ tokens .* so do 1 others; raise max_length"):
        pack_dataset(data, strict, cache_dir=tmp_path, seed=0, shuffle=True)
    with pytest.raises(ValueError, match="none of the 12 samples fits"):
        pack_dataset(data, collator(tiny, max_length=9), cache_dir=tmp_path, seed=0, shuffle=True)


class SimpleList(list):
    def fingerprint(self):
        return "simple"


def test_row_of_text_only_samples_runs_the_vision_tower_within_the_length(tiny, tmp_path):
    items = SimpleList([sample(i, "Say it", "yes " * (3 + i)) for i in range(6)])
    total = sum(len(collator(tiny).encode(item)) for item in items)
    for limit, rows in ((total + 1, 1), (total, 2)):
        make = collator(tiny, max_length=limit, max_row_length=limit)
        packed = pack_dataset(items, make, cache_dir=tmp_path, seed=0, shuffle=True)
        assert len(packed) == rows
        for i in range(rows):
            batch = make([packed[i]])
            assert batch["image_grid_thw"].tolist() == [[1, 2, 2]]
            assert batch["input_ids"].shape[1] <= limit
            hidden = batch["input_ids"] == tiny.config.image_token_id
            assert hidden.sum() == 1
            assert (batch["sample_ids"][hidden] == PADDING).all()


def test_row_longer_than_planned_is_refused(tiny):
    """An image file that has changed since its length was measured."""
    items = mixed_samples()
    make = collator(tiny)
    total = sum(len(make.encode(item)) for item in items)
    assert collator(tiny, max_row_length=total)([items])["input_ids"].shape == (1, total)
    with pytest.raises(
        ValueError, match=rf"samples 0, 1, 2, 3 share a row and take {total} tokens, more than {total - 1}"
    ):
        collator(tiny, max_row_length=total - 1, max_length=total - 1)([items])


# ---------------------------------------------------------------- training on rows


@pytest.mark.parametrize("turns", ["all", "last"])
def test_packed_run_has_the_loss_and_gradients_of_the_unpacked_one(tiny, tmp_path, turns):
    """Float64, so that what remains is not rounding; images, several turns and text-only samples share rows."""
    items, settings, context = SimpleList(many_samples(8, largest=100)), NoiseSettings(), context_of(tiny)
    make = collator(tiny, turns=turns, max_length=400)
    packed = pack_dataset(items, make, cache_dir=tmp_path, seed=0, shuffle=True)
    assert 2 < len(packed) < 7
    runs = {
        "unpacked": [make([item]) for item in items],
        "packed": [make([packed[i]]) for i in range(len(packed))],
        "packed, two rows": [
            make([packed[i] for i in range(j, min(j + 2, len(packed)))]) for j in range(0, len(packed), 2)
        ],
    }
    model = tiny.model.double()
    try:
        results = {}
        for name, batches in runs.items():
            noised = [corrupt_batch(batch, settings, context) for batch in batches]
            assert sum(batch["num_samples"] for batch in batches) == 8
            totals = StepTotals(8, sum(int(batch["loss_mask"].sum()) for batch in noised), 0, 0)
            weighed = [
                {
                    **batch,
                    "pixel_values": batch["pixel_values"].double(),
                    "output_weight": batch["output_weight"].double(),
                }
                for batch in (PBMObjective(BlockDiffusionCrossEntropy()).weigh(batch, totals) for batch in noised)
            ]
            results[name] = loss_and_gradients(model, weighed)
    finally:
        model.float()
    loss, gradients = results.pop("unpacked")
    for value, other in results.values():
        assert value == pytest.approx(loss, rel=1e-6)
        assert_equal_gradients(gradients, other)


def test_every_sample_counts_once_in_an_epoch_over_ranks(tiny, tmp_path):
    """The sampler repeats rows to give all ranks equally many; their samples do not count twice."""
    items = SimpleList(many_samples(16, largest=100))
    make = collator(tiny, max_length=400)
    packed = pack_dataset(items, make, cache_dir=tmp_path, seed=0, shuffle=True)
    ranks, per_batch, seen = next(ranks for ranks in (3, 4, 5) if len(packed) % ranks), 2, []
    for rank in range(ranks):
        sampler = DistributedSampler(packed, num_replicas=ranks, rank=rank, shuffle=True)
        loader = torch.utils.data.DataLoader(packed, batch_size=per_batch, sampler=sampler, collate_fn=make)
        for position, batch in enumerate(loader):
            counted = PBMRecipe._without_repeats(batch, loader, position)
            assert counted["num_samples"] == len(counted["noise_keys"])
            tokens = {(row, number) for row, number, _ in counted["noise_keys"]}
            left = counted["sample_ids"]
            assert {(r, int(s)) for r in range(len(left)) for s in left[r].unique() if s != PADDING} == tokens
            seen += [index for _, _, index in counted["noise_keys"]]
    assert sorted(seen) == list(range(16))


def test_sizes_survive_a_file(tmp_path):
    sizes = SampleSizes(
        response_edges=np.array([0, 1, 3]),
        responses=np.array([[3, 9], [2, 4], [9, 30]], dtype=np.int32),
        media_edges=np.array([0, 0, 2]),
        media=np.array([[0, 2], [25, 4]], dtype=np.int32),
    )
    sizes.save(tmp_path / "new" / "sizes.npz")
    loaded = SampleSizes.load(tmp_path / "new" / "sizes.npz")
    assert loaded.row_lengths(4).tolist() == [3 + 4 + 8, 9 + 20 + 4 + 24]
    assert loaded.row_lengths(4, turns="last").tolist() == [15, 29 + 24]
    assert loaded.vision_tokens(4).tolist() == [0, 6]
    assert loaded.vision_tokens(32).tolist() == [0, 2]
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["sizes.npz"]
