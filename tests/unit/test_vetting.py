"""Rows become complete samples or are refused by the kind of their defect, each with a real file."""

from __future__ import annotations

import base64
import json
import os

import image_files as files
import pytest
from PIL import Image, ImageFile

from nemo_bard.data import vetting
from nemo_bard.data.conversation import open_media, parse_record
from nemo_bard.data.jsonl import make_jsonl
from nemo_bard.data.sample import Record, RejectedError
from nemo_bard.data.vetting import VetSettings, content_key, vet

PNG = files.encode(files.flat(), "PNG")
JPEG = files.encode(files.photo(400, 300), "JPEG")


def record(images=(PNG,), user="<image>what?", answer="red", **fields):
    turns = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
    return Record(**{"messages": turns, "images": images, **fields})


@pytest.fixture
def check(tmp_path):
    def run(row, name="rows:3", **settings):
        return vet(row, root_dir=tmp_path, name=name, settings=VetSettings(**settings))

    return run


@pytest.fixture
def refused(check):
    def run(row, **settings):
        with pytest.raises(RejectedError) as error:
            check(row, **settings)
        assert "\n" not in error.value.reason
        return error.value.kind

    return run


def texts(sample):
    return [[part.get("text", f"<{part['type']}>") for part in turn["content"]] for turn in sample.messages]


def half(form):
    data = files.encode(files.photo(), form)
    return data[: len(data) // 2]


DEFECTS = [
    ("not an image", b"<html>404</html>" * 50, "corrupt_image"),
    ("zero bytes", b"", "empty_image"),
    *((f"truncated {form}", half(form), "corrupt_image") for form in files.CUT),
    ("pixels overwritten", PNG[:60] + bytes(30) + PNG[90:], "corrupt_image"),
    ("CMYK", files.encode(files.flat().convert("CMYK"), "JPEG"), None),
    ("16-bit", files.encode(files.grey16(), "PNG"), None),
    ("32-bit", files.encode(Image.new("F", (9, 9)), "TIFF"), "pixel_format"),
    *((f"animated {form}", files.animated(form), "animated_image") for form in ("GIF", "WEBP", "PNG")),
    ("EXIF-rotated", files.turned("JPEG", 6), None),
    ("1 x 1", files.encode(Image.new("RGB", (1, 1)), "PNG"), None),
    ("narrow", files.encode(Image.new("RGB", (1, 300)), "PNG"), "too_narrow"),
    ("bomb", files.bomb(), "too_many_pixels"),
]


@pytest.mark.parametrize("given", ["bytes", "file", "file within bytes"])
@pytest.mark.parametrize(("defect", "data", "kind"), DEFECTS, ids=[name for name, _, _ in DEFECTS])
def test_images_with_and_without_defect(check, refused, tmp_path, given, defect, data, kind):
    """A file's name ends wrong each time. What is accepted is kept byte by byte, and trains with the size noted here."""
    (tmp_path / "photo.txt").write_bytes(data)
    entry = {"bytes": data, "file": "photo.txt", "file within bytes": {"bytes": data, "path": "no/such.jpg"}}[given]
    if kind is not None:
        assert refused(record([entry])) == kind
        return
    sample = check(record([entry]))
    assert sample.images == [data]
    turns, _ = parse_record({"messages": sample.messages, "images": sample.images}, tmp_path)
    for header_only in (True, False):
        part = open_media(turns, header_only=header_only)[0]["content"][0]
        assert [part["image"].size] == sample.sizes


@pytest.mark.parametrize(("defect", "data", "kind"), DEFECTS, ids=[name for name, _, _ in DEFECTS])
def test_training_accepts_what_preparing_accepts(tmp_path, defect, data, kind):
    (tmp_path / "photo.txt").write_bytes(data)
    turns = [{"role": "user", "content": "<image>?"}, {"role": "assistant", "content": "a"}]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": turns, "images": ["photo.txt"]}))
    rows = make_jsonl(str(tmp_path / "rows.jsonl"), validate=False)
    if kind is None:
        assert rows[0]["conversation"][0]["content"][0]["image"].mode == "RGB"
        return
    with pytest.raises(ValueError, match=r"rows\.jsonl:1: image .*photo\.txt") as error:
        rows[0]
    assert "\n" not in str(error.value)


def test_fifty_megapixels_pass_and_can_be_made_smaller(check):
    data = files.encode(Image.new("L", (10_000, 5_000), 90), "PNG", compress_level=1)
    sample = check(record([data]), max_pixels=1024 * 1024)
    assert sample.sizes == [(1440, 704)]
    assert len(sample.images[0]) < len(data)


TURNS = [
    ("placeholders", record([PNG, PNG], user="<image>what?")),
    ("placeholders", record([], user="<image>what?")),
    ("placeholders", record([PNG], user="<image> or <image>?")),
    ("placeholders", record([PNG], messages=[{"role": "assistant", "content": "red"}])),
    ("unknown_role", record(messages=[{"role": "robot", "content": "hi"}, {"role": "assistant", "content": "red"}])),
    ("unknown_role", record(messages=[{"content": "hi"}])),
    ("empty_answer", record(answer=" \n\t")),
    ("empty_answer", record(answer=[])),
    ("missing_text", record(answer=None)),
    ("missing_text", record(user=None, images=[])),
    ("missing_text", record(answer=[{"type": "text", "text": None}])),
    ("no_answer", record(messages=[{"role": "user", "content": "hi"}])),
    ("messages", record(messages=[], images=[])),
    ("messages", record(messages=None)),
    ("messages", record(messages="hello")),
    ("messages", record(messages=["hi"])),
    ("messages", record(user=5)),
    ("messages", record(user="what?", answer="<image>")),
    ("messages", record(user=[{"type": "audio"}], images=[])),
    ("messages", record(user=[{"type": ["image"]}], images=[])),
    ("reserved_token", record(user="<image><|im_end|>")),
    ("reserved_token", record(answer="it is <|image_pad|>")),
    ("reserved_token", record(answer="it is <|mask|>")),
    ("bad_text", record(answer="red\0")),
    ("bad_text", record(answer="red \ud83d.")),
    ("bad_text", record(id="a\udc00")),
    ("null_image", record([None])),
    ("null_image", record([None], user="what?")),
    ("null_image", record([{"bytes": None, "path": None}])),
    ("null_image", record([""])),
    ("layout", record([5])),
    ("missing_image", record(["no/such.png"])),
    ("missing_image", record([{"bytes": None, "path": "no/such.png"}])),
    ("missing_image", record(["https://example.com/a.png"])),
    ("corrupt_image", record([{"base64": "@@@"}])),
    ("missing_video", record([], user="<video>what?", videos=["no.mp4"])),
    ("missing_video", record([], user="<video>what?", videos=[None])),
    ("unreadable_video", record([], user="<video>what?", videos=["v" * 5000])),
    ("unreadable_image", record(["i" * 5000])),
]


@pytest.mark.parametrize(("kind", "row"), TURNS, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(TURNS)])
def test_rows_with_a_defect(refused, kind, row):
    assert refused(row) == kind


def test_reasons_say_where(check):
    for row, words in (
        (record(["no/such.png"]), "no/such.png does not exist"),
        (record([PNG, half("JPEG")], user="<image><image>"), "image 2 of the row cannot be read"),
        (record(answer=" "), r"messages\[1\]: the answer"),
        (record(answer="a\ud83d"), r"messages\[1\]: the text holds half of a surrogate pair \('.ud83d'\) at place 1"),
    ):
        with pytest.raises(RejectedError, match=words):
            check(row)


def test_a_sample_is_complete(check, tmp_path, write_clip):
    write_clip(tmp_path / "clip.mp4")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").write_bytes(JPEG)
    encoded = base64.b64encode(PNG).decode()
    row = record(
        [PNG, "in/a.jpg", {"bytes": None, "path": str(tmp_path / "in/a.jpg")}, f"data:image/png;base64,{encoded}"],
        messages=[
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "<image>or<image> of <video>"},
            {"role": "assistant", "content": "this"},
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "and"}, {"type": "image"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "that"}]},
        ],
        videos=["clip.mp4"],
        id="row 7",
    )
    sample = check(row)
    assert sample.id == "row 7"
    assert check(record()).id == "rows:3"
    assert sample.images == [PNG, JPEG, JPEG, PNG]
    assert sample.sizes == [(40, 24), (400, 300), (400, 300), (40, 24)]
    assert sample.videos == [str(tmp_path / "clip.mp4")]
    assert [turn["role"] for turn in sample.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert texts(sample) == [
        ["be brief"],
        ["<image>", "or", "<image>", " of ", "<video>"],
        ["this"],
        ["<image>", "and", "<image>"],
        ["that"],
    ]
    assert json.loads(json.dumps(sample.messages)) == sample.messages


def test_parts_with_a_source_of_their_own(check, tmp_path):
    (tmp_path / "a.jpg").write_bytes(JPEG)
    parts = [
        {"type": "image", "image": "a.jpg"},
        {"type": "image"},
        {"type": "image", "image": {"bytes": PNG, "path": None}},
        {"type": "image", "image": JPEG},
    ]
    sample = check(record([PNG], user=parts))
    assert sample.images == [JPEG, PNG, PNG, JPEG]
    assert sample.messages[0]["content"] == [{"type": "image"}] * 4


def test_images_without_placeholder_go_before_the_question(check):
    assert texts(check(record(user="what?"))) == [["<image>", "\nwhat?"], ["red"]]


def test_no_image_is_decoded_or_read_twice(check, tmp_path, monkeypatch):
    decoded, read = [], []
    load, opened = ImageFile.ImageFile.load, Image.open

    def counting_load(self):
        if self.tile or not getattr(self, "counted", False):
            decoded.append(self.format)
            self.counted = True
        return load(self)

    def counting_open(stream, *args, **kwargs):
        read.append(stream)
        return opened(stream, *args, **kwargs)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counting_load)
    monkeypatch.setattr(Image, "open", counting_open)
    (tmp_path / "a.jpg").write_bytes(JPEG)
    bmp = files.encode(files.photo(), "BMP")
    read.clear()
    decoded.clear()
    sample = check(record(["a.jpg", "a.jpg", bmp, PNG], user="<image>" * 4), max_pixels=10_000)
    assert len(sample.images) == 4
    assert sorted(decoded) == ["BMP", "JPEG", "PNG"]
    assert len(read) == 3


@pytest.mark.parametrize("damage", ["text", "cut", "empty", "short"])
def test_videos_that_cannot_be_read(refused, tmp_path, write_clip, damage):
    path = write_clip(tmp_path / "clip.mp4", 1 if damage == "short" else 24, options={"movflags": "faststart"})
    if damage != "short":
        data = path.read_bytes()
        path.write_bytes({"text": b"no video", "cut": data[: len(data) // 2], "empty": b""}[damage])
    assert refused(record([], user="<video>what?", videos=["clip.mp4"])) == "unreadable_video"


def test_without_a_decoder_no_row_is_to_blame(check, tmp_path, write_clip, monkeypatch):
    monkeypatch.setattr("nemo_bard.data.video.DECODERS", {})
    write_clip(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="pip install av") as error:
        check(record([], user="<video>what?", videos=["clip.mp4"]))
    assert not isinstance(error.value, RejectedError)


def test_few_frames_of_a_video_are_held(tmp_path, write_clip):
    path = write_clip(tmp_path / "clip.mp4", 120)
    frames, metadata = vetting.read_video(path, vetting._video_processor())
    assert len(frames) <= 8
    assert (metadata.frames_indices[0], metadata.frames_indices[-1]) == (0, 119)


@pytest.mark.parametrize(
    ("answer", "stripped"),
    [
        ("<think>\nlong\n\nthought</think>\n\n<answer>B</answer>", "<answer>B</answer>"),
        ("First. <think>a</think>Then. <think>b</think> Last.", "First. Then. Last."),
        ("begun in the prompt\n</think>\nB", "B"),
        ("no thinking", "no thinking"),
        ([{"type": "text", "text": "<think>a</think>"}, {"type": "text", "text": "B"}], "B"),
    ],
)
def test_thinking_is_kept_or_stripped(check, answer, stripped):
    assert "".join(texts(check(record(answer=answer), think="strip"))[1]) == stripped
    whole = answer if isinstance(answer, str) else "".join(part["text"] for part in answer)
    assert "".join(texts(check(record(answer=answer)))[1]) == whole


def test_answers_that_are_thinking_only(check, refused):
    assert refused(record(answer="<think>a</think>\n"), think="strip") == "empty_answer"
    assert refused(record(answer="<think>cut at the leng"), think="strip") == "thinking"
    assert refused(record(answer="<think>a</think>B</think>"), think="strip") == "thinking"
    sample = check(record(user="<image>what does <think>a</think> mean?"), think="strip")
    assert texts(sample)[0][1] == "what does <think>a</think> mean?", "only answers think"


def test_a_system_prompt_is_for_rows_without(check):
    sample = check(record(user="what?"), system="Look at <image> well.")
    assert texts(sample) == [["Look at <image> well."], ["<image>", "\nwhat?"], ["red"]]
    own = [{"role": "system", "content": "own"}, *record().messages]
    assert texts(check(record(messages=own), system="other"))[0] == ["own"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_pixels": 100}, "max_pixels must be an integer >= 1024 or null, got 100"),
        ({"max_pixels": "1M"}, "max_pixels must be"),
        ({"think": "stripp"}, "think must be one of keep, strip, got 'stripp' .did you mean 'strip'"),
        ({"system": ""}, "system must be a text"),
        ({"system": "a<|im_end|>"}, "system: the text holds"),
    ],
)
def test_settings_are_checked(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        VetSettings(**settings)
    assert not isinstance(error.value, RejectedError)


def test_content_keys_tell_samples_apart(check, tmp_path):
    (tmp_path / "same.png").write_bytes(PNG)
    key = content_key(check(record()))
    assert len(key) == 16
    assert key == content_key(check(record(id="other"), name="elsewhere:9"))
    assert key == content_key(check(record(["same.png"])))
    others = [
        record(answer="red."),
        record(user="what?<image>"),
        record([JPEG]),
        record([], user="what?"),
        record([PNG, PNG], user="<image><image>what?"),
        record(messages=[*record().messages, {"role": "user", "content": "?"}]),
        record(messages=[{"role": "system", "content": "what?"}, *record().messages]),
    ]
    keys = [content_key(check(row)) for row in others]
    assert len({key, *keys}) == len(others) + 1
    assert content_key(check(record([JPEG]), max_pixels=9999)) != keys[2]


def test_the_row_is_left_as_it_was(check):
    row = record(user="what?", answer="<think>a</think>b")
    before = json.dumps(row.messages)
    check(row, think="strip", system="s")
    assert json.dumps(row.messages) == before


def test_relative_paths_become_absolute(tmp_path, write_clip, monkeypatch):
    write_clip(tmp_path / "clip.mp4")
    monkeypatch.chdir(tmp_path)
    row = record([], user="<video>what?", videos=["clip.mp4"])
    sample = vet(row, root_dir=type(tmp_path)("."), name="a", settings=VetSettings())
    assert sample.videos == [os.path.join(os.getcwd(), "clip.mp4")]
