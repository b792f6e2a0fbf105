"""Images and videos have as many tokens as qwen-vl-utils gives them; where they have not, it is known why."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from qwen_vl_utils import process_vision_info, smart_resize, vision_process
from transformers import AutoConfig, AutoProcessor, Qwen2VLImageProcessor, Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from nemo_bard.data.encode import MediaTokens, encode, encode_headers, find_media
from nemo_bard.data.images import MAX_RATIO, SizeOnly
from nemo_bard.data.video import read_video

PATCHES = {"patch_size": 16, "merge_size": 2, "temporal_patch_size": 2}
PUBLISHED = {"shortest_edge": 65_536, "longest_edge": 16_777_216}
"""Limits in pixels of the published Qwen3-VL checkpoints."""
SIDES = [1, 2, 7, 15, 16, 17, 31, 32, 33, 47, 48, 49, 63, 64, 100, 255, 256, 257, 1000, 1023, 1025, 4096, 4097, 9999]


@pytest.fixture(scope="module")
def processor(start):
    return AutoProcessor.from_pretrained(start)


@pytest.fixture(scope="module")
def tokens(start):
    config = AutoConfig.from_pretrained(start)
    return MediaTokens(config.image_token_id, config.video_token_id, config.vision_config.spatial_merge_size**2)


def turns(*images):
    return [{"role": "user", "content": [{"type": "image", "image": image} for image in images]}]


@pytest.mark.parametrize(("limits", "least_side"), [(PUBLISHED, 1), ({**PUBLISHED, "shortest_edge": 4096}, 17)])
def test_every_size_has_the_tokens_of_qwens_rule(limits, least_side):
    """With other limits than the published ones, a side of 16 pixels or less is rounded up here and away there."""
    ours = Qwen2VLImageProcessor(**PATCHES, size=limits).get_number_of_image_patches
    rule = {"factor": 32, "min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
    accepted = 0
    for height, width in itertools.product(SIDES, SIDES):
        if max(height, width) > MAX_RATIO * min(height, width):
            for refuse in (ours, lambda *size: smart_resize(*size, **rule)):
                with pytest.raises(ValueError, match="aspect ratio"):
                    refuse(height, width)
        elif min(height, width) >= least_side:
            assert ours(height, width) // 4 == np.prod(smart_resize(height, width, **rule)) // 1024, (height, width)
            accepted += 1
    assert accepted > 300


@pytest.mark.parametrize(
    "size", [(1, 1), (300, 40), (31, 33), (100, 90), (640, 480), (1920, 1080), (20, 90), (4097, 4095)]
)
def test_headers_pixels_and_qwens_images_agree(processor, tokens, size):
    """On the limits of the processor: 1 to 64 tokens."""
    limits = processor.image_processor.size
    _, (medium,) = encode_headers(processor, turns(SizeOnly(size)), tokens)
    image = Image.new("RGB", size, "green")
    inputs = encode(processor, [turns(image)])
    (seen,) = find_media(inputs["input_ids"][0], inputs, tokens)
    conversation = turns(image)
    conversation[0]["content"][0] |= {"min_pixels": limits["shortest_edge"], "max_pixels": limits["longest_edge"]}
    (theirs,), _ = process_vision_info(conversation, image_patch_size=16)
    assert medium.tokens == seen.tokens == theirs.width * theirs.height // 1024


def test_small_images_are_larger_than_qwen_vl_utils_makes_them_by_itself():
    """Its least size is 4 tokens, that of the published checkpoints 64: theirs counts, as in the model card's example."""
    ours = Qwen2VLImageProcessor(**PATCHES, size=PUBLISHED).get_number_of_image_patches
    assert ours(100, 100) // 4 == 64
    assert np.prod(smart_resize(100, 100, factor=32)) // 1024 == 9
    for side in (256, 300, 2000, 5000):
        assert ours(side, side) // 4 == np.prod(smart_resize(side, side, factor=32)) // 1024


def qwens_frames(total, fps):
    count = vision_process.smart_nframes({"fps": 2}, total, fps)
    return torch.linspace(0, total - 1, count, dtype=torch.float64).round().long().tolist()


def test_the_frames_of_a_clip_are_qwens(processor, tmp_path, write_clip):
    for frames in (16, 24, 56):
        _, metadata = read_video(write_clip(tmp_path / "clip.mp4", frames), processor.video_processor)
        assert list(metadata.frames_indices) == qwens_frames(frames, 8)


def test_frames_are_qwens_but_for_an_odd_last_one():
    """Two frames share their tokens: of an odd number qwen-vl-utils drops one, and the processor doubles the last."""
    sample = Qwen3VLVideoProcessor().sample_frames
    odd = 0
    for total, fps in itertools.product([*range(4, 80), 301, 1000, 50_000], (1, 8, 23.976, 25, 29.97, 60)):
        ours = list(sample(VideoMetadata(total_num_frames=total, fps=fps), fps=2))
        theirs = qwens_frames(total, fps)
        if len(ours) % 2:
            odd += 1
            assert len(theirs) == len(ours) - 1
        else:
            assert ours == theirs, (total, fps)
    assert odd > 20


@pytest.mark.parametrize(
    ("frames", "size", "count", "capped"),
    [(4, (640, 360), 440, 440), (4, (1280, 720), 1760, 1440), (8, (1600, 900), 5600, 2880)],
)
def test_videos_have_qwens_tokens_with_its_cap_and_more_without(monkeypatch, frames, size, count, capped):
    """qwen-vl-utils allows a frame 768 tokens. The processor does so with ``cap_pixels_per_frame`` only, which transformers
    5.22 wants to make the default: this test fails then, and lengths that were measured before are no longer right."""
    limits = {"shortest_edge": 4096, "longest_edge": 25_165_824}
    ours = Qwen3VLVideoProcessor(**PATCHES, size=limits)
    with_cap = Qwen3VLVideoProcessor(**PATCHES, size=limits, cap_pixels_per_frame=True)
    width, height = size
    assert ours.get_num_of_video_patches(frames, height, width) // 4 == count
    assert with_cap.get_num_of_video_patches(frames, height, width) // 4 == capped

    def read(_element):  # it needs torchcodec, decord or an older torchvision to read a file
        return torch.zeros(frames, 3, height, width, dtype=torch.uint8), {}, 2.0

    monkeypatch.setattr(vision_process, "get_video_reader_backend", lambda: "torchvision")
    monkeypatch.setitem(vision_process.VIDEO_READER_BACKENDS, "torchvision", read)
    conversation = [{"role": "user", "content": [{"type": "video", "video": "clip.mp4", "min_pixels": 4096}]}]
    _, (theirs,) = process_vision_info(conversation, image_patch_size=16)
    assert theirs.shape[0] // 2 * theirs.shape[2] * theirs.shape[3] // 1024 == capped
