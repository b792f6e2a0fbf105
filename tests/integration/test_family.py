"""Every dense model of the Qwen3-VL family in small: convert, train, export, load, generate.

Heads, groups of heads, head sizes, M-RoPE sections, tied or untied heads and the three deepstack features are those of the
released models; widths are divided, and depth is as little as lets every feature learn.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from nemo_bard.base.names import MASK_TOKEN
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.cli.app import main
from nemo_bard.cost.shapes import make_config
from nemo_bard.data.encode import encode_prompts

pytestmark = pytest.mark.slow
SHAPES = ("2b", "4b", "8b", "32b")
DRIVER = Path(__file__).parent / "pbm_driver.py"
TRAIN = {
    "step_scheduler.global_batch_size": 2,
    "step_scheduler.max_steps": 2,
    "step_scheduler.ckpt_every_steps": 100,
    "lr_scheduler.lr_warmup_steps": 0,
    "model.block_size": 8,
    "optimizer.lr": 1e-3,
}


def narrow(shape):
    """Fields of the text and of the vision configuration: every width divided by 16, heads of the tower by 4."""
    config = make_config(shape)
    text, vision = config.text_config, config.vision_config
    names = ("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps")
    small = {name: getattr(text, name) for name in names}
    small |= {"hidden_size": text.hidden_size // 16, "intermediate_size": text.intermediate_size // 16}
    small |= {"num_hidden_layers": 4, "mrope_section": [24, 20, 20], "rope_theta": 5_000_000}
    tower = {"num_heads": vision.num_heads // 4, "hidden_size": vision.hidden_size // 4}
    tower |= {"intermediate_size": vision.intermediate_size // 16, "depth": 4, "deepstack_visual_indexes": [0, 1, 3]}
    return small, tower, config.tie_word_embeddings


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Folder with ``<shape>/source``, ``start`` and ``run`` of each shape; all are trained in one process."""
    folder = tmp_path_factory.mktemp("family")
    Image.linear_gradient("L").convert("RGB").resize((64, 96)).save(folder / "image.png")
    messages = [
        {"role": "user", "content": "<image>Which colour?"},
        {"role": "assistant", "content": "black and white"},
    ]
    line = json.dumps({"messages": messages, "images": ["image.png"]})
    (folder / "train.jsonl").write_text(f"{line}\n" * 4)
    jobs = []
    for shape in SHAPES:
        place = folder / shape
        text, vision, tie = narrow(shape)
        make_tiny_qwen3_vl(place / "source", text=text, vision=vision, tie_word_embeddings=tie)
        assert main(["convert", str(place / "source"), str(place / "start")]) == 0
        where = {
            "model.pretrained_model_name_or_path": str(place / "start"),
            "dataset.path": str(folder / "train.jsonl"),
            "checkpoint.checkpoint_dir": str(place / "run"),
        }
        jobs.append({"overrides": {**TRAIN, **where}})
    (folder / "jobs.json").write_text(json.dumps(jobs))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(folder / "jobs.json")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_from_a_source_to_answers(trained, shape, tmp_path):
    place, released = trained / shape, make_config(shape)
    lines = [json.loads(line) for line in (place / "run/training.jsonl").read_text().splitlines()]
    assert len(lines) == 2
    assert all(0 < line["loss"] < 100 and line["grad_norm"] > 0 for line in lines)

    assert main(["export", str(place / "run"), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = config["text_config"]
    for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
        assert text[name] == getattr(released.text_config, name)
    assert config["tie_word_embeddings"] == released.tie_word_embeddings
    assert config["block_size"] == 8
    before = load_file(place / "start/model.safetensors")
    after = load_file(tmp_path / "out/model.safetensors")
    assert {name: weight.shape for name, weight in after.items()} == {
        name: weight.shape for name, weight in before.items()
    }
    assert ("lm_head.weight" in after) != released.tie_word_embeddings
    for part in ("language_model.layers.2.", "visual.blocks.3.", "visual.deepstack_merger_list.2.", "embed_tokens"):
        names = [name for name in after if part in name and name.endswith("weight")]
        assert names
        assert not all(after[name].equal(before[name]) for name in names), f"{part} has learnt nothing"

    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert processor.tokenizer.mask_token == MASK_TOKEN
    assert processor.tokenizer.mask_token_id == config["mask_token_id"]
    image = Image.open(trained / "image.png")
    parts = [{"type": "image", "image": image}, {"type": "text", "text": "Which colour?"}]
    batch = encode_prompts(processor, [[{"role": "user", "content": parts}]])
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    assert type(model).__name__ == "BardVLForConditionalGeneration"
    answer = model.generate(batch, max_new_tokens=16, eos_token_id=-1)
    assert answer.shape == (1, 16)
    assert not (answer == config["mask_token_id"]).any()
    assert torch.equal(answer, model.generate(batch, max_new_tokens=16, eos_token_id=-1, decode_path="plain"))
