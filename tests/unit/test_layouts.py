"""Layouts: rows as published, in the formats they are published in, against turns written by hand."""

from __future__ import annotations

import dataclasses
import json
import sys
import types

import pytest
from raw_files import picture, write_csv, write_rows, write_tar

from nemo_bard.data.layouts import LAYOUTS, check_columns, detect, lay_out
from nemo_bard.data.layouts.own import CAPTION_PROMPT
from nemo_bard.data.layouts.row import layout
from nemo_bard.data.raw import RawSource
from nemo_bard.data.sample import Record, RejectedError

RED, BLUE = picture((200, 30, 40)), picture((20, 30, 200))


def plain(record):
    return dataclasses.replace(record, images=tuple(record.images), videos=tuple(record.videos))


def expected(**fields):
    return plain(Record(**fields))


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def records(path, **settings):
    source = RawSource(path, **settings)
    return source.layout, [plain(source.record(index)) for index in range(len(source))]


RATINGS = {"relevance_ratings": [4, None, 2], "formatting_ratings": None, "formatting_min": None}
FINEVISION = [
    {
        "images": [{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "b.jpg"}],
        "texts": [{"user": "Compare.", "assistant": "Red, blue."}, {"user": "Sure?", "assistant": "Yes."}],
        "source": "charts",
        **RATINGS,
    },
    {"images": None, "texts": [{"user": "1+1?", "assistant": "2"}], "source": "text", **RATINGS},
    {"images": [], "texts": [{"user": "2+2?", "assistant": "4"}], "source": "text", **RATINGS},
    {"images": [None], "texts": [{"user": "What?", "assistant": "Lost."}], "source": "charts", **RATINGS},
]


@pytest.mark.parametrize("end", ["parquet", "arrow"])
def test_finevision(tmp_path, end):
    name, found = records(write_rows(tmp_path / f"charts/train-00000-of-00001.{end}", FINEVISION))
    assert name == "finevision"
    assert found[0] == expected(
        messages=[user("Compare."), assistant("Red, blue."), user("Sure?"), assistant("Yes.")],
        images=[{"bytes": RED, "path": None}, {"bytes": BLUE, "path": "b.jpg"}],
        facts={"source": "charts", **RATINGS, "relevance_min": 2},
    )
    assert [list(record.images) for record in found[1:]] == [[], [], [None]]


def test_cauldron(tmp_path):
    texts = [{"user": "What is it?", "assistant": "A chart.", "source": "vqa"}]
    rows = [{"images": [{"bytes": RED, "path": None}], "texts": texts}]
    name, found = records(write_rows(tmp_path / "train-00000-of-00001.parquet", rows))
    assert name == "cauldron"
    assert found == [
        expected(
            messages=[user("What is it?"), assistant("A chart.")],
            images=[{"bytes": RED, "path": None}],
            facts={"source": "vqa"},
        )
    ]


LLAVA = [
    {
        "id": "000000033471",
        "image": "coco/train2017/000000033471.jpg",
        "conversations": [
            {"from": "human", "value": "<image>\nWhat are the colors?"},
            {"from": "gpt", "value": "White and red."},
        ],
    },
    {
        "id": 7,
        "model": "gpt4",
        "conversations": [
            {"from": "system", "value": "Be short."},
            {"from": "human", "value": "Hello"},
            {"from": "gpt", "value": "Hi."},
        ],
    },
]


@pytest.mark.parametrize("end", ["json", "jsonl", "parquet"])
def test_llava(tmp_path, end):
    name, found = records(
        write_rows(tmp_path / f"llava_instruct.{end}", [{**row, "id": str(row["id"])} for row in LLAVA])
    )
    assert name == "llava"
    model = {"model": None} if end == "parquet" else {}
    assert found[0] == expected(
        messages=[user("<image>\nWhat are the colors?"), assistant("White and red.")],
        images=["coco/train2017/000000033471.jpg"],
        id="000000033471",
        facts=model,
    )
    assert found[1] == expected(
        messages=[{"role": "system", "content": "Be short."}, user("Hello"), assistant("Hi.")],
        id="7",
        facts={"model": "gpt4"},
    )


def test_llava_with_several_images_and_videos():
    talk = [{"from": "human", "value": "<image><image><video> Same?"}, {"from": "gpt", "value": "No."}]
    record = plain(
        lay_out("llava", {"id": 1, "image": ["a.jpg", {"path": "b.jpg"}], "video": "c.mp4", "conversations": talk})
    )
    assert record == expected(
        messages=[user("<image><image><video> Same?"), assistant("No.")],
        images=["a.jpg", {"path": "b.jpg"}],
        videos=["c.mp4"],
        id="1",
    )
    talk[0]["value"] = "<image>\nWhat happens?"  # sets of videos write it where the video goes
    record = plain(lay_out("llava", {"video": "c.mp4", "conversations": talk}))
    assert record == expected(messages=[user("<video>\nWhat happens?"), assistant("No.")], videos=["c.mp4"])
    with pytest.raises(RejectedError, match="a video must be a path, got 3") as caught:
        lay_out("llava", {"video": [3], "conversations": talk})
    assert caught.value.kind == "layout"


@pytest.mark.parametrize(
    "turns",
    [
        [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}],
        [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}],
        [
            {"role": None, "content": None, "from": "human", "value": "What?"},
            {"role": "assistant", "content": "A cat.", "from": None, "value": None},
        ],
    ],
)
def test_onevision(tmp_path, turns):
    rows = [
        {"id": "a_1", "image": {"bytes": RED, "path": "a.jpg"}, "conversations": turns, "data_source": "sharegpt"},
        {"id": "a_2", "image": None, "conversations": turns, "data_source": "sharegpt"},
    ]
    name, found = records(write_rows(tmp_path / "train.parquet", rows))
    assert name == "onevision"
    assert found == [
        expected(
            messages=[user("What?"), assistant("A cat.")], images=images, id=key, facts={"data_source": "sharegpt"}
        )
        for key, images in (("a_1", [{"bytes": RED, "path": "a.jpg"}]), ("a_2", []))
    ]


MMFINEREASON = {
    "question": "<image>\nHow much?",
    "image": {"bytes": RED, "path": None},
    "qwen3vl_235b_thinking_response": "<think>One and one.</think><answer>2</answer>",
    "answer": "2",
    "source": "MMK12",
    "id": 17,
    "is_consistent": True,
}


@pytest.mark.parametrize(
    ("own", "facts"),
    [
        ({"original_answer": "B"}, {"original_answer": "B"}),
        (
            {"ori_question": "How?", "caption": "A sum.", "pass_rate": 0.5},
            {"ori_question": "How?", "original_question": "How?", "caption": "A sum.", "pass_rate": 0.5},
        ),
        (
            {"original_question": "How?", "qwen3vl_235b_instruct_caption": "A sum.", "qwen3vl_4b_pass_rate": 0.5},
            {
                **{"original_question": "How?", "caption": "A sum.", "pass_rate": 0.5},
                **{"qwen3vl_235b_instruct_caption": "A sum.", "qwen3vl_4b_pass_rate": 0.5},
            },
        ),
    ],
)
def test_mmfinereason(tmp_path, own, facts):
    name, found = records(write_rows(tmp_path / "sft-00000-of-00001.parquet", [{**MMFINEREASON, **own}]))
    assert name == "mmfinereason"
    assert found == [
        expected(
            messages=[user("<image>\nHow much?"), assistant("<think>One and one.</think><answer>2</answer>")],
            images=[{"bytes": RED, "path": None}],
            id="MMK12/17",
            facts={"answer": "2", "source": "MMK12", "is_consistent": True, **facts},
        )
    ]


def test_archives(tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}]
    packed = {"prompts": ["First?", "Second?"], "captions": ["Red.", "Blue."], "images": ["img0.jpg", "img1.jpg"]}
    members = [
        ("000.jpg", RED),
        ("000.json", {"id": "x", "conversations": talk}),
        ("shard/001.json", packed),
        ("shard/001.img1.jpg", BLUE),
        ("shard/001.img0.jpg", RED),
        ("002.PNG", BLUE),
        ("002.txt", "A blue picture.\n"),
        ("002b.jpg", RED),
        ("002b.json", {"url": "u", "width": 8}),
        ("002b.txt", "Red."),
        ("002c.json", {"prompts": [["A?", "B?"]], "captions": [["a", "b"]], "images": ["coco/7.png"]}),
        ("002c.img0.jpg", RED),
        ("003.json", {"texts": [{"user": "Hi", "assistant": "Hello"}], "images": None}),
    ]
    write_tar(tmp_path / "00000.tar", members)
    name, found = records(tmp_path / "00000.tar")
    assert name == "webdataset"
    assert found == [
        expected(messages=[user("<image>\nWhat?"), assistant("Red.")], images=[RED], id="x"),
        expected(
            messages=[user("<image>\nFirst?"), assistant("Red."), user("<image>\nSecond?"), assistant("Blue.")],
            images=[RED, BLUE],
            id="shard/001",
        ),
        expected(messages=[user(CAPTION_PROMPT), assistant("A blue picture.")], images=[BLUE], id="002"),
        expected(
            messages=[user(CAPTION_PROMPT), assistant("Red.")], images=[RED], id="002b", facts={"url": "u", "width": 8}
        ),
        expected(messages=[user("<image>\nA?"), assistant("a"), user("B?"), assistant("b")], images=[RED], id="002c"),
        expected(messages=[user("Hi"), assistant("Hello")], id="003"),
    ]


def test_images_of_an_archive_go_by_number_and_as_listed(tmp_path):
    data = {number: picture(size=(8 + number, 6)) for number in (0, 1, 2, 10)}
    talk = {"messages": [user("<image>" * 4), assistant("x")]}
    pictures = [(f"img{number}.jpg", data[number]) for number in (0, 1, 10, 2)]  # as sorted by name
    members = [("a.json", talk), *((f"a.{end}", value) for end, value in pictures)]
    listed = {**talk, "images": ["img2", "img10.jpg", "b.img0.jpg", "img1.jpg"]}
    members += [("b.json", listed), *((f"b.{end}", value) for end, value in pictures)]
    renamed = {**talk, "images": ["coco/3.jpg", "coco/2.jpg", "coco/1.jpg", "coco/0.jpg"]}
    members += [("c.json", renamed), *((f"c.{end}", value) for end, value in pictures)]
    write_tar(tmp_path / "a.tar", members)
    _, found = records(tmp_path / "a.tar")
    orders = [[next(number for number in data if data[number] == one) for one in record.images] for record in found]
    assert orders == [[0, 1, 2, 10], [2, 10, 0, 1], [0, 1, 2, 10]]


@pytest.mark.parametrize(
    ("members", "kind", "reason"),
    [
        ([("a.jpg", RED)], "missing_text", "a.txt: the turn of the assistant has no text"),
        ([("a.jpg", RED), ("a.json", b"{")], "bad_json", "not JSON"),
        ([("a.jpg", RED), ("a.json", [])], "layout", "a.json must hold an object"),
        ([("a.jpg", RED), ("a.json", {"x": 1})], "layout", "columns found x, image; wanted"),
        ([("a.jpg", RED), ("a.txt", b"\xff\xfe")], "not_utf8", "a.txt is not UTF-8"),
        ([("a.jpg", RED), ("a.jpg", RED)], "bad_member", "a.jpg is there twice"),
        (
            [("a.img0.jpg", RED), ("a.json", {"captions": ["x"], "images": ["img9.jpg"]})],
            "bad_member",
            r"names the images \['img9.jpg'\], the archive has img0.jpg",
        ),
        (
            [("a.img0.jpg", RED), ("a.img1.jpg", RED), ("a.json", {"captions": ["x"], "images": ["img1.jpg"]})],
            "bad_member",
            "the archive has img0.jpg, img1.jpg",
        ),
        (
            [("a.img0.jpg", RED), ("a.json", {"captions": ["x", "y"], "images": ["img0.jpg"]})],
            "placeholders",
            "1 images but 2 captions",
        ),
    ],
)
def test_what_is_wrong_in_an_archive(tmp_path, members, kind, reason):
    write_tar(tmp_path / "a.tar", members)
    with pytest.raises(RejectedError, match=reason) as caught:
        RawSource(tmp_path / "a.tar", "webdataset").record(0)
    assert caught.value.kind == kind


@pytest.mark.parametrize("delimiter", [",", "\t"])
def test_tables_of_captions(tmp_path, delimiter):
    path = tmp_path / ("captions.csv" if delimiter == "," else "captions.tsv")
    rows = [["file_name", "text", "prompt"], ["a.jpg", 'He says "no",\nthen goes.', ""], ["b.jpg", "Blue.", "Color?"]]
    write_csv(path, rows, delimiter)
    name, found = records(path)
    assert name == "captions"
    assert found == [
        expected(messages=[user(CAPTION_PROMPT), assistant('He says "no",\nthen goes.')], images=["a.jpg"]),
        expected(messages=[user("Color?"), assistant("Blue.")], images=["b.jpg"]),
    ]
    write_csv(path, [["image", "caption"], ["", "x"], ["a.jpg", ""]], delimiter)
    source = RawSource(path)
    assert source.record(0).images == [None]  # an image is missing, the row is not about text
    with pytest.raises(RejectedError, match="has no text"):
        source.record(1)


def test_captions_in_a_parquet_table(tmp_path):
    rows = [{"image": {"bytes": RED, "path": None}, "caption": "Red.", "id": 3, "width": 8}]
    name, found = records(write_rows(tmp_path / "a.parquet", rows))
    messages = [user(CAPTION_PROMPT), assistant("Red.")]
    assert (name, found) == (
        "captions",
        [expected(messages=messages, images=[{"bytes": RED, "path": None}], id="3", facts={"width": 8})],
    )


def test_folders_of_images(tmp_path):
    for name, data in (("a.jpg", RED), ("sub/b.jpg", BLUE), ("sub/c.png", BLUE)):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    (tmp_path / "a.txt").write_text("Red.\n")
    (tmp_path / "sub/metadata.csv").write_text("file_name,text\nb.jpg,Blue.\n")
    (tmp_path / "README.md").write_text("Mine.")
    source = RawSource(tmp_path)
    assert (source.layout, len(source)) == ("captions", 3)
    assert plain(source.record(0)) == expected(
        messages=[user(CAPTION_PROMPT), assistant("Blue.")], images=[str(tmp_path / "sub/b.jpg")]
    )
    assert plain(source.record(1)) == expected(
        messages=[user(CAPTION_PROMPT), assistant("Red.")], images=[str(tmp_path / "a.jpg")], id="a.jpg"
    )
    with pytest.raises(RejectedError, match="no text") as caught:
        source.record(2)  # neither the table nor a text describes it
    assert (caught.value.kind, source.where(2)) == ("missing_text", str(tmp_path / "sub/c.png"))


def test_metadata_of_images_in_any_layout(tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / name).write_bytes(RED)
    talk = {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]}
    write_rows(tmp_path / "metadata.jsonl", [{"image": ["a.jpg", "b.jpg"], **talk}, {"file_name": "c.jpg", **talk}])
    name, found = records(tmp_path)
    assert name == "llava"
    assert [record.images for record in found] == [("a.jpg", "b.jpg"), (str(tmp_path / "c.jpg"),)]


def test_messages_from_lines_and_tables(tmp_path):
    part = [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]
    row = {"id": "q", "messages": [{"role": "user", "content": part}], "images": ["a.jpg"], "level": 3}
    row["messages"].append({"role": "assistant", "content": [{"type": "text", "text": "Red."}]})
    wanted = expected(
        messages=[
            user([{"type": "image"}, {"type": "text", "text": "What?"}]),
            assistant([{"type": "text", "text": "Red."}]),
        ],
        images=["a.jpg"],
        id="q",
        facts={"level": 3},
    )
    for end in ("jsonl", "parquet"):
        assert records(write_rows(tmp_path / f"mine.{end}", [row])) == ("messages", [wanted])


def test_turns_as_text_and_as_an_object_of_lists(tmp_path):
    """A CSV can hold JSON only; ``datasets.Sequence`` stores an object of lists."""
    talk = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "Red."}]
    write_csv(tmp_path / "a.csv", [["image", "conversations"], ["a.jpg", json.dumps(talk)], ["a.jpg", "[{"]])
    turns = [user("What?"), assistant("Red.")]
    source = RawSource(tmp_path / "a.csv")
    assert (source.layout, source.record(0).messages) == ("llava", turns)
    with pytest.raises(RejectedError, match="'conversations' is a text and no JSON") as caught:
        source.record(1)
    assert caught.value.kind == "bad_json"
    lists = {"from": ["human", "gpt"], "value": ["What?", "Red."]}
    assert records(write_rows(tmp_path / "a.parquet", [{"conversations": lists}]))[1][0].messages == turns
    lists = {"user": ["A?", "B?"], "assistant": ["a", "b"], "source": ["s", "t"]}
    assert lay_out("cauldron", {"texts": lists}).messages == [user("A?"), assistant("a"), user("B?"), assistant("b")]
    with pytest.raises(RejectedError, match="must be a list of turns"):
        lay_out("llava", {"conversations": {"from": ["human"], "value": []}})


def test_tables_of_questions_and_responses():
    row = {"image": "a.jpg", "question": "What?", "response": "Red."}
    assert detect(row) == "captions"
    assert lay_out("captions", row).messages == [user("What?"), assistant("Red.")]


@pytest.mark.parametrize(
    ("turns", "kind", "reason"),
    [
        ([{"from": "bot", "value": "x"}], "unknown_role", r"conversations\[0\].*human, user, gpt.*got 'bot'"),
        ([{"value": "x"}], "unknown_role", "got None"),
        ([{"from": "human", "value": None}], "missing_text", "the turn of the user has no text"),
        ([{"from": "human", "value": 3}], "messages", "must be a text, got 3"),
        (["hello"], "messages", r"conversations\[0\] must be an object"),
        ([], "messages", "list of turns that is not empty"),
        (None, "messages", "got None"),
    ],
)
def test_turns_that_are_not_as_they_must_be(turns, kind, reason):
    with pytest.raises(RejectedError, match=reason) as caught:
        lay_out("llava", {"conversations": turns})
    assert caught.value.kind == kind


def test_a_layout_that_does_not_fit(tmp_path):
    with pytest.raises(RejectedError, match="columns found text, image; wanted conversations") as caught:
        lay_out("llava", {"text": "x", "image": None})
    assert caught.value.kind == "layout"
    with pytest.raises(
        ValueError, match="columns found a, b; wanted messages: messages; webdataset: __key__; .*captions: image or"
    ):
        detect({"a": 1, "b": 2})
    assert [detect({"texts": value}) for value in (None, 3, {"a": 1}, "x", [])] == ["finevision"] * 5
    with pytest.raises(ValueError, match="layout must be one of messages, .* got 'lava' .did you mean 'llava'"):
        check_columns("lava", [])
    table = write_rows(tmp_path / "a.parquet", [{"image": "a.jpg", "caption": "x"}])
    with pytest.raises(
        ValueError, match=r"a.parquet: the columns do not fit the layout llava: columns found image, caption"
    ):
        RawSource(table, "llava")
    lines = write_rows(tmp_path / "a.jsonl", [{"x": 1}, LLAVA[0]])
    source = RawSource(lines, "llava")  # lines may differ: each is judged by itself
    with pytest.raises(RejectedError, match="columns found x;"):
        source.record(0)
    assert source.record(1).id == LLAVA[0]["id"]


def test_layouts_from_outside(tmp_path, monkeypatch):
    @layout("frage", "antwort")
    def german(row):
        return Record(messages=[user(row["frage"]), assistant(row["antwort"])])

    module = types.ModuleType("my_layouts")
    module.german, module.wrong = german, lambda row: {"messages": []}
    monkeypatch.setitem(sys.modules, "my_layouts", module)
    path = write_rows(tmp_path / "a.jsonl", [{"frage": "Wer?", "antwort": "Ich."}, {"frage": "Wer?", "antwort": None}])
    wanted = expected(messages=[user("Wer?"), assistant("Ich.")])
    assert plain(RawSource(path, "my_layouts.german").record(0)) == wanted
    with pytest.raises(ValueError, match="my_layouts.wrong must return a Record, got dict"):
        RawSource(path, "my_layouts.wrong").record(0)
    LAYOUTS.register("german", german)
    try:
        assert RawSource(path).layout == "german"
    finally:
        LAYOUTS.unregister("german")


def test_a_mistake_of_a_layout_is_a_reject_of_its_row(monkeypatch):
    module = types.ModuleType("my_layouts")
    module.strict = lambda row: Record(messages=[user(row["frage"].strip())])
    monkeypatch.setitem(sys.modules, "my_layouts", module)
    with pytest.raises(RejectedError, match="layout my_layouts.strict: KeyError: 'frage'") as caught:
        lay_out("my_layouts.strict", {})
    assert caught.value.kind == "layout"
