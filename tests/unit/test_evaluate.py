"""Scorers, aggregates and data set names; the models are stand-ins that answer from a table."""

import random
import types

import pytest
import torch

from nemo_bard.data.digits import make_digits
from nemo_bard.data.readers import open_dataset
from nemo_bard.evaluation import evaluate as ev
from nemo_bard.evaluation.responder import Answer, AnswerBatch


def brute_force_distance(a, b):
    if not a or not b:
        return max(len(a), len(b))
    return min(
        brute_force_distance(a[1:], b) + 1,
        brute_force_distance(a, b[1:]) + 1,
        brute_force_distance(a[1:], b[1:]) + (a[0] != b[0]),
    )


def test_edit_distance_equals_its_definition():
    generator = random.Random(0)
    for _ in range(60):
        a, b = ("".join(generator.choices("ab\u00e9\U0001f600", k=generator.randint(0, 5))) for _ in range(2))
        assert ev.edit_distance(a, b) == brute_force_distance(a, b), (a, b)


def test_accuracy_counts_missing_and_surplus_characters():
    assert ev.accuracy("1 2 3", "1 2 3\n")["accuracy"] == 1.0
    assert ev.accuracy("", "")["accuracy"] == 1.0
    assert ev.accuracy("", "abcd")["accuracy"] == 0.0
    assert ev.accuracy("abXd", "abcd")["accuracy"] == 0.75
    assert ev.accuracy("abcdabcd", "abcd")["accuracy"] == 0.5


def half(prediction, reference):
    return 0.5


def broken(prediction, reference):
    return {"value": float("nan")}


def test_resolve_scorer():
    assert set(ev.resolve_scorer(None, make_digits("test", 1))("1 2", "1 3")) == {"exact_match", "digit_accuracy"}
    assert set(ev.resolve_scorer(None, [])("1 2", "1 3")) == {"exact_match", "accuracy"}
    assert ev.resolve_scorer("accuracy,exact_match")("a", "a") == {"accuracy": 1.0, "exact_match": 1.0}
    assert ev.resolve_scorer(half)("a", "b") == {"half": 0.5}
    assert ev.resolve_scorer("nemo_bard.data.digits.score")("1", "1")["digit_accuracy"] == 1.0
    own = types.SimpleNamespace(score=lambda prediction, reference: {"own": 1})
    assert ev.resolve_scorer(None, own)("a", "b") == {"own": 1.0}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("exact", "got 'exact'"),
        ("nemo_bard.data.digits.nothing", "nemo_bard.data.digits.nothing"),
        ("no_such_package.score", "no_such_package"),
        ("nemo_bard.data.digits.SPLITS", "not a function"),
    ],
)
def test_unknown_scorer_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        ev.resolve_scorer(name)


def test_scores_must_be_finite():
    with pytest.raises(ValueError, match=r"broken.*value=nan"):
        ev.resolve_scorer(broken)("a", "b")


class Data:
    """``count`` questions whose answer is their number."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        turns = [
            {"role": "user", "content": "first"},
            {"role": "assistant", "content": "no reference"},
            {"role": "user", "content": [{"type": "image", "image": None}, {"type": "text", "text": str(index)}]},
            {"role": "assistant", "content": [{"type": "text", "text": str(index)}]},
        ]
        return {"conversation": turns, "sample_index": 100 + index}


class Table:
    """A responder: sample i is right if i is even, and takes i + 1 tokens in 2 denoising and 1 commit forwards."""

    max_new_tokens = 9

    def __init__(self):
        self.batches = []

    def answer(self, conversations):
        numbers = [int(turns[-1]["content"][-1]["text"]) for turns in conversations]
        assert all(turns[-1]["role"] == "user" for turns in conversations)
        self.batches.append(numbers)
        answers = [
            Answer(text=str(n) if n % 2 == 0 else "?", num_tokens=n + 1, denoising_forwards=2, commit_forwards=1)
            for n in numbers
        ]
        return AnswerBatch(answers=answers, forwards=3, seconds=0.5)


@pytest.fixture
def table(monkeypatch):
    responder = Table()
    monkeypatch.setattr(ev, "make_responder", lambda *_: responder)
    return responder


MODEL = torch.nn.Linear(1, 1)
MODEL.config = types.SimpleNamespace(model_type="test")


def test_evaluate_aggregates(table):
    result = ev.evaluate(MODEL, None, Data(9), batch_size=2, limit=5, progress=False)
    assert table.batches == [[0, 1], [2, 3], [4]]
    assert result.scores == {"exact_match": 0.6, "accuracy": 0.6}
    assert result.metric == "exact_match"
    assert result.score == 0.6
    assert (result.num_samples, result.num_tokens, result.forwards, result.denoising_forwards) == (5, 15, 9, 10)
    assert result.tpf == 1.5
    assert result.tpf_with_commits == 1.0
    assert result.seconds == 1.5
    assert result.tokens_per_second == 10.0
    sample = result.samples[3]
    assert (sample.sample_index, sample.answer, sample.reference, sample.tpf) == (103, "?", "3", 2.0)
    assert sample.prompt == "user: first\nassistant: no reference\nuser: <image>3"
    assert result.settings["generation"] == {"max_new_tokens": 9}


def test_warm_up_is_not_counted(table):
    result = ev.evaluate(MODEL, None, Data(3), batch_size=2, progress=False, warm_up=True)
    assert table.batches == [[0, 1], [0, 1], [2]]
    assert (result.seconds, result.forwards, result.num_samples) == (1.0, 6, 3)


def test_result_is_written_whole(table, tmp_path):
    import json

    result = ev.evaluate(MODEL, None, Data(3), progress=False)
    result.save(tmp_path / "r.json")
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["scores"] == result.scores
    assert [s["sample_index"] for s in found["samples"]] == [100, 101, 102]
    assert "samples" not in result.summary()


@pytest.mark.parametrize("arguments", [{"batch_size": 0}, {"limit": 0}, {"limit": True}, {"batch_size": None}])
def test_wrong_numbers_are_refused(table, arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        ev.evaluate(MODEL, None, Data(3), progress=False, **arguments)


def test_empty_data_is_refused(table):
    with pytest.raises(ValueError, match="empty"):
        ev.evaluate(MODEL, None, Data(0), progress=False)


def test_scorer_must_be_consistent(table):
    def moody(prediction, reference):
        return {reference: 1.0}

    with pytest.raises(ValueError, match="sample 101"):
        ev.evaluate(MODEL, None, Data(2), progress=False, scorer=moody)


def test_open_dataset(tmp_path):
    data = open_dataset("digits:test,rows=1,columns=2,seed=3", limit=4)
    assert (len(data), data.seed, data.split, data.config.rows, data.config.columns) == (4, 3, "test", 1, 2)
    assert len(open_dataset("digits:validation")) == 256
    line = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'
    (tmp_path / "d.jsonl").write_text(line * 3)
    assert len(open_dataset(str(tmp_path / "d.jsonl"), limit=2)) == 2
    (tmp_path / "bad.jsonl").write_text(line + "{\n")
    with pytest.raises(ValueError, match="bad.jsonl:2"):
        open_dataset(str(tmp_path / "bad.jsonl"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("digits:tst", "tst"),
        ("digits:test,row=2", "row"),
        ("digits:test,rows", "'rows' is not key=value"),
        ("digit:test", "digit:test"),
        ("nothing.jsonl", "nothing.jsonl does not exist"),
    ],
)
def test_unknown_data_is_named(name, message):
    with pytest.raises(ValueError, match=message):
        open_dataset(name)
