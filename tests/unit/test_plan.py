"""``nemo-bard plan``: counts are exact, pairs and FLOPs match what is computed, bad input is one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import Qwen3VLForConditionalGeneration

from nemo_bard.cli.app import main
from nemo_bard.cost.count import (
    CHUNK_TOKENS,
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
    what = ["--shape", "cpu", "--device", "cpu", "--dtype", "float32", "--lengths", "1538", "--paths", "ours"]
    command = [sys.executable, str(program), *what, "--packing", "0", "--repeat", "1", "--output", str(file)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    measured = json.loads(file.read_text())
    (row,) = measured["rows"]
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


def test_the_command_prints_formulas_and_assumptions(capsys):
    assert main(["plan", "--model", "2b", "--gpus", "8"]) == 0
    text = capsys.readouterr().out
    assert "formulas" in text
    assert "assumptions" in text
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
    ],
)
def test_wrong_input_is_one_line(arguments, said, capsys):
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert len(error.strip().splitlines()) == 1
