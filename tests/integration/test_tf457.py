"""An export is read by transformers 4.57.3, with which released Bard-VL checkpoints were made, as by the one of today."""

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from PIL import Image

from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.exporting.export import export
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

pytestmark = pytest.mark.tf457
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def old_python():
    python = Path(os.environ.get("TF457_PYTHON") or ROOT / ".venv-tf457" / "bin" / "python")
    if not python.is_file():
        pytest.skip(f"needs an environment with transformers 4.57.3 ({python} is not there): make test-tf457")
    return python


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_export_is_read_by_transformers_4_57(old_python, tmp_path, tied, dtype):
    from transformers import AutoProcessor, Qwen3VLForConditionalGeneration

    source = make_tiny_qwen3_vl(tmp_path / "source", tie_word_embeddings=tied)
    convert(source, tmp_path / "start", block_size=8)
    saved_by_training(tmp_path / "start")
    folder = tmp_path / "export"
    export(tmp_path / "start", folder, dtype=dtype, max_shard_size="500KB")
    assert len(list(folder.glob("*.safetensors"))) > 1

    Image.linear_gradient("L").resize((96, 64)).convert("RGB").save(tmp_path / "image.png")
    processor = AutoProcessor.from_pretrained(folder)
    content = [{"type": "image", "image": str(tmp_path / "image.png")}, {"type": "text", "text": "Read."}]
    batch = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
    )
    model = Qwen3VLForConditionalGeneration.from_pretrained(source, dtype=getattr(torch, dtype)).eval()
    with torch.no_grad():
        expected = model(**batch).logits
    shared = ("input_ids", "attention_mask", "pixel_values", "image_grid_thw")
    torch.save({key: batch[key] for key in shared}, tmp_path / "inputs.pt")
    driver = Path(__file__).with_name("tf457_driver.py")
    words = [folder, tmp_path / "image.png", tmp_path / "inputs.pt", tmp_path]
    done = subprocess.run(
        [old_python, driver, *words], capture_output=True, text=True, env={"PATH": os.environ["PATH"]}
    )
    assert done.returncode == 0, done.stderr[-2000:]

    found = json.loads((tmp_path / "found.json").read_text())
    assert found["version"] == "4.57.3"
    assert not any(found["loading"].values()), "no missing, unexpected or mismatched keys"
    config = model.config
    text = config.text_config
    assert found["rope_theta"] == text.rope_parameters["rope_theta"]
    assert found["rope_scaling"]["mrope_section"] == text.rope_parameters["mrope_section"]
    assert found["heads"] == [text.num_attention_heads, text.num_key_value_heads, text.head_dim]
    assert found["layers"] == [text.num_hidden_layers, config.vision_config.depth]
    assert found["deepstack"] == config.vision_config.deepstack_visual_indexes
    assert found["dtype"] == found["config_dtype"] == f"torch.{dtype}"
    assert found["tied"] is tied
    assert found["ours"]["block_size"] == 8
    assert found["special_tokens"] == sorted(processor.tokenizer.all_special_tokens)
    logits = torch.load(tmp_path / "logits.pt")
    if dtype == "float32":
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    else:  # each rounds its intermediate results at other places
        torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)
    own = torch.load(tmp_path / "batch.pt")
    assert own["input_ids"].equal(batch["input_ids"]), "its processor makes the same prompt"
    torch.testing.assert_close(own["pixel_values"], batch["pixel_values"], rtol=0, atol=0.02)  # resizes in uint8


def saved_by_training(folder):
    """Let configuration and tokenizer be as transformers 5 writes them, which training does."""
    from nemo_bard.model.configuration import BardVLConfig

    BardVLConfig.from_pretrained(folder).save_pretrained(folder)
    text = json.loads((folder / "config.json").read_text())["text_config"]
    assert "rope_scaling" not in text
    assert "tie_word_embeddings" not in text
