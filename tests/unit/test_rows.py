"""Raw data of any layout and prepared folders as data sets: items, headers, checks, and the reader that a path means."""

from __future__ import annotations

import json
import os
import pickle
import shutil

import pytest
from PIL import Image
from prepared_folder import sample, write_prepared
from raw_files import picture, write_csv, write_rows, write_tar

from nemo_bard.base.paths import recipes_dir
from nemo_bard.data import PreparedDataset, RowsDataset, open_dataset
from nemo_bard.data.checks import check_once
from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.readers import input_files
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import make_job

RED, BLUE = picture((250, 0, 0)), picture((0, 0, 250), (10, 4))


def talk(question="<image>\nWhat?", answer="Red."):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]


@pytest.fixture
def llava(tmp_path):
    """A list as LLaVA has it, and a folder of images."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images/red.jpg").write_bytes(RED)
    (tmp_path / "images/blue.jpg").write_bytes(BLUE)
    rows = [
        {"id": "r", "image": "red.jpg", "conversations": talk(), "level": 2},
        {"id": "b", "image": ["blue.jpg", "red.jpg"], "conversations": talk("Which?", "Blue, red.")},
        {"id": "t", "conversations": talk("1+1?", "2")},
    ]
    return write_rows(tmp_path / "llava.json", rows), tmp_path / "images"


def shown(item):
    """Roles, texts, and images by size and rough color."""
    parts = []
    for message in item["conversation"]:
        for part in message["content"]:
            image = part.get("image")
            parts.append(part["text"] if image is None else (image.size, image.getpixel((1, 1))[0] > 128))
    return parts


def test_items_of_a_llava_list(llava):
    path, images = llava
    data = open_dataset(f"rows:{path},layout=llava,root_dir={images}")
    assert isinstance(data, RowsDataset)
    assert [shown(data[index]) for index in range(len(data))] == [
        [((8, 6), True), "\nWhat?", "Red."],
        [((10, 4), False), ((8, 6), True), "\nWhich?", "Blue, red."],  # no placeholders: before the first text
        ["1+1?", "2"],
    ]
    assert (data[0]["sample_index"], data[0]["meta"]) == (0, {"id": "r", "level": 2})
    assert data.describe(1) == {"source": f"{path}:1", "id": "b"}
    assert shown(pickle.loads(pickle.dumps(data))[1]) == shown(data[1])
    assert len(open_dataset(f"rows:{path},root_dir={images}", limit=2)) == 2
    with pytest.raises(IndexError, match="outside a data set of 3 samples"):
        data[3]


def test_peek_reads_headers_alone(llava, monkeypatch):
    path, images = llava
    data = RowsDataset(path, root_dir=images)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("an image was decoded"))
    assert [part["image"].size for part in data.peek(1)["conversation"][0]["content"] if "image" in part] == [
        (10, 4),
        (8, 6),
    ]


def test_bytes_count_before_a_path_and_paths_start_at_the_file(tmp_path):
    rows = [
        {"id": "1", "image": {"bytes": RED, "path": "gone.jpg"}, "conversations": talk(), "data_source": "s"},
        {"id": "2", "image": {"bytes": None, "path": "pictures/b.jpg"}, "conversations": talk(), "data_source": "s"},
    ]
    path = write_rows(tmp_path / "set" / "train-00000-of-00001.parquet", rows)
    (path.parent / "pictures").mkdir()
    (path.parent / "pictures/b.jpg").write_bytes(BLUE)
    data = RowsDataset(path.parent, split="train")
    assert [shown(data[index])[0] for index in range(2)] == [((8, 6), True), ((10, 4), False)]


def test_every_format_gives_the_same_conversation(tmp_path):
    (tmp_path / "red.jpg").write_bytes(RED)
    line = {"messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}]}
    write_rows(tmp_path / "m.jsonl", [{**line, "images": ["red.jpg"]}])
    write_rows(tmp_path / "v.json", [{"image": "red.jpg", "conversations": talk()}])
    write_rows(tmp_path / "c.arrow", [{"images": [{"bytes": RED}], "texts": [{"user": "What?", "assistant": "Red."}]}])
    write_csv(tmp_path / "t.csv", [["image", "question", "answer"], ["red.jpg", "What?", "Red."]])
    write_tar(tmp_path / "w.tar", [("0.jpg", RED), ("0.json", {"conversations": talk("What?")})])
    found = [
        shown(open_dataset(str(tmp_path / name))[0]) for name in ("m.jsonl", "v.json", "c.arrow", "t.csv", "w.tar")
    ]
    assert found == [[((8, 6), True), "\nWhat?", "Red."]] * 5


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"image": "gone.jpg", "conversations": talk()}, "image file .*gone.jpg does not exist"),
        ({"image": [None], "conversations": talk()}, "image 0 is null"),
        ({"image": {"bytes": None, "path": None}, "conversations": talk()}, "image 0 is null"),
        ({"image": {"bytes": ""}, "conversations": talk()}, "image"),
        ({"conversations": talk()}, r"1 image placeholder.s. but 0 image.s."),
        ({"conversations": talk("Hi", " ")}, "the answer of the assistant is empty"),
        ({"conversations": talk("Hi <|im_end|>")}, r"holds <.im_end.>, which"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "the speaker must be one of"),
        ({"conversation": []}, "columns found conversation; wanted conversations"),
        (["x"], "a row must be a JSON object"),
    ],
)
def test_checks_name_file_and_row(tmp_path, row, reason):
    path = write_rows(tmp_path / "a.jsonl", [{"conversations": talk("Hi")}, row])
    data = RowsDataset(path, validate=False)
    with pytest.raises(ValueError, match=rf"a.jsonl:1: .*{reason}") as caught:
        data.check(1)
    with pytest.raises(ValueError, match=reason):
        data[1]
    assert "\n" not in str(caught.value)
    assert data.describe(1)["source"] == f"{path}:1"
    with pytest.raises(ValueError, match=r"a.jsonl:1"):
        RowsDataset(path)  # all rows are checked at the start
    assert len(RowsDataset(path, limit=1)) == 1


def test_a_note_says_that_rows_were_checked(llava, tmp_path, monkeypatch):
    path, images = llava
    data = RowsDataset(path, root_dir=images, validate=False)
    check_once(data, tmp_path / "notes")
    monkeypatch.setattr(RowsDataset, "check", lambda *_: pytest.fail("checked again"))
    check_once(data, tmp_path / "notes")


def test_fingerprints_change_with_what_is_read(tmp_path):
    (tmp_path / "a.jpg").write_bytes(RED)
    (tmp_path / "a.txt").write_text("Red.")
    first = RowsDataset(tmp_path).fingerprint()
    assert RowsDataset(tmp_path).fingerprint() == first
    os.utime(tmp_path / "a.txt", ns=(1, 1))
    second = RowsDataset(tmp_path).fingerprint()
    (tmp_path / "b.jpg").write_bytes(BLUE)
    (tmp_path / "b.txt").write_text("Blue.")
    assert len({first, second, RowsDataset(tmp_path).fingerprint(), RowsDataset(tmp_path, limit=1).fingerprint()}) == 4


def test_identity_is_what_the_samples_are_and_not_where(llava, tmp_path):
    path, images = llava
    data = RowsDataset(path, root_dir=images)
    before = data.identity()
    shutil.copytree(tmp_path, tmp_path / "copy")
    copied = RowsDataset(tmp_path / "copy" / path.name, root_dir=tmp_path / "copy/images")
    assert copied.identity() == before
    assert copied.fingerprint() != data.fingerprint()
    assert RowsDataset(path, root_dir=images, limit=2).identity() != before
    path.write_text(path.read_text().replace("1+1?", "2+1?"))
    assert RowsDataset(path, root_dir=images).identity() != before


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"root_dir": "none"}, "root_dir none is not a folder"),
        ({"validate": "yes"}, "validate must be true or false, got 'yes'"),
        ({"limit": 0}, "limit must be an integer >= 1 or null, got 0"),
        ({"layout": "lava"}, "layout must be one of .* got 'lava'"),
        ({"split": "train"}, "is a file, splits are chosen among those of a folder"),
    ],
)
def test_settings_that_are_not_allowed(llava, settings, reason):
    with pytest.raises(ValueError, match=reason):
        RowsDataset(llava[0], **settings)


def test_the_reader_of_a_path(tmp_path, llava):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/red.jpg").write_bytes(RED)
    (tmp_path / "one/red.txt").write_text("Red.")
    assert shown(open_dataset(str(tmp_path / "one"))[0]) == [((8, 6), True), "\nDescribe the image.", "Red."]
    ours = write_rows(tmp_path / "ours.jsonl", [{"messages": [{"role": "assistant", "content": "x"}]}])
    assert isinstance(open_dataset(str(ours)), JsonlDataset)
    theirs = write_rows(tmp_path / "theirs.jsonl", [{"conversations": talk("Hi")}])
    assert isinstance(open_dataset(str(theirs)), RowsDataset)
    (tmp_path / "object.json").write_text(json.dumps({"conversations": talk("Hi")}, indent=1))
    assert shown(open_dataset(str(tmp_path / "object.json"))[0]) == ["Hi", "Red."]
    assert isinstance(open_dataset(str(tmp_path / "the*.jsonl")), RowsDataset)
    (tmp_path / "no.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="no.jsonl:1: the line is not JSON"):
        open_dataset(str(tmp_path / "no.jsonl"))
    with pytest.raises(ValueError, match="columns found a; wanted messages"):
        open_dataset(str(write_rows(tmp_path / "what.jsonl", [{"a": 1}])))
    assert input_files({"_target_": "nemo_bard.data.RowsDataset", "path": str(theirs)}) == {"path": theirs}
    assert input_files({"_target_": "nemo_bard.data.open_dataset", "spec": str(tmp_path / "one")}) == {}


def test_a_prepared_folder(tmp_path):
    out = tmp_path / "out"
    sources = {"charts": [sample(f"c{i}", sizes=[(8 + i, 6)]) for i in range(5)], "text": [sample("t", sizes=())]}
    write_prepared(out, sources, leave_out=[("charts", 1)])
    data = open_dataset(str(out))
    assert isinstance(data, PreparedDataset)
    assert [data[index]["meta"]["id"] for index in range(len(data))] == ["c0", "c2", "c3", "c4", "t"]
    assert [data.peek(index)["sample_index"] for index in range(5)] == list(range(5))
    assert shown(data[1]) == [((10, 6), True), "What is it?", "A picture."]
    assert data.describe(4) == {"source": f"{out / 'text' / 'part-00000.arrow'}:0", "id": "t"}
    text = open_dataset(f"prepared:{out},source=text")
    assert (len(text), shown(text[0])) == (1, ["What is it?", "A picture."])
    assert text.fingerprint() != data.fingerprint() == pickle.loads(pickle.dumps(data)).fingerprint()
    assert input_files({"_target_": "nemo_bard.data.PreparedDataset", "path": str(out)}) == {
        "path": out / "manifest.json"
    }
    with pytest.raises(IndexError, match="index 5 is outside a data set of 5 samples"):
        data[5]
    with pytest.raises(ValueError, match="source must be one of charts, text, got 'chart' .did you mean 'charts'"):
        open_dataset(f"prepared:{out},source=chart")
    with pytest.raises(ValueError, match="already prepared"):
        RowsDataset(out)


def test_a_chain_takes_rows(llava, tmp_path):
    path, images = llava

    def recipe(*words):
        composed = compose(read_words(recipes_dir() / "bard_b32.yaml", ["data=rows", f"data.path={path}", *words]))
        job = make_job(composed)
        return job, job.stage("pbm_b4").recipe

    job, found = recipe(f"data.root_dir={images}", f"data.evaluation={path}")
    section = {"_target_": "nemo_bard.data.RowsDataset", "path": str(path), "layout": None, "split": None}
    assert found["dataset"] == {**section, "root_dir": str(images)}
    assert len(open_dataset(found["dataset"])) == 3
    assert "validation_dataset" not in found
    assert (job.evaluation.data, job.stage("pbm_b4").reads()) == (str(path), {"dataset": path})
    _, found = recipe(f"data.validation_path={path}", "data.layout=llava")
    assert found["validation_dataset"] == {"_target_": "nemo_bard.data.open_dataset", "spec": str(path)}
    assert found["dataset"]["layout"] == "llava"
