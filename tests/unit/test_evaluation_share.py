"""Evaluation by many processes: as many as the samples deserve, each sample once, the same scores."""

from __future__ import annotations

import dataclasses
import gc
from pathlib import Path
from types import SimpleNamespace

import pytest

from nemo_bard.evaluation import evaluate, responder
from nemo_bard.pipeline import evaluation
from nemo_bard.pipeline.evaluation import evaluate_stage, merge, sharing
from nemo_bard.pipeline.schema import EvaluationSettings


@pytest.mark.parametrize(
    ("total", "processes", "least", "answering"),
    [(128, 64, 8, 16), (128, 8, 8, 8), (130, 64, 8, 16), (5, 64, 8, 1), (1, 1, 8, 1), (128, 64, 1, 64), (3, 8, 1, 3)],
)
def test_processes_that_answer(total, processes, least, answering):
    assert sharing(total, processes, least) == answering


class Rank:
    """One of several processes that are played one after the other: the last one has what the others said."""

    stop = SimpleNamespace(received=False)

    def __init__(self, rank, said):
        self.rank, self.size, self.said = rank, 64, said

    is_main = property(lambda self: self.rank == self.size - 1)

    def on_main(self, function):
        return function()

    def gather(self, value):
        self.said.append(value)
        return self.said

    def should_stop(self):
        return False

    def barrier(self):
        pass


@pytest.fixture(autouse=True)
def _fast():
    """Every process collects garbage; what is imported once need not be looked through."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def scored(monkeypatch, tmp_path):
    """Scores samples with a model that knows nothing, in 64 processes: ``scored(samples_per_process)``."""
    loaded = []

    def answered(model, processor, share, **_):
        samples = [share[index] for index in range(len(share))]
        results = [
            {"sample_index": one["sample_index"], "scores": {"hit": one["sample_index"] % 3}, "commit_forwards": 1}
            for one in samples
        ]
        sums = {"num_tokens": len(samples), "denoising_forwards": len(samples), "forwards": 1, "seconds": 1.0}
        return Result(samples=results, scores={"hit": 0.0}, **sums)

    def load(*_, **__):
        loaded.append(1)
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=1)), None

    def opened(_, *, validate):
        assert not validate, "all samples were checked when the run began"
        return [{"sample_index": index} for index in range(200)]

    monkeypatch.setattr(responder, "load_checkpoint", load)
    monkeypatch.setattr(evaluation, "open_samples", opened)
    monkeypatch.setattr(evaluation, "decoding", lambda *_: None)
    monkeypatch.setattr(evaluate, "evaluate", answered)
    monkeypatch.setattr(evaluation, "read_model_type", lambda _: "qwen3_vl")
    monkeypatch.setattr(evaluation.manifest, "digest", str)

    def run(samples_per_process):
        loaded.clear()
        settings = EvaluationSettings(data="test.jsonl", samples_per_process=samples_per_process)
        job = SimpleNamespace(evaluation=settings, run_dir=tmp_path)
        said: list = []
        for rank in range(64):
            folder = tmp_path / f"{samples_per_process}-{rank}"
            stage = SimpleNamespace(name="a", folder=folder, settings=SimpleNamespace(generation={}))
            result = evaluate_stage(stage, job, Rank(rank, said), Path("export"), "content", last=False)
        return result, len(loaded)

    return run


@dataclasses.dataclass
class Result:
    samples: list
    scores: dict
    num_tokens: int
    denoising_forwards: int
    forwards: int
    seconds: float


def test_scores_do_not_depend_on_how_many_answer(scored):
    few, loaded = scored(8)
    assert loaded == 16
    all_of_them, loaded = scored(1)
    assert loaded == 64
    assert [sample["sample_index"] for sample in few["samples"]] == list(range(128))
    for key in ("samples", "scores", "num_samples", "tpf", "request"):
        assert few[key] == all_of_them[key], key


def test_nothing_is_merged_from_nobody():
    assert merge([]) == {}
