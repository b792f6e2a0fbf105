"""The PBM recipe for real: one and two ranks, interrupted and resumed, exported and learnt by heart."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STEPS = 8
TRAIN = {
    "step_scheduler.global_batch_size": 4,
    "step_scheduler.local_batch_size": 2,
    "step_scheduler.max_steps": STEPS,
    "step_scheduler.ckpt_every_steps": 100,
    "step_scheduler.val_every_steps": 4,
    "dataloader.collate_fn.pad_to_multiple_of": 1,
    "lr_scheduler.lr_warmup_steps": 1,
    "optimizer.lr": 1e-3,
    "model.block_size": 8,
}
JOINT = {
    "model.context_attention": "causal",
    "ar_loss_weight": 0.5,
    "noise.complementary": True,
    "noise.low": 0.1,
    "noise.schedule": [{"until": 0.3, "high": 0.6}, {"until": 0.7, "ramp": True}, {"per": "sample"}],
}
"""Noise and its complement under a curriculum of levels, with the joint autoregressive loss."""
COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


def write_data(folder: Path, samples: int) -> Path:
    """Images of four squares and their colours, text-only samples, and two-turn samples with two images, in turns."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    lines = []
    for index in range(samples):
        names = [str(name) for name in generator.choice(list(COLOURS), 4)]
        pixels = np.array([COLOURS[name] for name in names], dtype=np.uint8).reshape(2, 2, 3)
        Image.fromarray(pixels.repeat(32, 0).repeat(32, 1)).save(folder / f"{index}.png")
        answer = " ".join(names)
        messages = [{"role": "user", "content": "<image>Name each colour"}, {"role": "assistant", "content": answer}]
        images = [f"{index}.png"]
        if index % 3 == 1:
            messages, images = (
                [{"role": "user", "content": "Say a number"}, {"role": "assistant", "content": "1" * index}],
                [],
            )
        elif index % 3 == 2:
            messages += [
                {"role": "user", "content": "<image>and the first"},
                {"role": "assistant", "content": names[0]},
            ]
            images *= 2
        lines.append(json.dumps({"messages": messages, "images": images}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def write_mixture(folder: Path, samples: int) -> Path:
    """Every second sample is text only: of two ranks, each reading every second sample, one sees no image at all."""
    folder.mkdir()
    generator = np.random.default_rng(1)
    for index in range(3):
        pixels = generator.integers(0, 255, (40 + 30 * index, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    lines = []
    for index in range(samples):
        images = [] if index % 2 else [["0.png"], ["0.png", "1.png", "2.png"]][index // 2 % 2]
        messages = [
            {"role": "user", "content": "<image>" * len(images) + "What is there"},
            {"role": "assistant", "content": "word " * (1 + index % 5)},
        ]
        if index % 3 == 0:
            more = ["2.png"] if images else []
            messages += [
                {"role": "user", "content": "<image>" * len(more) + "And then"},
                {"role": "assistant", "content": "the end of it"},
            ]
            images = images + more
        lines.append(json.dumps({"messages": messages, "images": images}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def drive(jobs: list[dict], folder: Path, *, ranks: int = 1) -> str:
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [*start, str(HERE / "pbm_driver.py"), str(file)], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stderr


def read_log(folder: Path, name: str = "training") -> list[dict]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """``one`` and ``two`` ranks on the same mixed data; ``cut`` is stopped mid-epoch by SIGTERM and goes on."""
    folder = tmp_path_factory.mktemp("runs")
    data = write_data(folder / "data", 11)

    mixture = str(write_mixture(folder / "mixture", 12))

    def job(name, **changes):
        where = {
            "model.pretrained_model_name_or_path": str(start),
            "dataset.path": str(data),
            "validation_dataset": {"_target_": "nemo_bard.data.JsonlDataset", "path": str(data)},
            "checkpoint.checkpoint_dir": str(folder / name),
        }
        return {"overrides": {**TRAIN, **where, **changes}}

    short = {"step_scheduler.max_steps": 3, "step_scheduler.val_every_steps": 100}
    all_at_once = {**short, "step_scheduler.global_batch_size": 12}
    rows = {"packing.max_length": 160, "packing.cache_dir": str(folder / "lengths")}
    row_steps = {**rows, "step_scheduler.global_batch_size": 2, "step_scheduler.local_batch_size": 1}
    row_steps = {**row_steps, **short, "step_scheduler.max_steps": 5}
    mixed = {**short, "dataset.path": mixture, "dataloader.shuffle": False}
    on_both = {
        "packed": {**all_at_once, **rows},
        "rows": row_steps,
        "mixed": mixed,
        "mixed_last": {**mixed, "dataloader.collate_fn.turns": "last", "packing.max_length": 200},
    }

    log = drive(
        [
            job("one"),
            {**job("cut"), "sigterm_at": 4},
            job("cut"),
            {**job("edge"), "sigterm_at": 5},
            job("edge"),
            job("workers", **{"dataloader.num_workers": 2, "step_scheduler.local_batch_size": 4}),
            job(
                "uniform",
                **{
                    "noise.name": "uniform",
                    "loss_fn": {"_target_": "nemo_bard.method.MixturePathKL", "reduction": "sum"},
                    "step_scheduler.max_steps": 3,
                },
            ),
            job("whole", **all_at_once),
            *(job(name, **changes) for name, changes in on_both.items()),
            {**job("rows_cut", **row_steps), "sigterm_at": 1},
            job("rows_cut", **row_steps),
            job("short", **{"dataloader.collate_fn.max_length": 48, "step_scheduler.max_steps": 3}),
            job("joint", **JOINT),
            {**job("joint_cut", **JOINT), "sigterm_at": 4},
            job("joint_cut", **JOINT),
            job(
                "phases",
                **{
                    "noise.schedule": [{"until": 0.5, "name": "mask", "high": 0.5}, {"name": "mixed", "low": 0.2}],
                    "step_scheduler.max_steps": None,
                    "step_scheduler.num_epochs": 2,
                },
            ),
        ],
        folder,
    )
    drive(
        [
            job("two"),
            *(job(f"{name}_two", **changes) for name, changes in on_both.items()),
            job("joint_two", **JOINT),
            job(
                "uniform_two",
                **{
                    "noise.name": "uniform",
                    "loss_fn": {"_target_": "nemo_bard.method.MixturePathKL", "reduction": "sum"},
                    "step_scheduler.max_steps": 3,
                },
            ),
        ],
        folder,
        ranks=2,
    )
    return folder, log


@pytest.mark.parametrize(
    ("one", "two", "steps"), [("one", "two", STEPS), ("uniform", "uniform_two", 3), ("joint", "joint_two", STEPS)]
)
def test_two_ranks_give_the_loss_and_gradient_of_one(runs, one, two, steps):
    """11 samples with text-only ones: ranks differ in images, and the last step of an epoch has repeated samples."""
    folder, _ = runs
    first, second = read_log(folder / one), read_log(folder / two)
    assert len(first) == len(second) == steps
    assert [line["num_samples"] for line in first[:3]] == [4, 4, 3]
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm", *(("ar_loss", "diffusion_loss") if one == "joint" else ())):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
        for key in ("num_samples", "num_loss_tokens", "num_tokens_per_step", "num_ar_tokens", "noise_high"):
            assert a.get(key) == b.get(key), (a["step"], key)


@pytest.mark.parametrize("name", ["packed", "rows", "mixed", "mixed_last"])
def test_packed_and_mixed_data_give_the_same_on_two_ranks(runs, name):
    """``mixed``: one rank has text only. ``rows`` and ``packed``: rows of several samples."""
    folder, _ = runs
    first, second = read_log(folder / name), read_log(folder / f"{name}_two")
    assert len(first) == len(second) == (5 if name == "rows" else 3)
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=1e-4), (a["step"], key)
        for key in ("num_samples", "num_loss_tokens", "num_tokens_per_step"):
            assert a[key] == b[key], (a["step"], key)


@pytest.mark.parametrize("name", ["packed", "packed_two"])
def test_packed_run_is_the_unpacked_one(runs, name):
    """All samples in every step, so that only the rows differ: 11 of their own, or fewer that they share."""
    folder, log = runs
    unpacked, packed = read_log(folder / "whole"), read_log(folder / name)
    for a, b in zip(unpacked, packed, strict=True):
        assert a["num_samples"] == b["num_samples"] == 11
        assert a["num_loss_tokens"] == b["num_loss_tokens"]
        # the first step has equal weights; afterwards AdamW amplifies rounding of tiny gradients
        tolerance = 1e-5 if a["step"] == 0 else 1e-3
        assert a["loss"] == pytest.approx(b["loss"], rel=tolerance), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=tolerance), a["step"]
        if name == "packed":  # on two ranks a row is repeated, which does not count
            assert b["fill"] > a["fill"]
    assert "packing: 11 samples in" in log
    assert "of at most 160 tokens" in log
    assert len(list((folder / "lengths").glob("lengths-*"))) == 1, "one file of lengths for all runs on these samples"


def test_epoch_of_rows_holds_every_sample_once_and_can_be_interrupted(runs):
    folder, _ = runs
    whole, cut = read_log(folder / "rows"), read_log(folder / "rows_cut")
    first_epoch = [line for line in whole if line["epoch"] == 0]
    assert 1 < len(first_epoch) < 5
    assert sum(line["num_samples"] for line in first_epoch) == 11
    assert [line["step"] for line in cut] == list(range(5))
    for a, b in zip(whole, cut, strict=True):
        assert a["epoch"] == b["epoch"]
        assert a["num_samples"] == b["num_samples"]
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6), a["step"]


def test_validation_is_the_same_on_two_ranks_and_counts_every_sample_once(runs):
    folder, _ = runs
    first, second = read_log(folder / "one", "validation"), read_log(folder / "two", "validation")
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
        assert a["num_samples"] == b["num_samples"] == 11
    assert first[0]["num_label_tokens"] == first[1]["num_label_tokens"], "the noise of validation never changes"


@pytest.mark.parametrize(("uncut", "name"), [("one", "cut"), ("one", "edge"), ("joint", "joint_cut")])
def test_interrupted_run_goes_on_with_the_losses_of_the_uninterrupted_one(runs, uncut, name):
    """SIGTERM in step 4 (``cut``) or 5 (``edge``), the second and third of three in epoch 1; then another run.

    ``joint_cut`` stops in the middle of a ramp of its noise schedule.
    """
    folder, _ = runs
    whole, cut = read_log(folder / uncut), read_log(folder / name)
    assert [line["step"] for line in cut] == list(range(STEPS))
    assert [line["epoch"] for line in cut] == [0, 0, 0, 1, 1, 1, 2, 2]
    for a, b in zip(whole, cut, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-6), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-6), a["step"]
        for key in ("lr", "noise_phase", "noise_low", "noise_high", "num_loss_tokens"):
            assert a.get(key) == b.get(key), (a["step"], key)


def test_joint_run_logs_both_losses_and_the_noise_of_each_step(runs):
    folder, _ = runs
    lines = read_log(folder / "joint")
    assert [line["noise_phase"] for line in lines] == [0, 0, 1, 1, 1, 1, 2, 2]
    assert [line["noise_high"] for line in lines] == pytest.approx([0.6, 0.6, 0.7, 0.8, 0.9, 0.9, 0.9, 0.9])
    for line in lines:
        assert line["loss"] == pytest.approx(line["diffusion_loss"] + 0.5 * line["ar_loss"], rel=1e-4)
    plain = read_log(folder / "one")
    assert lines[0]["num_samples"] == plain[0]["num_samples"]
    assert all("ar_loss" not in line and "noise_phase" not in line for line in plain)
    assert lines[-1]["ar_loss"] < lines[0]["ar_loss"]
    for line in read_log(folder / "joint", "validation"):
        assert line["val_loss"] == pytest.approx(line["val_diffusion_loss"] + 0.5 * line["val_ar_loss"], rel=1e-6)
        assert line["num_samples"] == 11


def test_noise_switches_at_its_fraction_of_an_epoch_bound_run(runs):
    folder, log = runs
    lines = read_log(folder / "phases")
    assert [line["noise_phase"] for line in lines] == [0, 0, 0, 1, 1, 1]
    assert [(line["noise_low"], line["noise_high"]) for line in lines[2:4]] == [(0.001, 0.5), (0.2, 1.0)]
    assert "step 3: phase 1 of noise.schedule, to step 5" in log


def test_worker_processes_and_microbatches_change_nothing(runs):
    folder, _ = runs
    for a, b in zip(read_log(folder / "one"), read_log(folder / "workers"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4), a["step"]
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4), a["step"]


def test_dropped_samples_are_counted_and_logged(runs):
    folder, log = runs
    lines = read_log(folder / "short")
    dropped = sum(line["num_dropped"] for line in lines)
    assert 0 < dropped < 11
    assert sum(line["num_samples"] for line in lines) == 11 - dropped
    assert "too long samples dropped" in log


def test_console_shows_a_progress_bar(runs):
    _, log = runs
    assert f"{STEPS}/{STEPS}" in log
    assert "loss=" in log


def test_export_loads_with_the_block_size_of_the_run(runs):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    from nemo_bard import BardGenerationConfig, BardVLForConditionalGeneration

    folder = runs[0] / "one" / "LATEST" / "model" / "consolidated"
    model = AutoModelForImageTextToText.from_pretrained(folder)
    assert type(model) is BardVLForConditionalGeneration
    assert model.config.block_size == TRAIN["model.block_size"]
    assert model.dtype == torch.float32
    assert isinstance(model.generation_config, BardGenerationConfig)
    assert model.generation_config.block_size is None
    processor = AutoProcessor.from_pretrained(folder)
    assert model.config.assistant_header_ids == processor.tokenizer("<|im_start|>assistant\n").input_ids
    assert (folder / "generation_config.json").is_file()


def test_own_images_are_learnt_by_heart(start, tmp_path):
    """A user's JSONL through ``pbm.yaml`` on the command line until ``generate`` gives the answers back."""
    from transformers import AutoProcessor

    from nemo_bard import BardVLForConditionalGeneration
    from nemo_bard.data.conversation import split_last_response
    from nemo_bard.data.jsonl import JsonlDataset

    lines = []
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 64), colour).save(tmp_path / f"{name}.png")
        turns = [
            {"role": "user", "content": "<image>Which colour?"},
            {"role": "assistant", "content": f"It is {name}."},
        ]
        lines.append(json.dumps({"messages": turns, "images": [f"{name}.png"]}))
    data = tmp_path / "train.jsonl"
    data.write_text("\n".join(lines) + "\n")
    command = [
        *(sys.executable, "-m", "nemo_bard.cli", "finetune", "--config", "recipes/pbm.yaml"),
        f"model.pretrained_model_name_or_path={start}",
        f"dataset.path={data}",
        "step_scheduler.global_batch_size=4",
        "step_scheduler.local_batch_size=4",
        "step_scheduler.max_steps=150",
        "optimizer.lr=0.003",
        f"checkpoint.checkpoint_dir={tmp_path / 'out'}",
    ]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=HERE.parents[1], check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "out" / "LATEST" / "model" / "consolidated"
    model, processor = BardVLForConditionalGeneration.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    model.eval()
    for item in JsonlDataset(data):
        prompt, answer = split_last_response(item["conversation"])
        batch = processor.apply_chat_template(
            prompt, tokenize=True, return_dict=True, return_tensors="pt", add_generation_prompt=True
        )
        ids = model.generate(batch, max_new_tokens=24, confidence_threshold=0.9)
        assert processor.tokenizer.batch_decode(ids, skip_special_tokens=True) == [answer]
