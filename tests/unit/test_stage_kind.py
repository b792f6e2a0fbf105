"""A stage kind of a package that is not ours: one file and one entry point, in a chain that runs, resumes and skips it."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from torch import tensor

from nemo_bard.pipeline import Pipeline, Stage
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import STAGE_KINDS, make_job
from nemo_bard.pipeline.run import job_as_yaml

PACKAGE = '''
"""A package of somebody else's."""

import shutil
from dataclasses import dataclass
from typing import ClassVar

from safetensors.torch import load_file, save_file

from nemo_bard.base.settings import integer, number, setting
from nemo_bard.pipeline import FollowingSettings, Stage, StageSettings


@dataclass(frozen=True, kw_only=True)
class ScaleSettings(FollowingSettings):
    factor: float = setting(2.0, number(), "what every weight is multiplied with")
    times: int = setting(1, integer(), "how often")


@dataclass(frozen=True, kw_only=True)
class ScaleStage(Stage):
    Settings: ClassVar[type[StageSettings]] = ScaleSettings

    def check(self, job):
        if self.settings.factor == 0:
            raise ValueError(f"stage.{self.name}.factor must not be 0")

    def write(self, folder, job):
        source = job.input_path(self.inputs["init"])
        shutil.copyfile(source / "config.json", folder / "config.json")
        weights = load_file(source / "model.safetensors")
        if (source.parent / "killed").exists():
            raise KeyboardInterrupt
        for _ in range(self.settings.times):
            weights = {name: weight * self.settings.factor for name, weight in weights.items()}
        save_file(weights, folder / "model.safetensors")
'''


@pytest.fixture
def installed(tmp_path, monkeypatch, install_package):
    """The package as pip would install it: a module and the entry points of its metadata."""
    declared = "[nemo_bard.stages]\nscale = scaling:ScaleStage\n"
    site = install_package(tmp_path / "site", "scaling", {"scaling": PACKAGE}, declared)
    monkeypatch.syspath_prepend(site)
    monkeypatch.setattr(STAGE_KINDS, "_scanned", False)
    monkeypatch.setattr(STAGE_KINDS, "_things", dict(STAGE_KINDS._things))
    yield site
    sys.modules.pop("scaling", None)


@pytest.fixture
def chain(tmp_path, monkeypatch):
    """A start, a stage of the new kind from a file of the user's, and one that follows it."""
    work = tmp_path / "work"
    (work / "start").mkdir(parents=True)
    (work / "start" / "config.json").write_text('{"model_type": "bard_vl", "block_size": 4}')
    save_file({"weight": tensor([1.0])}, work / "start" / "model.safetensors")
    (work / "conf" / "stage").mkdir(parents=True)
    (work / "conf" / "pipeline").mkdir()
    (work / "conf" / "stage" / "scale.yaml").write_text("kind: scale\nfactor: 3\nevaluate: false\n")
    pipeline = {
        "defaults": [
            {"/stage@stage.first": "scale"},
            {"/stage@stage.second": "scale"},
            {"override /model": "tiny"},
            {"override /data": "digits"},
        ],
        "name": "scaled",
        "order": ["first", "second"],
        "stage": {"first": {"init": "start"}, "second": {"times": 2}},
    }
    (work / "conf" / "pipeline" / "scaled.yaml").write_text("# @package _global_\n" + yaml.safe_dump(pipeline))
    (work / "chain.yaml").write_text("recipe: nemo_bard.pipeline.Pipeline\npipeline: scaled\n")
    monkeypatch.chdir(work)
    monkeypatch.setattr("nemo_bard.pipeline.run.write_report", lambda run_dir: run_dir / "report.html")
    return work


def job_of(*words):
    return make_job(compose(read_words(Path("chain.yaml"), list(words))))


def run(*words):
    pipeline = Pipeline.from_overrides(Path("chain.yaml"), list(words))
    try:
        pipeline.setup()
        return pipeline.run_train_validation_loop()
    finally:
        pipeline._held.close()
        pipeline.world.stop.release()


def weight(stage):
    return float(load_file(Path("runs/scaled") / stage / "export" / "model.safetensors")["weight"])


def test_it_runs_resumes_and_is_skipped(installed, chain, capsys):
    (chain / "runs" / "scaled" / "first").mkdir(parents=True)
    (chain / "runs" / "scaled" / "pipeline.json").write_text('{"pipeline": "scaled", "stages": ["first", "second"]}')
    (chain / "runs" / "scaled" / "first" / "killed").touch()
    with pytest.raises(KeyboardInterrupt):
        run()
    assert weight("first") == 3.0
    assert not Path("runs/scaled/second/export").exists(), "an export is whole or not there"
    Path("runs/scaled/first/killed").unlink()
    capsys.readouterr()
    assert run() == 0
    assert "[1/2] first: finished before\n[2/2] second: scale, from first\n" in capsys.readouterr().out
    assert weight("second") == 27.0
    record = json.loads(Path("runs/scaled/second/manifest.json").read_text())
    assert record["config"] == {"kind": "scale", "factor": 3.0, "times": 2, "named": {}}
    assert run() == 0
    assert "[2/2] second: finished before" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"stage second was finished with times=2, now it is 3; use another run_dir"):
        run("stage.second.times=3")


def test_a_setting_that_came_later_is_as_if_it_had_been_there(installed, chain):
    assert run() == 0
    file = Path("runs/scaled/first/manifest.json")
    record = json.loads(file.read_text())
    assert record["config"].pop("times") == 1
    file.write_text(json.dumps(record))
    assert run() == 0
    with pytest.raises(ValueError, match="stage first was finished with times=1, now it is 2"):
        run("stage.first.times=2")


def test_its_settings_are_typed_checked_and_shown(installed, chain):
    first = job_of("stage.first.factor=0.5").stage("first")
    assert (first.settings.factor, first.settings.times, first.inputs) == (0.5, 1, {"init": "start"})
    assert yaml.safe_load(job_as_yaml(job_of()).split("---\n")[1])["factor"] == 3
    for word, line in (
        (
            "stage.first.tiems=2",
            "unknown key stage.first.tiems in 'stage.first.tiems=2'; did you mean stage.first.times?",
        ),
        ("stage.first.times=often", "stage.first.times must be an integer >= 1, got 'often'"),
        ("stage.first.times=0", "stage.first.times must be an integer >= 1, got 0"),
        ("stage.first.kind=scael", "must be one of recipe, convert, tiny, scale, got 'scael' (did you mean 'scale'?)"),
    ):
        with pytest.raises(ValueError, match=".") as error:
            job_of(word)
        assert line in str(error.value)
    with pytest.raises(ValueError, match="stage.first.factor must not be 0"):
        run("stage.first.factor=0")
    with pytest.raises(ValueError, match=r"stage.first.init=gone is neither an earlier stage nor a folder"):
        run("stage.first.init=gone")


def test_a_dotted_name_needs_no_entry_point(installed, chain):
    (installed / "scaling-1.0.dist-info" / "entry_points.txt").unlink()
    (chain / "conf" / "stage" / "scale.yaml").write_text("kind: scaling.ScaleStage\nfactor: 3\nevaluate: false\n")
    assert run() == 0
    assert weight("second") == 27.0
    with pytest.raises(ValueError, match=r"stage kind: json.JSONDecoder must be a class derived from"):
        job_of("stage.first.kind=json.JSONDecoder")
    with pytest.raises(ValueError, match=r"scaling.Gone cannot be imported"):
        job_of("stage.first.kind=scaling.Gone")


def test_a_kind_without_work_says_so(tmp_path):
    stage = Stage(name="x", kind="empty", folder=tmp_path, settings=None)
    with pytest.raises(NotImplementedError, match="Stage has neither write nor run"):
        stage.write(tmp_path, None)
