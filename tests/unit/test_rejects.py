"""``on_bad_sample``: what it may say, how many samples may be bad, the list, and bad samples in a collated batch."""

from __future__ import annotations

import json

import pytest
import test_encode

from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.rejects import BadSample, GuardedDataset, RejectsFile, check_on_bad_sample, describe

tiny = test_encode.tiny


def turns(answer="yes"):
    return [{"role": "user", "content": "hi"}, {"role": "assistant", "content": answer}]


class Data(list):
    def __getitem__(self, index):
        item = super().__getitem__(index)
        if isinstance(item, Exception):
            raise item
        return {"conversation": item, "sample_index": 100 + index}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("dorp", r"on_bad_sample must be one of error, drop, got 'dorp' \(did you mean 'drop'\?\)"),
        (True, "on_bad_sample must be error, drop or a section"),
        ({"action": "drop", "max_ration": 0.1}, r"on_bad_sample\.max_ration; did you mean on_bad_sample\.max_ratio"),
        ({"action": "drop", "max_ratio": 0}, r"on_bad_sample\.max_ratio must be in \(0, 1\]"),
        ({"action": "drop", "max_samples": -1}, r"on_bad_sample\.max_samples must be an integer >= 0"),
        ({"max_samples": 3}, r"on_bad_sample\.max_samples=3 needs on_bad_sample\.action: drop"),
    ],
)
def test_wrong_values_are_named(value, message):
    with pytest.raises(ValueError, match=message):
        check_on_bad_sample(value)


def test_what_is_allowed():
    assert [check_on_bad_sample(value).drops for value in (None, "error", "drop", {"action": "drop"})] == [0, 0, 1, 1]
    free = check_on_bad_sample("drop")
    assert [free.most(total) for total in (1, 8, 20, 100, 5000)] == [0, 4, 10, 10, 50]
    given = check_on_bad_sample({"action": "drop", "max_samples": 3, "max_ratio": 0.1})
    assert [given.most(total) for total in (9, 20, 5000)] == [0, 2, 3]


def test_a_bad_item_is_a_value_and_a_mistake_in_a_program_is_not():
    data = GuardedDataset(Data([turns(), ValueError("line 2:\nbad"), OSError("gone"), KeyError("x")]))
    assert data[0]["index"] == 0
    assert data[1] == BadSample(index=1, reason="line 2: bad", sample_index=1)
    assert data[2].reason == "gone"
    with pytest.raises(KeyError):
        data[3]
    assert describe(data.dataset, data[1]) == {
        "source": "Data", "id": None, "sample_index": 1, "reason": "line 2: bad"
    }  # fmt: skip


def test_the_collator_leaves_bad_samples_out_and_names_them(tiny):
    """One that cannot be read, one that cannot be laid out, alone in their rows and beside a good one."""
    make = BlockDiffusionCollator(tiny.processor, tiny.config)
    data = GuardedDataset(Data([turns(), ValueError("cut"), turns("")]))
    with pytest.raises(ValueError, match="sample 102: assistant turn 0 is empty"):
        make([data[2]])
    make.keep_bad = True
    batch = make([[data[0], data[1]], data[2], data[1]])
    assert (batch["num_samples"], batch["slots"], batch["num_dropped"]) == (1, [0], 0)
    assert [(bad.slot, bad.index, bad.sample_index) for bad in batch["rejects"]] == [(0, 1, 1), (1, 2, 102), (2, 1, 1)]
    nothing = make([data[1]])
    assert nothing.keys() == batch.keys()
    assert nothing["num_samples"] == 0


def test_the_list_holds_a_sample_once_per_epoch_and_survives_a_cut(tmp_path):
    path = tmp_path / "run" / "rejects.jsonl"
    one = {"split": "train", "epoch": 0, "sample_index": 3, "reason": "cut"}
    again = {**one, "epoch": 1}
    listed = RejectsFile(path)
    assert listed.add([one, one], write=True) == [one]
    assert listed.add([one, again], write=True) == [again]
    assert listed.samples("train") == 1
    path.write_text(path.read_text() + '{"split": "tr')
    assert RejectsFile(path).records == [one, again]
    assert [json.loads(line) for line in path.read_text().splitlines()] == [one, again]
    silent = RejectsFile(path, [one])
    silent.add([again], write=False)
    assert len(path.read_text().splitlines()) == 2
