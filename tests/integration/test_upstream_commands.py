"""Recipes of ours through AutoModel's own command line, and its launcher's and torchrun's spellings of it."""

import os
import subprocess
import sys

import pytest
import torch
import yaml
from test_pbm import TRAIN, read_log, write_data

from nemo_bard.base.paths import recipes_dir
from nemo_bard.checkpoints.convert import convert
from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("commands")
    convert(make_tiny_qwen3_vl(folder / "source"), folder / "start", block_size=4)
    write_data(folder / "data", 6)
    return folder


@pytest.fixture
def automodel(monkeypatch, capsys):
    """AutoModel's ``main`` in this process, as its script calls it: exit code and what is on stderr."""
    from nemo_bard.cli import startup

    for name in (startup.UPSTREAM_CLI, startup.UPSTREAM_LAUNCHER):
        sys.modules.pop(name, None)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    startup.install()
    environment = dict(os.environ)

    def call(*words):
        from nemo_automodel.cli.app import main

        monkeypatch.setattr(sys, "argv", ["automodel", *map(str, words)])
        capsys.readouterr()
        try:
            code = main()
        except SystemExit as stop:
            code = stop.code
        return code, capsys.readouterr().err

    yield call
    for name in (startup.UPSTREAM_CLI, startup.UPSTREAM_LAUNCHER):
        sys.modules.pop(name, None)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


def words(place, name, **changes):
    """Overrides in the two spellings that AutoModel knows."""
    settings = {
        **TRAIN,
        "step_scheduler.max_steps": 2,
        "model.pretrained_model_name_or_path": place / "start",
        "dataset.path": place / "data" / "train.jsonl",
        "checkpoint.checkpoint_dir": place / name,
        **changes,
    }
    spelt = []
    for number, (key, value) in enumerate(settings.items()):
        spelt += [f"--{key}={value}"] if number % 2 else [f"--{key}", value]
    return spelt


def test_automodel_runs_our_recipe_on_a_cpu(automodel, place):
    code, error = automodel(recipes_dir() / "pbm.yaml", *words(place, "one"), "--nproc-per-node", 1)
    assert code == 0, error
    assert [line["step"] for line in read_log(place / "one")] == [0, 1]
    assert (place / "one" / "LATEST" / "model" / "consolidated" / "config.json").is_file()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"noise.low": 3}, "noise.low must be in (0, 1], got 3"),
        ({"dataset.pth": "x"}, "unknown recipe key dataset.pth; did you mean dataset.path?"),
    ],
)
def test_wrong_input_is_one_line_and_exit_code_2(automodel, place, changes, said):
    code, error = automodel(recipes_dir() / "pbm.yaml", *words(place, "wrong", **changes))
    assert code == 2
    assert f"error: {said}" in error
    assert "Traceback" not in error


def test_a_chain_is_composed_from_words_as_typed(automodel, place, capsys):
    code, error = automodel(recipes_dir() / "bard_tiny.yaml", f"run_dir={place / 'chain'}", "--cfg", "overrides.seed=7")
    assert code == 0, error
    assert not (place / "chain").exists()
    code, error = automodel(recipes_dir() / "bard_tiny.yaml", "stage.pbm_b5.max_steps=3")
    assert code == 2
    assert "pbm_b5" in error


def test_automodels_own_recipe_with_a_piece_of_ours_that_means_nothing_there(automodel, place):
    file = place / "beside.yaml"
    raw = {
        "recipe": "FinetuneRecipeForVLM",
        "dataset": {"_target_": "nemo_bard.data.JsonlDataset", "path": "x"},
        "noise": {"name": "mask"},
    }
    file.write_text(yaml.safe_dump(raw))
    code, error = automodel(file)
    assert code == 2
    assert "error: noise is not read by FinetuneRecipeForVLM; remove it, or use recipe: " in error


def test_torchrun_and_automodels_module_on_two_ranks(place):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["-m", "nemo_automodel.cli.app", recipes_dir() / "pbm.yaml", *words(place, "two")]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (read_log(place / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


def test_automodels_own_recipe_reads_our_data_set(place, capfd):
    """Through ``finetune``, which lets it run without a GPU."""
    from nemo_bard.cli.app import main

    raw = yaml.safe_load((recipes_dir() / "digits_source.yaml").read_text())
    raw["model"]["pretrained_model_name_or_path"] = str(place / "source")
    raw["dataset"] = {"_target_": "nemo_bard.data.JsonlDataset", "path": str(place / "data" / "train.jsonl")}
    raw["step_scheduler"] |= {"max_steps": 2, "global_batch_size": 2, "local_batch_size": 1}
    raw["lr_scheduler"]["lr_warmup_steps"] = 1
    raw["checkpoint"] |= {"checkpoint_dir": str(place / "upstream"), "enabled": False}
    for key in ("validation_dataset", "validation_dataloader"):
        del raw[key]
    file = place / "upstream.yaml"
    file.write_text(yaml.safe_dump(raw))
    environment = dict(os.environ)
    try:
        assert main(["finetune", "--config", str(file)]) == 0, capfd.readouterr().err[-2000:]
    finally:
        os.environ.clear()
        os.environ.update(environment)
    log = read_log(place / "upstream")
    assert [line["step"] for line in log] == [0, 1]
    assert all(line["loss"] > 0 for line in log)
