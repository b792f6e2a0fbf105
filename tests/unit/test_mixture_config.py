"""``data=mixture`` in chains and ``_target_`` in recipes: composed, checked before anything heavy, and opened."""

from __future__ import annotations

import json

import pytest
import yaml
from prepared_folder import sample, write_prepared

from nemo_bard.base.paths import recipes_dir
from nemo_bard.data.readers import open_dataset
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import make_job
from nemo_bard.train.config import validate_recipe
from nemo_bard.upstream.automodel import load_config

SOURCES = "data.sources={charts: {weight: 2}, docs: {weight: 1}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("mix") / "out"
    write_prepared(path, {name: [sample(f"{name}{i}") for i in range(5)] for name in ("charts", "docs")})
    return path


def chain(*words):
    return make_job(compose(read_words(recipes_dir() / "bard_b32.yaml", ["data=mixture", *words])))


def test_a_chain_takes_a_mixture(folder):
    job = chain(f"data.path={folder}", "data.samples=1024000", SOURCES, "data.seed=3", f"data.evaluation={folder}")
    for name in ("pbm_b4", "swd_b32"):
        recipe = job.stage(name).recipe
        assert recipe["dataset"] == {
            "_target_": "nemo_bard.data.MixtureDataset",
            "path": str(folder),
            "sources": {"charts": {"weight": 2}, "docs": {"weight": 1}},
            "samples": 1024000,
            "seed": 3,
        }
        assert "validation_dataset" not in recipe
        assert "validation_dataloader" not in recipe
        assert recipe["dataloader"]["collate_fn"]["max_length"] == 8192
    assert job.evaluation.data == str(folder)
    assert job.stage("pbm_b4").reads() == {"dataset": folder / "manifest.json"}


def test_validation_data_may_have_any_layout(folder, tmp_path):
    rows = tmp_path / "rows.json"
    rows.write_text(
        '[{"id": "a", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}]'
    )
    for path, size in ((folder, 10), (rows, 1)):
        recipe = chain(f"data.path={folder}", f"data.validation_path={path}").stage("pbm_b4").recipe
        section = recipe["validation_dataset"]
        assert section == {"_target_": "nemo_bard.data.open_dataset", "spec": str(path)}
        assert len(open_dataset(section)) == size
        assert recipe["validation_dataloader"]["collate_fn"]["max_length"] == 8192


def test_a_recipe_names_a_mixture(folder, tmp_path):
    recipe = yaml.safe_load((recipes_dir() / "pbm.yaml").read_text())
    recipe["dataset"] = {
        "_target_": "nemo_bard.data.MixtureDataset",
        "path": str(folder),
        "samples": 30,
        "sources": {"charts": {"weight": 2}, "docs": {"weight": 1}},
    }
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(recipe))
    dataset = load_config(str(tmp_path / "mine.yaml"), []).dataset.instantiate()
    assert dataset.draws_per_source() == {"charts": 20, "docs": 10}


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ({"path": "nowhere"}, "dataset.path: nowhere does not exist"),
        ({"sources": {"chart": {}}}, "dataset: sources: {} has no source chart; did you mean charts?"),
        ({"sources": {"charts": {"weight": 0}}}, "dataset: sources.charts.weight must be a finite number > 0, got 0"),
        ({"samples": 11}, "dataset: samples must be at most 10, which is what the repetitions give"),
        ({"smaples": 11}, "unknown recipe key dataset.smaples; did you mean dataset.samples?"),
    ],
)
def test_a_recipe_is_checked_before_anything_is_built(folder, tmp_path, monkeypatch, change, line):
    monkeypatch.setattr("nemo_bard.data.mixture.dataset.blend", lambda *_: pytest.fail("the draws were planned"))
    recipe = yaml.safe_load((recipes_dir() / "pbm.yaml").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bard_vl"}))
    recipe["model"]["pretrained_model_name_or_path"] = str(tmp_path)
    recipe["dataset"] = {"_target_": "nemo_bard.data.MixtureDataset", "path": str(folder), **change}
    with pytest.raises(ValueError, match=".") as error:
        validate_recipe(recipe)
    assert str(error.value).startswith(line.format(folder))
    assert "\n" not in str(error.value)
