"""Readers by path, name, dotted name and section; what resuming compares."""

import sys
import types

import pytest

from nemo_bard.data.jsonl import JsonlDataset
from nemo_bard.data.readers import READERS, input_files, open_dataset
from nemo_bard.evaluation.evaluate import resolve_scorer

LINE = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


class Shapes:
    """Knows neither ``limit`` nor ``validate``."""

    def __init__(self, kind, count=5, *, sides=3):
        self.kind, self.count, self.sides = kind, count, sides

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"conversation": [{"role": "assistant", "content": f"{self.kind} {index}"}], "sample_index": index}

    def score(self, prediction, reference):
        return {"alike": 1.0}

    @staticmethod
    def input_files(kind="", **_):
        return [f"{kind}.bin"]


@pytest.fixture
def shapes(monkeypatch):
    module = types.ModuleType("my_shapes")
    module.Shapes, module.number = Shapes, lambda: 3
    monkeypatch.setitem(sys.modules, "my_shapes", module)
    READERS.register("shapes", Shapes)
    yield
    READERS.unregister("shapes")


@pytest.fixture
def file(tmp_path):
    (tmp_path / "d.jsonl").write_text(LINE * 3)
    return tmp_path / "d.jsonl"


@pytest.mark.parametrize(
    "spec",
    [
        "shapes:round,sides=4",
        "my_shapes.Shapes:round,sides=4",
        "shapes:kind=round,sides=4",
        {"_target_": "my_shapes.Shapes", "kind": "round", "sides": 4},
        {"_target_": Shapes, "kind": "round", "sides": 4},
    ],
)
def test_one_reader_under_all_its_names(shapes, spec):
    data = open_dataset(spec)
    assert (data.kind, data.sides, len(data)) == ("round", 4, 5)
    first = open_dataset(spec, limit=2)
    assert len(first) == 2
    assert first[1] == data[1]
    with pytest.raises(IndexError):
        first[2]
    assert resolve_scorer(None, first)("a", "b") == {"alike": 1.0}


def test_files(file):
    assert isinstance(open_dataset(str(file)), JsonlDataset)
    assert len(open_dataset(f"jsonl:{file}", limit=2)) == 2
    file.write_text(LINE + "{\n")
    with pytest.raises(ValueError, match="d.jsonl:2"):
        open_dataset(str(file))
    assert len(open_dataset(str(file), validate=False)) == 2


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("shape:round", r"one of jsonl, digits, rows, prepared, shapes.*did you mean shapes:round"),
        ("no_such_package.reader", "no_such_package.reader cannot be imported"),
        ("none.jsonl", "none.jsonl does not exist"),
        ("shapes:round,side=4", "unexpected keyword argument 'side'"),
        ("shapes", "missing a required argument: 'kind'"),
        ("", "data must be a text or a section"),
        ({"kind": "round"}, "data must have _target_"),
        ("my_shapes.number", "must return a sized, map-style data set"),
    ],
)
def test_what_is_no_data_set_is_named(shapes, spec, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(spec)


def test_a_reader_that_is_no_function_is_refused():
    with pytest.raises(ValueError, match="must be callable"):
        READERS.register("number", 3)


def test_what_resuming_compares(shapes, file, tmp_path):
    """JSONL as ever its ``path``; a reader's own list; of others every file that a key names, and no folder."""
    section = {"_target_": "nemo_bard.data.JsonlDataset", "path": str(file), "root_dir": str(tmp_path)}
    assert input_files(section) == {"path": file}
    assert input_files({"_target_": "nemo_bard.data.open_dataset", "spec": str(file)}) == {"path": file}
    assert {key: str(path) for key, path in input_files({"_target_": Shapes, "kind": "k"}).items()} == {"0": "k.bin"}
    assert input_files({"_target_": dict, "index": str(file), "images": str(tmp_path)}) == {"index": file}
    assert input_files({"_target_": "nemo_bard.data.make_digits", "split": "train"}) == {}
    assert input_files({}) == {}
