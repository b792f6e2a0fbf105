"""Raw files: units hold every row once and in order, what is damaged is named, and rows are found by number."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import random
import tarfile
import tracemalloc
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from raw_files import picture, write_csv, write_rows, write_tar

from nemo_bard.data.prepared.layout import MANIFEST
from nemo_bard.data.raw import RawSource, archives, delimited, elements, find_units, lines, pictures, read_unit, tables
from nemo_bard.data.raw.files import split_of
from nemo_bard.data.sample import RejectedError


def rows(count):
    """Rows of many lengths, with what confuses a reader that looks for brackets and line ends."""
    hard = ["", "\\", 'a "quote"', "[{]}", "line\nend\r\n", "é \u2028 \U0001f600", '\\"],[', "x" * 300]
    return [
        {"messages": [{"role": "user", "content": f"{hard[i % 8]} {i}"}], "n": [[i], {"k": "]"}]} for i in range(count)
    ]


def small_units(monkeypatch, size, chunk=1 << 20):
    for module in (lines, elements, delimited, tables, archives, pictures):
        monkeypatch.setattr(module, "UNIT_BYTES", size)
    for module in (lines, elements):
        monkeypatch.setattr(module, "CHUNK", chunk)


def read_all(path, **settings):
    return [found for unit in find_units(path, **settings) for found in read_unit(unit)]


def write(path, count):
    """A file with ``count`` rows of some format; returns the rows as they must come back."""
    end = path.suffix
    if end == ".csv":
        table = [[str(i), f'"{i}",\nnext' if i % 3 else ""] for i in range(count)]
        write_csv(path, [["id", "text"], *table])
        return [{"id": number, "text": text or None} for number, text in table]
    if end == ".tar":
        write_tar(path, [member for i in range(count) for member in ((f"{i}.txt", f"t{i}"), (f"{i}.jpg", b"x" * i))])
        return [{"__key__": str(i), "txt": f"t{i}", "jpg": b"x" * i} for i in range(count)]
    found = rows(count)
    if end in (".parquet", ".arrow"):
        found = [{"text": row["messages"][0]["content"], "n": i} for i, row in enumerate(found)]
    write_rows(path, found)
    return found


@pytest.mark.parametrize("size", [1, 700, 1 << 26])
@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("end", ["json", "jsonl", "csv", "parquet", "arrow", "tar"])
def test_units_are_all_rows_once_and_in_order(tmp_path, monkeypatch, end, count, size):
    expected = write(tmp_path / f"a.{end}", count)
    small_units(monkeypatch, size, chunk=97)
    units = pickle.loads(pickle.dumps(find_units(tmp_path / f"a.{end}")))
    assert [unit.start for unit in units] == [sum(one.rows for one in units[:i]) for i in range(len(units))]
    assert len(units) == 1 if size > 1 << 20 else size > 1 or len(units) >= min(count, 2)
    found = [one for unit in units for one in read_unit(unit)]
    assert found == list(enumerate(expected))
    source = RawSource(tmp_path / f"a.{end}", lambda_name(monkeypatch))
    order = random.Random(0).sample(range(count), count)
    assert [source.row(index) for index in order] == [expected[index] for index in order]
    with pytest.raises(IndexError, match=f"index {count} is outside a source of {count} rows"):
        source.row(count)


def lambda_name(monkeypatch):
    """A layout that takes any row."""
    monkeypatch.setattr("nemo_bard.data.layouts.own.anything", lambda row: row, raising=False)
    return "nemo_bard.data.layouts.own.anything"


def test_byte_order_marks_line_ends_and_blank_lines(tmp_path):
    row = json.dumps({"a": "é"}, ensure_ascii=False).encode()
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + row + b"\r\n\r\n" + row + b"\r\n  \r\n\n")
    found = read_all(tmp_path / "a.jsonl")
    assert [found[0][1], found[2][1], len(found)] == [{"a": "é"}, {"a": "é"}, 3]
    assert (found[1][1].kind, str(found[1][1])) == ("bad_json", "the line is empty, a JSON object is needed")
    (tmp_path / "b.json").write_bytes(b"\xef\xbb\xbf\r\n[" + row + b",\r\n" + row + b"]\r\n")
    assert [one for _, one in read_all(tmp_path / "b.json")] == [{"a": "é"}] * 2
    (tmp_path / "c.csv").write_bytes(b"\xef\xbb\xbfimage,text\r\na.jpg,\xc3\xa9\r\n\r\nb.jpg,x\r\n\r\n")
    found = read_all(tmp_path / "c.csv")
    assert [found[0][1], found[2][1]] == [{"image": "a.jpg", "text": "é"}, {"image": "b.jpg", "text": "x"}]
    assert (len(found), found[1][1].kind) == (3, "unreadable_row")


@pytest.mark.parametrize(
    ("line", "kind", "reason"),
    [
        (b"{", "bad_json", "not JSON"),
        (b'{"a": 1, "a": 2}', "bad_json", "the key 'a' is given twice"),
        (b'{"a": "\xff"}', "not_utf8", "not UTF-8"),
        (b"[1]", "layout", "must be a JSON object, got \\[1\\]"),
        (b"null", "layout", "got None"),
        (b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "bad_json", "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "bad_json", "digits"),
        (b"\0\0\0", "bad_json", "not JSON"),
    ],
)
@pytest.mark.parametrize("end", ["jsonl", "json"])
def test_a_bad_row_leaves_its_neighbours(tmp_path, end, line, kind, reason):
    good = b'{"a": 1}'
    if end == "json" and line == b"{":
        line = b"{,}"
    text = b"\n".join([good, line, good]) if end == "jsonl" else b"[" + b", ".join([good, line, good]) + b"]"
    (tmp_path / f"a.{end}").write_bytes(text)
    found = read_all(tmp_path / f"a.{end}")
    assert [found[0], found[2]] == [(0, {"a": 1}), (2, {"a": 1})]
    error = found[1][1]
    assert isinstance(error, RejectedError)
    with pytest.raises(RejectedError, match=reason):
        raise error
    assert error.kind == kind


def test_lists_with_commas_too_many_or_too_few(tmp_path):
    def kinds(text):
        (tmp_path / "a.json").write_text(text)
        return [getattr(one, "kind", "row") for _, one in read_all(tmp_path / "a.json")]

    assert kinds('[{"a": 1}, , {"a": 2},]') == ["row", "bad_json", "row", "bad_json"]
    assert kinds('[{"a": 1} {"a": 2}, {"a": 3}]') == ["bad_json", "row"]
    assert kinds('[{"a": 1}, "x,y", 3, [1, 2]]') == ["row", "layout", "layout", "layout"]
    assert kinds('{\n "a": [1,\n 2]\n}') == ["row"]
    assert kinds('{"a": 1}\n{"a": 2}\n') == ["row", "row"]  # JSON lines under another name
    assert kinds('{"a": 1,}\n{"a": 2}\n') == ["bad_json", "row"]
    assert kinds('{"a": [\n{"b": 1}\n]}\n') == ["row"]


def damaged(folder, name):
    """A file that was cut off or spoiled."""
    end = name.rsplit(".", 1)[1]
    path = folder / name
    if end == "json":
        path.write_text('[{"a": 1}, {"a": 2')
    elif end == "csv":
        path.write_text('a,b\n1,2\n3,"4\n5,6\n')
    elif end == "tar":
        write_tar(path, [("a.jpg", b"x" * 5000), ("b.jpg", b"y" * 5000)])
    else:
        write(path, 40)
    if end in ("tar", "parquet", "arrow"):
        with path.open("r+b") as file:
            file.truncate(path.stat().st_size * 2 // 5)
    return path


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a.json", "the list does not end, the file is damaged or cut off; row 1 is the last one begun"),
        ("a.csv", "the quote that row 1 opens does not close"),
        ("a.tar", "a.tar"),
        ("a.parquet", "cannot be read as Parquet"),
        ("a.arrow", "cannot be read as Arrow"),
    ],
)
def test_files_that_are_cut_off_are_named(tmp_path, name, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        find_units(damaged(tmp_path, name))
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_archive_that_is_spoiled_in_the_middle_or_joined(tmp_path):
    write_tar(tmp_path / "a.tar", [("a.txt", "x"), ("b.txt", "y"), ("c.txt", "z")])
    data = (tmp_path / "a.tar").read_bytes()
    for text in (data[:1024] + b"?" * 512 + data[1536:], data + data):
        (tmp_path / "b.tar").write_bytes(text)
        with pytest.raises(ValueError, match=r"b.tar is damaged at byte \d+, or goes on behind the mark at its end"):
            find_units(tmp_path / "b.tar")
    (tmp_path / "b.tar").write_bytes(data[:2048])
    with pytest.raises(ValueError, match="no mark at its end"):
        find_units(tmp_path / "b.tar")


def test_members_out_of_place(tmp_path, monkeypatch):
    write_tar(tmp_path / "a.tar", [("a.txt", "1"), ("b.txt", "2"), ("a.jpg", b"3"), (".hidden", b"4"), ("note", b"5")])
    for size in (1 << 26, 1):
        small_units(monkeypatch, size)
        found = read_all(tmp_path / "a.tar")
        assert [one for _, one in found[:2]] == [{"__key__": "a", "txt": "1"}, {"__key__": "b", "txt": "2"}]
        assert (len(found), found[2][1].kind, "two places" in str(found[2][1])) == (3, "bad_member", True)


def test_links_in_archives_are_no_files(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, kind in (("a.txt", tarfile.REGTYPE), ("a.jpg", tarfile.LNKTYPE), ("b.txt", tarfile.REGTYPE)):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "b.txt"
            archive.addfile(info)
    found = read_all(tmp_path / "a.tar")
    assert [str(found[0][1]), found[0][1].kind] == ["a.jpg is no file, a link perhaps", "bad_member"]
    assert found[1:] == [(1, {"__key__": "b", "txt": ""})]


def test_long_names_in_archives(tmp_path, monkeypatch):
    names = [f"{'folder' * 30}/{i}/{'n' * 90}.txt" for i in range(5)]
    write_tar(tmp_path / "a.tar", [(name, name[:3]) for name in names])
    small_units(monkeypatch, 1)
    assert [one["__key__"] for _, one in read_all(tmp_path / "a.tar")] == [name[: -len(".txt")] for name in names]


def test_a_row_group_that_cannot_be_read(tmp_path):
    table = pa.Table.from_pylist([{"n": i, "text": f"{i}" * 4000} for i in range(12)])
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=4, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(1)
    with (tmp_path / "a.parquet").open("r+b") as file:
        file.seek(column.data_page_offset + 60)
        file.write(b"\xff" * (column.total_compressed_size - 70))
    found = read_all(tmp_path / "a.parquet")
    assert [number for number, _ in found] == list(range(12))
    bad = [number for number, one in found if isinstance(one, RejectedError)]
    assert bad == [4, 5, 6, 7]
    assert (found[4][1].kind, "row group 1 cannot be read" in str(found[4][1])) == ("unreadable_row", True)
    with pytest.raises(RejectedError, match="row group 1 cannot be read"):
        RawSource(tmp_path / "a.parquet", "nemo_bard.data.layouts.lay_out").row(5)


def test_saved_data_sets(tmp_path):
    """``save_to_disk``: what state.json names, in its order, and no caches; splits are folders."""
    first = datasets.Dataset.from_list([{"text": f"t{i}", "image": "a.jpg"} for i in range(5)])
    datasets.DatasetDict({"train": first, "test": first.select(range(2))}).save_to_disk(str(tmp_path / "set"))
    first.save_to_disk(str(tmp_path / "one"), num_shards=2)
    (tmp_path / "one" / "cache-123.arrow").write_bytes(b"stale")
    (tmp_path / "one" / "data-00007-of-00008.arrow").write_bytes(b"stale")
    assert [one["text"] for _, one in read_all(tmp_path / "one")] == [f"t{i}" for i in range(5)]
    assert [one["text"] for _, one in read_all(tmp_path / "set", split="test")] == ["t0", "t1"]
    with pytest.raises(ValueError, match="holds the splits test, train: set split to one, or to all"):
        find_units(tmp_path / "set")
    assert len(read_all(tmp_path / "set", split="all")) == 7
    (tmp_path / "one" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(ValueError, match="data-00001-of-00002.arrow is missing, state.json names it"):
        find_units(tmp_path / "one")


def test_arrow_files_of_both_formats(tmp_path):
    table = pa.Table.from_pylist([{"text": f"t{i}"} for i in range(5)])
    with pa.OSFile(str(tmp_path / "a.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    assert [one["text"] for _, one in read_all(tmp_path / "a.arrow")] == [f"t{i}" for i in range(5)]
    with pa.OSFile(str(tmp_path / "b.arrow"), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    data = (tmp_path / "b.arrow").read_bytes()
    (tmp_path / "b.arrow").write_bytes(data[:-8])  # as a process leaves it that is killed between two batches
    with pytest.raises(ValueError, match="b.arrow cannot be read as Arrow .the mark at its end is missing"):
        find_units(tmp_path / "b.arrow")


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00002.parquet", "train"),
        ("charts/train-00000-of-00002.parquet", "train"),
        ("data/sft-00000-of-00002.parquet", "sft"),
        ("val.jsonl", "validation"),
        ("my_dev_set.jsonl", "validation"),
        ("test/a.jsonl", "test"),
        ("testing-1.jsonl", "test"),
        ("latest.jsonl", None),
        ("trainings.jsonl", None),
        ("a.jsonl", None),
    ],
)
def test_splits_of_names(name, split):
    assert split_of(name) == split


def test_splits_of_a_folder(tmp_path):
    for name in ("charts/train-00000-of-00001", "charts/rl-00000-of-00001", "own/b", "own/a"):
        write_rows(tmp_path / f"{name}.parquet", [{"n": name}])
    read = [[one["n"] for _, one in read_all(tmp_path / "charts", split=split)] for split in ("rl", "train", "all")]
    assert read[:2] == [["charts/rl-00000-of-00001"], ["charts/train-00000-of-00001"]]
    assert len(read[2]) == 2
    assert [one["n"] for _, one in read_all(tmp_path / "own")] == ["own/a", "own/b"]  # sorted
    with pytest.raises(ValueError, match="split must be one of rl, train, all, got 'trian' .did you mean 'train'"):
        find_units(tmp_path / "charts", split="trian")
    with pytest.raises(ValueError, match="split 'train': .*a.parquet is a file"):
        find_units(tmp_path / "own/a.parquet", split="train")


def test_patterns_links_and_names_that_are_no_text(tmp_path):
    write_rows(tmp_path / "set/a.jsonl", [{"n": 0}])
    write_rows(tmp_path / "set/b.parquet", [{"n": 1}])
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/odd/\xff\xe9.jsonl")
    os.mkdir(os.path.dirname(odd))
    with open(odd, "w") as file:
        file.write('{"n": 2}\nx\n')
    os.symlink(tmp_path / "odd", tmp_path / "set/linked")
    os.symlink(tmp_path / "odd", tmp_path / "odd/loop")
    assert [one["n"] for _, one in read_all(tmp_path / "set/*.parquet")] == [1]
    with pytest.raises(
        ValueError, match=r"several kinds .2 .jsonl, 1 .parquet.: name one, or a pattern such as .*\*.jsonl"
    ):
        find_units(tmp_path / "set")
    found = read_all(tmp_path / "set" / "**" / "*.jsonl")
    assert [one["n"] for _, one in found[:1]] == [0]
    assert [one for _, one in read_all(tmp_path / "odd")][0] == {"n": 2}
    source = RawSource(tmp_path / "odd", "llava")
    assert source.where(1).encode().decode() == source.where(1)
    assert source.where(1).endswith(".jsonl:1")


def test_what_holds_no_data_is_named(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "run.py").write_text("x")
    with pytest.raises(ValueError, match="holds no data: found 1 .py, 1 .txt; wanted .jsonl, .*or images"):
        find_units(tmp_path)
    with pytest.raises(ValueError, match=r"notes.txt: the name of a data file must end in .jsonl"):
        find_units(tmp_path / "notes.txt")
    with pytest.raises(ValueError, match="none.jsonl does not exist"):
        find_units(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="no file is like"):
        find_units(tmp_path / "*.tar")
    for name in ("empty.jsonl", "empty.json", "empty.csv"):
        (tmp_path / name).write_text("" if name != "empty.json" else "[ ]")
        with pytest.raises(ValueError, match=f"{name} holds no row"):
            find_units(tmp_path / name)
    (tmp_path / "twice.csv").write_text("a,a\n1,2\n")
    with pytest.raises(ValueError, match="twice.csv: the column 'a' is there twice"):
        find_units(tmp_path / "twice.csv")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match="out is already prepared"):
        find_units(tmp_path / "out")


def test_a_wrong_path_is_no_hub_name(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="^data/none does not exist$"):
        find_units("data/none")


def test_hub_names_without_a_network(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ValueError, match="there is no path no-such-owner/no-such-set:one, and .*HF_HUB_OFFLINE is set"
    ) as caught:
        find_units("no-such-owner/no-such-set:one")
    assert "\n" not in str(caught.value)


def test_files_of_a_hub_name(tmp_path, monkeypatch):
    """The files of the configuration and split alone are fetched; the hub itself is a stand-in."""
    urls = {
        "train": ["charts/train-00000-of-00002.parquet", "charts/train-00001-of-00002.parquet"],
        "rl": ["rl.parquet"],
    }
    for number, name in enumerate(one for names in urls.values() for one in names):
        write_rows(tmp_path / name, [{"n": number}])
    fetched = []

    def load_dataset_builder(repository, config):
        assert (repository, config) == ("owner/set", "charts")
        return SimpleNamespace(config=SimpleNamespace(data_files=urls))

    def resolve_path(self, url):
        return SimpleNamespace(repo_id="owner/set", path_in_repo=url, revision="abc")

    def hf_hub_download(repository, name, *, repo_type, revision):
        assert (repository, repo_type, revision) == ("owner/set", "dataset", "abc")
        fetched.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr("datasets.load_dataset_builder", load_dataset_builder)
    monkeypatch.setattr("huggingface_hub.HfFileSystem.resolve_path", resolve_path)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    with pytest.raises(ValueError, match="owner/set:charts holds the splits train, rl: set split to one, or to all"):
        find_units("owner/set:charts")
    with pytest.raises(ValueError, match="owner/set:charts: split must be one of train, rl, all, got 'test'"):
        find_units("owner/set:charts", split="test")
    assert fetched == []
    assert [one["n"] for _, one in read_all("owner/set:charts", split="train")] == [0, 1]
    assert fetched == urls["train"]


def in_a_child(source, indices, queue):
    queue.put([source.row(index) for index in indices])


@pytest.mark.parametrize("end", ["jsonl", "parquet", "arrow", "tar"])
def test_forks_and_pickles_read_by_themselves(tmp_path, monkeypatch, end):
    expected = write(tmp_path / f"a.{end}", 60)
    source = RawSource(tmp_path / f"a.{end}", lambda_name(monkeypatch))
    source.row(0)
    context = multiprocessing.get_context("fork")
    queues = [context.SimpleQueue() for _ in range(2)]
    orders = [list(range(60)), list(range(59, -1, -1))]
    children = [context.Process(target=in_a_child, args=(source, *one)) for one in zip(orders, queues, strict=True)]
    for child in children:
        child.start()
    mine = [source.row(index) for index in orders[1]]
    for order, queue in zip([*orders, orders[1]], [*queues, None], strict=True):
        assert (mine if queue is None else queue.get()) == [expected[index] for index in order]
    for child in children:
        child.join()
    again = pickle.loads(pickle.dumps(source))
    assert again.row(59) == expected[59]


def test_memory_does_not_grow_with_the_file(tmp_path):
    row = json.dumps({"messages": [{"role": "user", "content": "x" * 30_000}]}) + "\n"
    for name, start, between, end in (("a.jsonl", "", "", ""), ("a.json", "[", ",", "]")):
        with (tmp_path / name).open("w") as file:
            file.write(start + between.join([row] * 1000) + end)
        tracemalloc.start()
        count = sum(1 for unit in find_units(tmp_path / name) for _ in read_unit(unit))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert (count, peak < 24e6) == (1000, True), peak


def test_a_file_that_is_gone_when_its_unit_is_read(tmp_path):
    for end in ("jsonl", "parquet", "csv", "arrow", "tar", "json"):
        write(tmp_path / f"a.{end}", 3)
        unit = find_units(tmp_path / f"a.{end}")[0]
        (tmp_path / f"a.{end}").unlink()
        with pytest.raises(ValueError, match=f"a.{end} is not there any more"):
            list(read_unit(unit))


def test_images_alone_and_images_beside_a_list(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.jpg").write_bytes(picture())
    assert [one for _, one in read_all(tmp_path)] == [
        {"id": "images/a.jpg", "file_name": "images/a.jpg", "image": str(tmp_path / "images/a.jpg"), "text": None}
    ]
    for folder in ("train2017", "val2017"):  # of images, which a list names, the splits do not matter
        (tmp_path / "images" / folder).mkdir()
        (tmp_path / "images" / folder / "b.jpg").write_bytes(picture())
    write_rows(tmp_path / "list.json", [{"image": "images/a.jpg"}])
    assert [one for _, one in read_all(tmp_path)] == [{"image": "images/a.jpg"}]


def test_splits_of_images(tmp_path):
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        (tmp_path / split / "a.jpg").write_bytes(picture())
        (tmp_path / split / "metadata.csv").write_text(f"file_name,text\na.jpg,{split}\n")
    with pytest.raises(ValueError, match="holds the splits test, train"):
        find_units(tmp_path)
    assert [one["text"] for _, one in read_all(tmp_path, split="test")] == ["test"]
    (tmp_path / "metadata.csv").write_text("file_name,text\ntrain/a.jpg,x\n")
    with pytest.raises(ValueError, match=r"metadata.csv describes images of all splits: put a table into the folder"):
        find_units(tmp_path, split="test")
    assert len(read_all(tmp_path, split="all")) == 3


@pytest.mark.parametrize("end", ["json", "jsonl", "csv", "parquet", "arrow", "tar"])
def test_spoiled_files_lose_no_row_in_silence(tmp_path, end):
    """Whatever is spoiled: one line for the file, or every row that it said it has, read or rejected."""
    chance = random.Random(3)
    path = tmp_path / f"a.{end}"
    write(path, 40)
    good = path.read_bytes()
    for trial in range(40):
        data = bytearray(good)
        if trial % 4 == 0:
            del data[chance.randrange(len(data)) :]
        for _ in range(chance.randint(1, 8) if data else 0):
            data[chance.randrange(len(data))] = chance.choice([*b'\0"\\{}[],\n\xff', chance.randrange(256)])
        path.write_bytes(data)
        units, refused = [], f"a.{end}"
        try:
            units = find_units(path)
        except ValueError as error:
            refused = str(error)
        assert f"a.{end}" in refused
        assert "\n" not in refused
        found = [one for unit in units for one in read_unit(unit)]
        assert [number for number, _ in found] == list(range(sum(unit.rows for unit in units)))
        assert not any("\n" in str(one) for _, one in found if isinstance(one, RejectedError))
