"""Training computes what it did when ``golden/training/numbers.json`` was written: ten seeded steps of each objective.

Everything runs through the command line, on ``recipes/pbm.yaml`` and ``swd.yaml`` with overrides, so that the inside of the
package may move. A change of the numbers that is meant is written down with

    python tests/parity/test_training_numbers.py --write
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
NUMBERS = ROOT / "tests" / "golden" / "training" / "numbers.json"
KEYS = ("loss", "grad_norm")
STEPS = 10
TOLERANCE = 1e-5
"""Relative, of float32 on CPU after ten steps of AdamW.

The test runs on one thread, where two runs on a machine agree in every bit. What may differ is the order of sums: two threads
instead of one moved losses by up to 2e-7 and gradient norms by up to 2e-6, SSE4 kernels instead of AVX2 by up to 4e-7 and
4e-6. A ``noise.low`` of 0.0011 instead of 0.001 moves a PBM loss by 2e-4 and more, a causal context by 2e-2.
"""
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}

TRAIN = {
    "seed": 7,
    "compute_dtype": "float32",
    "model.pretrained_model_name_or_path": "b8",
    "model.block_size": 8,
    "dataset.path": "data/train.jsonl",
    "dataloader.collate_fn.pad_to_multiple_of": 1,
    "step_scheduler.global_batch_size": 4,  # of 11 samples: the last step of an epoch has three
    "step_scheduler.local_batch_size": 2,
    "step_scheduler.max_steps": STEPS,
    "lr_scheduler.lr_warmup_steps": 2,
    "optimizer.lr": 1e-3,
    "checkpoint.enabled": False,
}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "pbm_mask": ("pbm", {}),
    "pbm_mixed": ("pbm", {"noise.name": "mixed"}),
    "pbm_uniform": ("pbm", {"noise.name": "uniform", "loss_fn._target_": "nemo_bard.losses.MixturePathKL"}),
    "pbm_complementary": ("pbm", {"noise.complementary": True, "noise.low": 0.1}),
    "pbm_packed": (
        "pbm",
        {
            "packing.max_length": 160,
            "step_scheduler.global_batch_size": 2,  # rows
            "step_scheduler.local_batch_size": 1,
        },
    ),
    "joint": ("pbm", {"ar_loss_weight": 0.5, "model.context_attention": "causal"}),
    "swd": ("swd", {"anchor.pretrained_model_name_or_path": "b4", "lr_scheduler.min_lr": 1e-4}),
}
"""Name of a case -> recipe and what it changes in ``TRAIN``; paths are relative to the working folder."""


def make_models() -> None:
    """Write the start point ``b8`` and an anchor ``b4`` with other weights and another size."""
    from nemo_bard.tiny import make_tiny_qwen3_vl

    from nemo_bard.cli import main

    # Larger weights than the default, so that attention, and with it the mask, counts for something.
    text = {"initializer_range": 0.1}
    smaller = {**text, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 1}
    make_tiny_qwen3_vl("source", seed=3, text=text)
    make_tiny_qwen3_vl("other", seed=4, text=smaller, vision={"out_hidden_size": 48}, tie_word_embeddings=False)
    assert main(["convert", "source", "b8", "--block-size", "8"]) == 0
    assert main(["convert", "other", "b4", "--block-size", "4"]) == 0


def write_data() -> None:
    """Write samples of one scanned digit, of text alone, and of two turns with two digits, in turns."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits

    scans = load_digits()
    Path("data").mkdir()
    lines = []
    for index in range(11):
        pixels = np.uint8(255 - 15 * scans.images[index])
        # nearest neighbour, by hand: the pixels do not depend on the version of an image library
        Image.fromarray(pixels.repeat(8, 0).repeat(4 * (1 + index % 2), 1)).save(f"data/{index}.png")
        answer = f"It is the digit {scans.target[index]}" + " and no other number" * (index % 4)
        turns = [("<image>Which digit is this?", answer)]
        images = [f"{index}.png"]
        if index % 3 == 1:
            turns, images = [("Name a colour", "red green blue " * (1 + index // 3))], []
        elif index % 3 == 2:
            turns.append((f"<image>And {index}?", f"{scans.target[index - 1]}, please"))
            images.append(f"{index - 1}.png")
        messages = [
            {"role": role, "content": text}
            for turn in turns
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        lines.append(json.dumps({"messages": messages, "images": images}))
    Path("data/train.jsonl").write_text("\n".join(lines) + "\n")


def train() -> dict[str, dict[str, list[float]]]:
    """Run all cases in the working folder, in this process; the numbers of every step, as logged."""
    from nemo_bard.cli import main

    make_models()
    write_data()
    numbers = {}
    for name, (recipe, changes) in CASES.items():
        overrides = {**TRAIN, "checkpoint.checkpoint_dir": name, **changes}
        words = [f"{key}={value}" for key, value in overrides.items()]
        assert main(["finetune", "--config", recipe, "--nproc-per-node", "1", *words]) == 0, name
        log = [json.loads(line) for line in Path(name, "training.jsonl").read_text().splitlines()]
        assert [line["step"] for line in log] == list(range(STEPS)), name
        numbers[name] = {key: [line[key] for line in log] for key in KEYS}
    return numbers


def write(target: Path) -> None:
    """Train in a temporary folder and write the numbers with where they come from."""
    from importlib.metadata import version

    target = target.resolve()
    git = shutil.which("git")
    commit = [git, "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    found = {
        "what": f"loss and gradient norm of {STEPS} optimizer steps as logged in training.jsonl; CPU, float32, one thread",
        "command": "python tests/parity/test_training_numbers.py --write",
        "commit": subprocess.run(commit, capture_output=True, text=True, check=False).stdout.strip() if git else "",
        "versions": {name: version(name) for name in ("torch", "transformers", "nemo-automodel")},
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        found["cases"] = train()
    target.write_text(json.dumps(found, indent=1) + "\n")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    """One process of its own for all cases: training sets the process up for itself, and imports take the longest."""
    target = tmp_path_factory.mktemp("training") / "numbers.json"
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": path}
    command = [sys.executable, __file__, "--write", str(target)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(target.read_text())["cases"]


@pytest.mark.parametrize("name", CASES)
def test_every_step_has_the_loss_and_gradient_norm_of_the_fixture(numbers, name):
    expected = json.loads(NUMBERS.read_text())["cases"][name]
    for key in KEYS:
        assert len(expected[key]) == STEPS
        assert numbers[name][key] == pytest.approx(expected[key], rel=TOLERANCE), key


def test_fixture_holds_these_cases():
    assert json.loads(NUMBERS.read_text())["cases"].keys() == CASES.keys()


if __name__ == "__main__":
    for variable, value in ENVIRONMENT.items():  # before anything imports torch
        os.environ.setdefault(variable, value)
    parser = argparse.ArgumentParser(description="Write what training computes.")
    parser.add_argument("--write", type=Path, nargs="?", const=NUMBERS, required=True, metavar="FILE")
    write(parser.parse_args().write)
