import base64
import io
import json
import pickle

import numpy as np
import pytest
from PIL import Image

from nemo_bard.data.conversation import split_last_response
from nemo_bard.data.jsonl import JsonlDataset, make_jsonl

ANSWER = {"role": "assistant", "content": "yes"}


def png(colour=(200, 10, 10), mode="RGB", **save):
    buffer = io.BytesIO()
    Image.new(mode, (6, 4), colour).save(buffer, format="PNG", **save)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png((200, 10, 10)))
    (tmp_path / "images" / "b.png").write_bytes(png((10, 200, 10)))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    (tmp_path / "cut.png").write_bytes(png()[:44])
    (tmp_path / "clip.mp4").write_bytes(b"video")
    return tmp_path


def write(folder, *lines, name="data.jsonl", end="\n"):
    path = folder / name
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end
    path.write_text(text, encoding="utf-8")
    return str(path)


def user(*parts):
    return {"messages": [{"role": "user", "content": list(parts)}, ANSWER]}


def colours(sample):
    parts = [p for m in sample["conversation"] for p in m["content"] if p["type"] == "image"]
    assert all(p["image"].mode == "RGB" for p in parts)
    return [p["image"].getpixel((0, 0)) for p in parts]


def test_placeholders_take_the_entries_in_order(folder):
    record = {
        "id": 7,
        "source": "made",
        "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "<image>\nfirst and <image> second"},
            ANSWER,
            {"role": "user", "content": "<image>again"},
            ANSWER,
        ],
        "images": ["images/a.png", {"path": "images/b.png", "bytes": None}, "images/a.png"],
    }
    sample = make_jsonl(write(folder, record))[0]
    assert sample["sample_index"] == 0
    assert sample["meta"] == {"id": 7, "source": "made"}
    assert colours(sample) == [(200, 10, 10), (10, 200, 10), (200, 10, 10)]
    assert [m["role"] for m in sample["conversation"]] == ["system", "user", "assistant", "user", "assistant"]
    kinds = [[p.get("text", "IMAGE") for p in m["content"]] for m in sample["conversation"]]
    assert kinds == [["be brief"], ["IMAGE", "\nfirst and ", "IMAGE", " second"], ["yes"], ["IMAGE", "again"], ["yes"]]


@pytest.mark.parametrize(
    "entry",
    [
        "images/a.png",
        {"path": "images/a.png"},
        {"bytes": base64.b64encode(png()).decode()},
        {"base64": base64.b64encode(png()).decode()},
        base64.b64encode(png()).decode(),
        "data:image/png;base64," + base64.b64encode(png()).decode(),
        {"url": "data:image/png;base64," + base64.b64encode(png()).decode()},
    ],
)
def test_every_way_to_give_an_image(folder, entry):
    bare = {"messages": [{"role": "user", "content": "<image>?"}, ANSWER], "images": [entry]}
    typed = user({"type": "image", "image": entry}, {"type": "text", "text": "?"})
    linked = user({"type": "image_url", "image_url": entry if isinstance(entry, dict) else {"url": entry}})
    data = make_jsonl(write(folder, bare, typed, linked))
    assert [colours(data[i]) for i in range(3)] == [[(200, 10, 10)]] * 3


def test_typed_part_without_source_takes_the_next_entry(folder):
    record = {**user({"type": "image"}, {"type": "text", "text": "?"}), "images": ["images/b.png"]}
    assert colours(make_jsonl(write(folder, record))[0]) == [(10, 200, 10)]


def test_root_dir_and_absolute_paths(folder):
    lines = [
        user({"type": "image", "image": "a.png"}),
        user({"type": "image", "image": str(folder / "images" / "b.png")}),
    ]
    data = make_jsonl(write(folder, *lines), root_dir=str(folder / "images"))
    assert colours(data[0]) == [(200, 10, 10)]
    assert colours(data[1]) == [(10, 200, 10)]


def test_transparent_grey_and_rotated_images_become_upright_rgb(folder):
    (folder / "grey.png").write_bytes(png(128, mode="L"))
    exif = Image.Exif()
    exif[0x0112] = 6
    (folder / "turned.png").write_bytes(png(exif=exif))
    data = make_jsonl(
        write(folder, user({"type": "image", "image": "grey.png"}), user({"type": "image", "image": "turned.png"}))
    )
    assert colours(data[0]) == [(128, 128, 128)]
    assert data[1]["conversation"][0]["content"][0]["image"].size == (4, 6)


def test_video_is_handed_on_as_a_path(folder):
    record = {"messages": [{"role": "user", "content": "<video>?"}, ANSWER], "videos": ["clip.mp4"]}
    sample = make_jsonl(write(folder, record))[0]
    assert sample["conversation"][0]["content"][0] == {"type": "video", "video": str(folder / "clip.mp4")}


@pytest.mark.parametrize("end", ["", "\n", "\r\n", "\n\n  \n"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
def test_random_access_equals_reading_line_by_line(folder, monkeypatch, end, chunk):
    monkeypatch.setattr("nemo_bard.data.jsonl._CHUNK_BYTES", chunk)
    lines = [
        {"messages": [{"role": "user", "content": f"frage {i} " + "\u00e4\u20ac" * i}, ANSWER], "n": i}
        for i in range(9)
    ]
    path = write(folder, *lines, end=end)
    data = make_jsonl(path)
    assert len(data) == 9
    for index in np.random.RandomState(0).permutation(9):
        sample = data[int(index)]
        assert sample["meta"] == {"n": index}
        assert sample["sample_index"] == index
        assert sample["conversation"][0]["content"][0]["text"] == lines[index]["messages"][0]["content"]
    for limit in (1, 4, 9, 50):
        short = make_jsonl(path, limit=limit)
        assert [short[i]["meta"]["n"] for i in range(len(short))] == list(range(min(limit, 9)))


def test_items_are_fresh_and_the_data_set_can_be_sent_to_a_worker(folder):
    data = pickle.loads(pickle.dumps(make_jsonl(write(folder, user({"type": "image", "image": "images/a.png"})))))
    data[0]["conversation"][0]["content"].clear()
    assert colours(data[0]) == [(200, 10, 10)]


BAD_LINES = [
    ("{not json", "the line is not JSON"),
    ("", "the line is empty"),
    ("[1]", "must be a JSON object"),
    ('{"messages": [], "messages": []}', "the key 'messages' is given twice"),
    ({"text": "hi"}, "'messages' must be a non-empty list"),
    ({"messages": [{"role": "user", "content": "hi"}]}, "no assistant turn"),
    (
        {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": " \n"}]},
        "answer of the assistant is empty",
    ),
    ({"messages": [{"role": "robot", "content": "hi"}, ANSWER]}, "role must be one of system, user, assistant"),
    ({"messages": [{"role": "user", "content": 5}, ANSWER]}, "content must be a text or a list"),
    ({"messages": ["hi", ANSWER]}, "must be an object with 'role' and 'content'"),
    (user({"type": "audio", "audio": "x"}), "type must be one of"),
    (user({"type": "text"}), "'text' must be a text"),
    (user({"type": "text", "text": "<|image_pad|>"}), "<\\|image_pad\\|>, which the chat template reserves"),
    (
        {"messages": [{"role": "user", "content": "<image>"}, ANSWER]},
        "1 image placeholders in 'messages' but 0 entries",
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, ANSWER], "images": ["images/a.png"]},
        "0 image placeholders in 'messages' but 1",
    ),
    (
        {"messages": [{"role": "user", "content": "<image>"}, ANSWER], "images": "images/a.png"},
        "'images' must be a list",
    ),
    (
        {
            "messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<image>"}],
            "images": ["images/a.png"],
        },
        "text only",
    ),
    (user({"type": "image", "image": "images/none.png"}), "images/none.png does not exist"),
    (user({"type": "image", "image": "broken.png"}), "broken.png cannot be read"),
    (user({"type": "image", "image": "https://example.com/a.png"}), "must be a local file"),
    (user({"type": "image", "image": "data:image/png,abc"}), "data: URI must be"),
    (user({"type": "image", "image": {"bytes": "@@@"}}), "not base64"),
    (
        user({"type": "image", "image": {"bytes": base64.b64encode(b"nothing").decode()}}),
        "given as bytes cannot be read",
    ),
    ({"messages": [{"role": "user", "content": "<video>"}, ANSWER], "videos": ["none.mp4"]}, "none.mp4 does not exist"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_bad_line_is_one_message_with_file_and_line(folder, line, message):
    good = {"messages": [{"role": "user", "content": "hi"}, ANSWER]}
    path = write(folder, good, line, good)
    with pytest.raises(ValueError, match=message) as caught:
        make_jsonl(path)
    assert str(caught.value).startswith(f"{path}:2: ")
    assert "\n" not in str(caught.value)
    assert make_jsonl(path, limit=1)[0]["sample_index"] == 0


def test_without_validation_the_error_comes_with_the_item(folder):
    good = {"messages": [{"role": "user", "content": "hi"}, ANSWER]}
    data = make_jsonl(write(folder, good, "{", user({"type": "image", "image": "none.png"})), validate=False)
    assert data[0]["sample_index"] == 0
    for index, message in (
        (1, "data.jsonl:2: the line is not JSON"),
        (2, "data.jsonl:3: image file .*none.png does not"),
    ):
        with pytest.raises(ValueError, match=message):
            data[index]


def test_image_whose_pixels_are_cut_off_is_named_when_read(folder):
    data = make_jsonl(write(folder, user({"type": "image", "image": "cut.png"})))
    with pytest.raises(ValueError, match=r"data.jsonl:1: image .*cut.png cannot be read"):
        data[0]


def test_bad_arguments_are_named(folder):
    path = write(folder, {"messages": [{"role": "user", "content": "hi"}, ANSWER]})
    empty = write(folder, "", name="empty.jsonl")
    for kwargs, message in [
        ({"path": str(folder / "none.jsonl")}, "none.jsonl does not exist"),
        ({"path": path, "root_dir": str(folder / "none")}, "root_dir .*none is not a folder"),
        ({"path": path, "limit": 0}, "limit must be"),
        ({"path": path, "validate": "maybe"}, "validate must be"),
        ({"path": empty}, "holds no line"),
    ]:
        with pytest.raises(ValueError, match=message):
            make_jsonl(**kwargs)


def test_index_outside_the_data_set(folder):
    data = JsonlDataset(write(folder, {"messages": [{"role": "user", "content": "hi"}, ANSWER]}))
    for index in (-1, 1):
        with pytest.raises(IndexError):
            data[index]


def test_split_last_response():
    turns = [{"role": "user", "content": "a"}, ANSWER, {"role": "user", "content": "b"}]
    last = {"role": "assistant", "content": [{"type": "text", "text": "x"}, {"type": "text", "text": "y"}]}
    assert split_last_response([*turns, last]) == (turns, "xy")
    assert split_last_response(turns) == (turns[:1], "yes")
    with pytest.raises(ValueError, match="no assistant turn"):
        split_last_response(turns[:1])
