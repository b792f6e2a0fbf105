"""``nemo-bard plan``: counts are exact, pairs and FLOPs match what is computed, bad input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLForConditionalGeneration

from nemo_bard.base.paths import recipes_dir
from nemo_bard.cli.app import main
from nemo_bard.cost.count import (
    CHUNK_TOKENS,
    Gpu,
    activation_memory,
    count_parameters,
    one_process_peak,
    peak_flops,
    row_tokens,
    training_flops,
    visible_pairs,
)
from nemo_bard.cost.estimate import PlanSettings, make_plan
from nemo_bard.cost.shapes import SHAPES, make_config
from nemo_bard.method.chunked import DEFAULT_CHUNK_TOKENS
from nemo_bard.method.layout import TokenIds, attention_mask, sample_layout
from nemo_bard.train.plan import plan_of_recipe
from nemo_bard.train.recipe_file import load_raw_config

RECIPE = [("step_scheduler.global_batch_size", "32"), ("distributed.activation_checkpointing", "true")]
"""What the published chains set."""


@pytest.mark.parametrize("shape", SHAPES)
def test_parameters_are_counted_exactly(shape):
    config = make_config(shape)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    counted = count_parameters(config)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.vision == sum(p.numel() for p in model.model.visual.parameters())
    assert counted.layer == sum(p.numel() for p in model.model.language_model.layers[0].parameters())


@pytest.mark.parametrize(("prompt", "response", "block"), [(13, 9, 4), (16, 8, 8), (5, 1, 4), (3, 17, 8), (7, 5, 1)])
def test_pairs_and_length_are_those_of_the_layout(prompt, response, block):
    layout = sample_layout(prompt + response, [(prompt, prompt + response)], block)
    order = torch.arange(len(layout))
    ids = TokenIds(torch.zeros_like(order), layout.branch, layout.block, order)
    assert row_tokens(prompt, response, block) == len(layout)
    assert visible_pairs(prompt, response, block) == int(attention_mask(ids, ids).sum())


def test_flops_are_what_torch_counts():
    fields = {f"{name}_token_id": 500 + i for i, name in enumerate(("image", "video", "vision_start", "vision_end"))}
    config = make_config("tiny", **fields)
    model = Qwen3VLForConditionalGeneration(config)
    prompt, response, block, image = 40, 16, 4, 16
    length = row_tokens(prompt, response, block)
    ids = torch.full((1, length), 7)
    ids[0, 2 : 2 + image] = config.image_token_id
    pixels = torch.randn(image * 4, 3 * 2 * 16 * 16)
    mask = torch.ones(1, 1, length, length, dtype=torch.bool)
    counter = FlopCounterMode(display=False)
    with sdpa_kernel(SDPBackend.MATH), counter:
        logits = model(
            ids,
            attention_mask=mask,
            position_ids=torch.arange(length).expand(3, 1, length),
            pixel_values=pixels,
            image_grid_thw=torch.tensor([[1, 8, 8]]),
            use_cache=False,
        ).logits
        forward = counter.get_total_flops()
        logits.sum().backward()
    expected = training_flops(
        config, [(prompt, response)], block_size=block, image_tokens=image, supervised=length, dense_attention=True
    )
    # transformers computes rotary angles as small matrix products, which are not counted here
    assert forward == pytest.approx(expected.forward, rel=0.01)
    # the first layer of the vision tower has no gradient of its input
    assert counter.get_total_flops() == pytest.approx(expected.model, rel=0.05)


def test_sharding_divides_the_states_and_checkpointing_the_activations():
    one = make_plan(PlanSettings(model="4b", gpus=64, dp_replicate_size=1))
    two = make_plan(PlanSettings(model="4b", gpus=128, dp_replicate_size=1, activation_checkpointing=True))
    for part in ("weights", "gradients", "optimizer"):
        assert two.memory[part] == one.memory[part] / 2
    assert two.memory["activations, text"] < one.memory["activations, text"] / 4
    assert two.flops_per_gpu > one.flops_per_gpu / 2  # recomputation
    dense = make_plan(PlanSettings(model="4b", gpus=64, dense_mask=True))
    assert dense.memory["activations, masks"] == 36 * 8192**2 * 2
    assert CHUNK_TOKENS == DEFAULT_CHUNK_TOKENS


@pytest.mark.slow
def test_the_peak_of_a_process_is_the_measured_one(tmp_path):
    """The operating system's account of a step in float32, above that of the imports."""
    from nemo_bard.method.chunked import CPU_CHUNK_TOKENS

    program, file = Path(__file__).parents[2] / "benchmarks" / "train_step.py", tmp_path / "measured.json"
    what = ["--shape", "cpu", "--device", "cpu", "--dtype", "float32", "--lengths", "1538"]
    command = [sys.executable, str(program), *what, "--packing", "0", "--repeat", "1", "--output", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(file.read_text())
    row = next(one for one in measured["rows"] if one["path"] == "unpacked")
    config, image = make_config("cpu"), measured["image_tokens"]
    kept = activation_memory(
        config, tokens=row["positions"], image_tokens=image, width=4, chunk_tokens=CPU_CHUNK_TOKENS
    )
    expected = one_process_peak(count_parameters(config), kept) / 2**20
    # left out: the mask, the batch, code that is loaded with the first step, and heap that is not given back
    assert row["peak_above_start_mib"] == pytest.approx(expected, rel=0.1)


def test_days_follow_from_the_time_per_step():
    plan = make_plan(PlanSettings(model="8b", gpus=64, samples=256 * 86400))
    assert plan.days == pytest.approx(plan.seconds_per_step)
    assert peak_flops("NVIDIA H200", "bfloat16") == 989e12
    assert peak_flops("Tesla T4", "bfloat16") is None


def published(**changes) -> PlanSettings:
    """8B on eight nodes of eight H100."""
    return PlanSettings(**{"model": "8b", "gpus": 64, "activation_checkpointing": True, **changes})


def test_deferred_gradients_are_counted_where_they_exist_and_can_be_given_up():
    one_row, rows = make_plan(published()), make_plan(published(packing=False))
    assert (one_row.microbatches, one_row.memory["gradients, deferred"]) == (1, 0.0)
    assert (rows.microbatches, rows.memory["gradients, deferred"]) == (4, 4.0 * rows.parameters.total)
    assert rows.memory["gradients"] == 0.0
    at_once = make_plan(published(packing=False, defer_fsdp_grad_sync=False))
    assert at_once.memory["gradients, deferred"] == 0.0
    assert at_once.memory["gradients"] == rows.parameters.total / 2  # 4 bytes over 8 shards
    assert at_once.traffic.reduce_scatter == 4 * rows.traffic.reduce_scatter
    assert at_once.traffic.all_gather == rows.traffic.all_gather


def test_unpacked_rows_over_all_gpus_gather_as_long_as_they_compute():
    """Eight nodes, a sample per row: weights are gathered twice a microbatch, and computation cannot hide much more."""
    plan = make_plan(published(packing=False, dp_replicate_size=1))
    per_microbatch = plan.traffic.all_gather / plan.microbatches
    assert 28e9 < per_microbatch < 4 * plan.parameters.total
    assert plan.sharding.shards == 64
    assert plan.communication_seconds > 0.9 * plan.compute_seconds
    slow = make_plan(published(packing=False, dp_replicate_size=1, network_bandwidth=10.0))
    assert slow.bound == "communication"
    assert slow.seconds_per_step == slow.communication_seconds > plan.seconds_per_step
    assert any(line.startswith("packing.max_length: 8192: ") for line in slow.advice)
    assert any(line.startswith("distributed.dp_replicate_size: 8: ") for line in slow.advice)
    better = make_plan(published(network_bandwidth=10.0))
    assert better.communication_seconds < slow.communication_seconds / 2


def test_what_does_not_fit_says_what_to_change():
    plan = make_plan(PlanSettings(model="8b", gpus=4, activation_checkpointing=True, local_batch_size=4))
    assert not plan.fits
    (line,) = [line for line in plan.advice if line.startswith("distributed.defer_fsdp_grad_sync: false: ")]
    assert "GiB less, fits" in line
    changed = make_plan(
        PlanSettings(model="8b", gpus=4, activation_checkpointing=True, local_batch_size=4, defer_fsdp_grad_sync=False)
    )
    assert changed.fits
    assert changed.advice == ()


def test_a_recipe_becomes_a_plan():
    raw = load_raw_config(recipes_dir() / "pbm.yaml", [("packing.max_length", "8192"), *RECIPE])
    plan = plan_of_recipe(raw, config=make_config("8b"), world_size=16, gpus_per_node=8, device="h200")
    s = plan.settings
    assert (s.global_batch_size, s.samples_per_row, plan.microbatches) == (32 * 9, 9, 2)
    assert (plan.sharding.replicas, plan.sharding.shards) == (2, 8)
    assert (s.dtype, s.block_size, s.packing, s.samples) == ("bfloat16", 4, True, 4000.0 * 288)
    same = make_plan(replace(s, model="8b"))
    assert same.memory == plan.memory
    assert same.communication == plan.communication
    frozen = {**raw, "freeze_config": {"freeze_vision_tower": True}}
    less = plan_of_recipe(frozen, config=make_config("8b"), world_size=16, gpus_per_node=8, device="h200")
    assert less.memory["optimizer"] == 8 * (plan.parameters.total - plan.parameters.vision) / 8
    with pytest.raises(ValueError, match=r"distributed.dp_replicate_size=3 must divide"):
        plan_of_recipe(
            {**raw, "distributed": {"dp_replicate_size": 3}},
            config=make_config("8b"),
            world_size=16,
            gpus_per_node=8,
            device="h200",
        )


def test_an_anchor_is_gathered_kept_and_computed():
    raw = load_raw_config(recipes_dir() / "swd.yaml", RECIPE)
    where = {"world_size": 8, "gpus_per_node": 8, "device": "h100"}
    alone = plan_of_recipe(raw, config=make_config("2b"), **where)
    both = plan_of_recipe(raw, config=make_config("2b"), anchor=make_config("4b"), **where)
    anchor = count_parameters(make_config("4b")).total
    assert both.memory["anchor"] == 2 * anchor / 8
    assert both.traffic.all_gather - alone.traffic.all_gather == 4 * 2 * anchor * 7 // 8
    assert both.compute_seconds > alone.compute_seconds
    away = plan_of_recipe({**raw, "offload_anchor": True}, config=make_config("2b"), anchor=make_config("4b"), **where)
    assert away.memory["anchor"] == 0.0


def test_a_device_of_ones_own_and_short_rows():
    raw = load_raw_config(recipes_dir() / "digits_pbm.yaml", [])
    device = Gpu(gib=4.0, bfloat16=0.0, float32=1e11, node_bandwidth=1e9, network_bandwidth=1e9)
    plan = plan_of_recipe(raw, config=make_config("tiny"), world_size=2, gpus_per_node=2, device=device)
    assert (plan.settings.dtype, plan.settings.max_length, plan.microbatches) == ("float32", 1024, 1)
    assert plan.fits
    short = {**raw, "dataloader": {"collate_fn": {"max_length": 64}}}
    plan = plan_of_recipe(short, config=make_config("tiny"), world_size=2, gpus_per_node=2, device=device)
    assert plan.row_tokens <= 64


def test_the_command_prints_formulas_and_assumptions(capsys):
    assert main(["plan", "--model", "2b", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "formulas" in text
    assert "assumptions" in text
    assert "all-gather of weights" in text
    assert "bound by" in text
    assert main(["plan", "--model", "2b", "--gpus", "8", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["memory"]["total"] == pytest.approx(sum(v for k, v in facts["memory"].items() if k != "total"))
    assert facts["assumptions"]
    assert facts["formulas"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "9b", "--gpus", "8"], "8b"),
        (["--model", "2b", "--gpus", "7"], "--gpus 7"),
        (["--model", "2b", "--gpus", "0"], "--gpus"),
        (["--model", "2b", "--gpus", "8", "--gpu", "b200"], "h200"),
        (["--model", "2b", "--gpus", "8", "--max-length", "512"], "--max-length 512"),
        (["--model", "2b", "--gpus", "8", "--utilisation", "1.5"], "--utilisation"),
        (["--model", "2b", "--gpus", "8", "--dp-replicate-size", "3"], "--dp-replicate-size=3"),
        (["--model", "2b", "--gpus", "8", "--network-bandwidth", "0"], "--network-bandwidth"),
    ],
)
def test_wrong_input_is_one_line(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
