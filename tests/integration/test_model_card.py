"""The snippet of the released checkpoints' model card, as it stands there, for an image and for a video."""

import subprocess
import sys
import textwrap

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

CARD = """
import nemo_bard
from nemo_automodel.components.models.bard_vl import BardVLForConditionalGeneration
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor
import torch

model = BardVLForConditionalGeneration.from_pretrained({folder!r}, torch_dtype=torch.float32).eval()
processor = AutoProcessor.from_pretrained({folder!r})
messages = [{{"role": "user", "content": [{{"type": {kind!r}, {kind!r}: {file!r}}}, {{"type": "text", "text": "Read the digits."}}]}}]
text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
images, videos = process_vision_info(messages)
batch = processor(text=[text], images=images, videos=videos, padding=True, return_tensors="pt")
ids = model.generate(
    batch, max_new_tokens=24, block_size=8, denoising_steps=8, temperature=0.0, top_k=0, top_p=1.0,
    remasking_strategy="low_confidence_dynamic", confidence_threshold=0.5, return_step_stats=False,
)
print(processor.tokenizer.batch_decode(ids, skip_special_tokens=True))

from nemo_automodel.components.models.bard_vl.configuration_bard_vl import BardVLConfig
from nemo_automodel.components.models.bard_vl.modeling_bard_vl import BardVLForConditionalGeneration as SameClass
assert SameClass is BardVLForConditionalGeneration is nemo_bard.BardVLForConditionalGeneration
assert BardVLConfig is nemo_bard.BardVLConfig
assert ids.shape[0] == 1 and 1 <= ids.shape[1] <= 24
print("vision tokens", int(batch["mm_token_type_ids"].bool().sum()) if "mm_token_type_ids" in batch else -1)
"""


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    root = tmp_path_factory.mktemp("card")
    convert(make_tiny_qwen3_vl(root / "tiny"), root / "start", block_size=8)
    return root / "start"


@pytest.mark.parametrize("kind", ["image", "video"])
def test_the_card_runs_as_it_stands(start, tmp_path, write_clip, kind):
    file = tmp_path / ("a.png" if kind == "image" else "a.mp4")
    if kind == "image":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)).save(file)
    else:
        write_clip(file)
    code = textwrap.dedent(CARD).format(folder=str(start), kind=kind, file=str(file))
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "vision tokens 0" not in run.stdout
