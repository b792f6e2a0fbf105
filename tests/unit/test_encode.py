"""Conversations become tokens in one way: training rows, measured lengths and prompts agree, videos included."""

from __future__ import annotations

import json
import struct
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.conversation import open_media, parse_record, split_last_response
from nemo_bard.data.encode import MediaTokens, encode, encode_headers, encode_prompts, find_media
from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.lengths import measure
from nemo_bard.data.video import find_decoder, read_video
from nemo_bard.evaluation.batch import make_conversation
from nemo_bard.method.layout import CONTEXT, NOISY


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoConfig, AutoProcessor

    folder = tmp_path_factory.mktemp("tiny")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4)
    config = AutoConfig.from_pretrained(folder / "start")
    processor = AutoProcessor.from_pretrained(folder / "start")
    tokens = MediaTokens(config.image_token_id, config.video_token_id, config.vision_config.spatial_merge_size**2)
    return SimpleNamespace(config=config, processor=processor, tokens=tokens)


@pytest.fixture
def data(tmp_path, write_clip):
    """A clip and a picture in one conversation of a JSONL file."""
    from PIL import Image

    write_clip(tmp_path / "clip.mp4")
    Image.linear_gradient("L").resize((90, 50)).convert("RGB").save(tmp_path / "a.png")
    messages = [
        {"role": "user", "content": "<video>and<image>what?"},
        {"role": "assistant", "content": "one two three four"},
        {"role": "user", "content": "<video>again?"},
        {"role": "assistant", "content": "yes"},
    ]
    record = {"messages": messages, "images": ["a.png"], "videos": ["clip.mp4", "clip.mp4"]}
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    return JsonlDataset(tmp_path / "train.jsonl")


def test_training_measuring_and_decoding_see_the_same_tokens(tiny, data):
    """The same clip has as many tokens, of the same ids, positions in the text and pixels, wherever it is used."""
    make = BlockDiffusionCollator(tiny.processor, tiny.config)
    row = make.encode(data[0])
    assert len(row) == measure(data, make).row_lengths(4)[0]
    outline = make.outline(data.peek(0))
    assert [medium[1] for medium in outline.media] == [int(grid.prod()) // 4 for grid in row.grid_thw]

    prompt, _ = split_last_response(data[0]["conversation"])
    inputs = encode_prompts(tiny.processor, [prompt])
    ids = inputs["input_ids"][0]
    context = row.input_ids[row.branch == CONTEXT][: len(ids)]
    merged = ids.masked_fill(ids == tiny.config.video_token_id, tiny.config.image_token_id)
    assert torch.equal(context, merged), "the row's context begins with the prompt that is decoded"
    media = find_media(ids, inputs, tiny.tokens)
    assert [medium.place for medium in media] == [place for place, _ in outline.media]
    assert torch.equal(torch.cat([medium.patches for medium in media]), row.pixel_values)
    assert int((row.branch == NOISY).sum()) > 0


def test_prompt_command_and_data_set_give_the_same_prompt(tiny, data):
    folder = data.root_dir
    own = open_media(make_conversation("what?", images=[], videos=["clip.mp4"], root_dir=folder))
    record = {"messages": [{"role": "user", "content": "<video>what?"}], "videos": ["clip.mp4"]}
    parsed = open_media(parse_record(record, folder, needs_answer=False)[0])
    assert own == parsed
    one, other = (encode_prompts(tiny.processor, [turns]) for turns in (own, parsed))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_prompt_needs_no_answer_and_a_sample_does(tmp_path):
    record = {"messages": [{"role": "user", "content": "hello"}]}
    assert len(parse_record(record, tmp_path, needs_answer=False)[0]) == 1
    with pytest.raises(ValueError, match="no assistant turn"):
        parse_record(record, tmp_path)


def test_headers_give_the_tokens_of_pixels(tiny):
    from PIL import Image

    image = {"type": "image", "image": Image.new("RGB", (200, 90))}
    turns = [{"role": "user", "content": [image, {"type": "text", "text": "what?"}, image]}]
    for prompt in (False, True):
        ids, media = encode_headers(tiny.processor, turns, tiny.tokens, add_generation_prompt=prompt)
        inputs = encode(tiny.processor, [turns], add_generation_prompt=prompt)
        assert torch.equal(ids, inputs["input_ids"][0])
        assert [m[:2] for m in media] == [m[:2] for m in find_media(ids, inputs, tiny.tokens)]


def test_encoding_leaves_the_tokenizer_as_it_was(tiny):
    """Its state is part of the digest that names the file of lengths."""
    before = tiny.processor.tokenizer.backend_tokenizer.to_str()
    encode(tiny.processor, [[{"role": "user", "content": "a"}]])
    assert tiny.processor.tokenizer.backend_tokenizer.to_str() == before


@pytest.mark.parametrize(("name", "codec"), [("clip.mp4", "mpeg4"), ("clip.webm", "libvpx"), ("clip.mkv", "mpeg4")])
def test_frames_of_a_clip(tiny, tmp_path, write_clip, name, codec):
    """24 frames at 8 a second and 2 sampled a second; WebM and Matroska do not say how many frames they hold."""
    assert find_decoder() in ("pyav", "torchcodec")
    frames, metadata = read_video(write_clip(tmp_path / name, codec=codec), tiny.processor.video_processor)
    assert np.shape(frames)[0] == 6
    assert metadata.total_num_frames == 24
    assert list(metadata.frames_indices) == [0, 5, 9, 14, 18, 23]


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "ends early"),
        (lambda path: path.write_text("no video"), "cannot be read"),
        (lambda path: path.write_bytes(b""), "cannot be read"),
        (lambda path: path.unlink(), "does not exist"),
    ],
)
def test_a_broken_clip_is_one_line_that_names_it(tiny, tmp_path, write_clip, damage, message):
    path = write_clip(tmp_path / "clip.mp4", options={"movflags": "faststart"})
    damage(path)
    turns = [{"role": "user", "content": [{"type": "video", "video": str(path)}]}]
    with pytest.raises(ValueError, match=message) as caught:
        encode_prompts(tiny.processor, [turns])
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_clip_of_one_frame_is_refused(tiny, tmp_path, write_clip):
    path = write_clip(tmp_path / "clip.mp4", 1)
    with pytest.raises(ValueError, match=r"clip\.mp4 has 1 frame"):
        read_video(path, tiny.processor.video_processor)


@pytest.mark.parametrize(("matrix", "turns"), [((0, 1, -1, 0), 3), ((-1, 0, 0, -1), 2), ((0, -1, 1, 0), 1)])
def test_a_clip_that_a_phone_has_turned_stands_upright(tiny, tmp_path, write_clip, matrix, turns):
    """Players turn frames as the display matrix in the file's track header says; OpenCV and ffmpeg gave the same frames."""
    path = write_clip(tmp_path / "clip.mp4")
    plain, _ = read_video(path, tiny.processor.video_processor)
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 44  # behind the name: version and flags, times, ids, duration, layer, volume
    a, b, c, d = (value << 16 for value in matrix)
    data[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames, _ = read_video(path, tiny.processor.video_processor)
    assert (frames == np.rot90(plain, turns, axes=(1, 2))).all()
    assert frames.shape != plain.shape or turns == 2
