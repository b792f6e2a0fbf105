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


def test_only_the_sampled_frames_of_a_clip_are_kept(tmp_path, write_clip):
    """The frames are those that decoding the whole clip gives, also where the header does not count them."""
    import av
    import torch

    from nemo_bard.upstream.card import read_video

    for name, codec in (("a.mp4", "mpeg4"), ("a.mkv", "mpeg4")):
        file = write_clip(tmp_path / name, 24, codec=codec)
        with av.open(str(file)) as container:
            every = [torch.from_numpy(frame.to_ndarray(format="rgb24")) for frame in container.decode(video=0)]
        video, metadata, fps = read_video({"video": f"file://{file}", "nframes": 6, "video_start": 1.0})
        assert metadata["frames_indices"].tolist() == [8, 11, 14, 17, 20, 23]
        assert torch.equal(video, torch.stack([every[i] for i in (8, 11, 14, 17, 20, 23)]).permute(0, 3, 1, 2))
        assert fps == pytest.approx(6 / 16 * 8)


def test_a_clip_that_ends_early_is_told(tmp_path, write_clip):
    from nemo_bard.upstream.card import read_video

    file = write_clip(tmp_path / "a.mp4", 24, options={"movflags": "faststart"})
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * 0.6)])
    with pytest.raises(ValueError, match=r"^video .*a.mp4 cannot be read \("):
        read_video({"video": str(file), "nframes": 6})
