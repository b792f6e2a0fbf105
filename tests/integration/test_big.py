"""Models as large as the released ones, with random weights: gigabytes of memory and disk, minutes (``make test-big``)."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from nemo_bard.cost.shapes import make_config

pytestmark = pytest.mark.big
GIB = 1024**3
LIMIT = 12 * GIB
"""Memory that a 2B model of full depth may take, in float32, as it decodes on a CPU by default."""
TRAIN = {
    "step_scheduler.global_batch_size": 1,
    "step_scheduler.max_steps": 2,
    "step_scheduler.ckpt_every_steps": 100,
    "lr_scheduler.lr_warmup_steps": 0,
    "model.block_size": 8,
    "model.torch_dtype": "bfloat16",
    "optimizer": {"_target_": "torch.optim.SGD", "lr": 1e-2},
}
LAYERS = {"2b": 4, "4b": 4, "8b": 2, "32b": 1}
"""Of the language model: as many as 12 GiB hold with their gradients (32B: 14 GiB)."""


@pytest.fixture
def folder(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)  # pytest would keep gigabytes


def run(*words: object) -> tuple[str, int, float]:
    """Run a command; returns its output, its peak memory in bytes and its seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "2"}
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        said = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, said[-3000:]
    return said, usage.ru_maxrss * 1024, time.monotonic() - began


def need(memory: int, disk: int, folder: Path) -> None:
    """Skip where this machine has less."""
    facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    if int(facts["MemAvailable"].split()[0]) * 1024 < memory:
        pytest.skip(f"needs {memory / GIB:.0f} GiB of memory")
    if shutil.disk_usage(folder).free < disk:
        pytest.skip(f"needs {disk / GIB:.0f} GiB of disk in {folder}")


def stand_in(folder: Path, shape: str, **changes: object) -> None:
    """Write a source in a process of its own: a child's peak is at least what its parent's was."""
    module, changed = "nemo_bard.checkpoints.stand_in", "".join(f", {key}={value!r}" for key, value in changes.items())
    run("-c", f"import {module} as it; it.make_stand_in({str(folder)!r}, {shape!r}{changed})")


def write_picture(folder: Path) -> Path:
    Image.radial_gradient("L").convert("RGB").resize((128, 128)).save(folder / "image.png")
    return folder / "image.png"


def test_2b_of_full_depth_is_converted_and_decoded_within_12_gib(folder, record_property):
    need(LIMIT, 6 * GIB, folder)
    stand_in(folder / "source", "2b")
    report = {}
    _, *report["convert"] = run("-m", "nemo_bard.cli", "convert", folder / "source", folder / "start")
    words = ("--prompt", "What is it?", "--image", write_picture(folder), "--max-new-tokens", 8, "--stats")
    said, *report["generate"] = run("-m", "nemo_bard.cli", "generate", "--model", folder / "start", *words)
    assert "tokens in " in said
    for command, (memory, seconds) in report.items():
        record_property("measured", f"2B, {command}: {memory / GIB:.2f} GiB, {seconds:.0f} s")
        assert memory < (LIMIT if command == "generate" else 2 * GIB)


@pytest.mark.parametrize("shape", LAYERS)
def test_real_widths_from_a_source_to_answers(shape, folder, record_property):
    """Real widths and vocabulary at little depth, bfloat16 weights and plain SGD, as this is about shapes alone."""
    need((14 if shape == "32b" else 12) * GIB, 20 * GIB, folder)
    tower = {"depth": 4, "deepstack_visual_indexes": [0, 1, 3]}
    stand_in(folder / "source", shape, text={"num_hidden_layers": LAYERS[shape]}, vision=tower)
    run("-m", "nemo_bard.cli", "convert", folder / "source", folder / "start")
    shutil.rmtree(folder / "source")  # the converted folder has hard links
    messages = [
        {"role": "user", "content": "<image>Which colour?"},
        {"role": "assistant", "content": "black and white"},
    ]
    line = json.dumps({"messages": messages, "images": [write_picture(folder).name]})
    (folder / "train.jsonl").write_text(f"{line}\n" * 2)
    where = {
        "model.pretrained_model_name_or_path": str(folder / "start"),
        "dataset.path": str(folder / "train.jsonl"),
        "checkpoint.checkpoint_dir": str(folder / "run"),
    }
    (folder / "jobs.json").write_text(json.dumps([{"overrides": {**TRAIN, **where}}]))
    report = {}
    _, *report["two steps"] = run(Path(__file__).with_name("pbm_driver.py"), folder / "jobs.json")
    steps = [json.loads(line) for line in (folder / "run/training.jsonl").read_text().splitlines()]
    assert len(steps) == 2
    assert all(step["loss"] > 0 and step["grad_norm"] > 0 for step in steps)
    _, *report["export"] = run("-m", "nemo_bard.cli", "export", folder / "run", folder / "out", "--dtype", "bfloat16")
    shutil.rmtree(folder / "run")
    config = json.loads((folder / "out/config.json").read_text())
    assert config["mask_token_id"] == 151671
    assert config["text_config"]["hidden_size"] == make_config(shape).text_config.hidden_size
    words = ("--prompt", "What is it?", "--image", folder / "image.png", "--max-new-tokens", 8, "--stats")
    words = ("--model", folder / "out", *words, "--dtype", "bfloat16")
    said, *report["generate"] = run("-m", "nemo_bard.cli", "generate", *words)
    assert "tokens in " in said
    for command, (memory, seconds) in report.items():
        record_property("measured", f"{shape}, {command}: {memory / GIB:.2f} GiB, {seconds:.0f} s")
