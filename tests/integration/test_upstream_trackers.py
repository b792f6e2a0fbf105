"""W&B offline and MLflow with a store of files, as they are: what reaches them, going on in the same run, and failures."""

import importlib.util
import json
import os
import shutil
import struct
import sys

import pytest
import torch
from test_upstream import Lab, losses

from nemo_bard.train.trackers import check_trackers

pytestmark = pytest.mark.slow

ALWAYS = {"loss", "grad_norm", "lr", "mem", "tps", "tps_per_gpu", "num_samples", "num_loss_tokens", "fill"}
ALWAYS |= {"tflops_per_gpu", "step", "epoch", "diffusion_loss", "ar_loss", "noise_phase", "noise_low", "noise_high"}
VALIDATION = {"val_loss", "val_loss_t0.5", "val_loss_t1", "val_num_samples"}
SCHEDULE = {"low": 0.1, "schedule": [{"until": 0.5, "high": 0.5}, {"high": 1.0}]}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    environment = dict(os.environ)
    yield Lab(tmp_path_factory.mktemp("trackers"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def quiet_wandb(monkeypatch):
    wandb = pytest.importorskip("wandb", reason="pip install 'nemo-bard[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_X_DISABLE_STATS", "true")
    monkeypatch.delenv("WANDB_RUN_ID", raising=False)
    yield wandb
    wandb.teardown()


@pytest.fixture
def mlflow():
    module = pytest.importorskip("mlflow", reason="pip install 'nemo-bard[mlflow]'")
    yield module
    if module.active_run() is not None:
        module.end_run()


def rich(lab):
    """What gives every kind of metric."""
    return {
        "checkpoint.enabled": True,
        "checkpoint.save_consolidated": False,
        "step_scheduler.ckpt_every_steps": 2,
        "step_scheduler.val_every_steps": 2,
        "model.context_attention": "causal",
        "ar_loss_weight": 0.5,
        "noise": {"name": "mask", **SCHEDULE},
        "validation_noise": {"levels": [0.5, 1.0]},
        "validation_dataset": lab.validation(),
    }


def records(file):
    """Records of an offline run: LevelDB's log format, of which each is a protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, parts = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        if (room := 32768 - place % 32768) < 7:
            place += room
            continue
        _, size, kind = struct.unpack_from("<IHB", data, place)
        parts += data[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # whole, or the last part
            record = Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


def read_offline(folder):
    """The configuration and the rows of an offline run."""
    (file,) = folder.glob("*.wandb")
    rows, config = [], {}
    for record in records(file):
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
        elif record.WhichOneof("record_type") == "run":
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
    return config, sorted(rows, key=lambda row: row["_step"])


def test_wandb_offline(lab, quiet_wandb):
    wandb, folder = quiet_wandb, lab.folder / "wandb_run"
    changes = {**rich(lab), "wandb": {"project": "bard", "dir": str(lab.folder)}}
    _, log = lab.run("wandb_run", steps=4, **changes)
    first = wandb.run.id
    assert wandb.run.name == "wandb_run", "after the folder"
    wandb.teardown()  # waits until the file is whole, which finish does not
    assert (folder / "wandb_run_id").read_text().strip() == first
    (offline,) = (lab.folder / "wandb").glob(f"offline-run-*-{first}")
    config, rows = read_offline(offline)
    assert config["model"]["block_size"] == 8
    assert [row["_step"] for row in rows] == [0, 1, 2, 3]
    assert [row["loss"] for row in rows] == pytest.approx(losses(log))
    assert [row["num_samples"] for row in rows] == [line["num_samples"] for line in log], "not those of the validation"
    assert all(row.keys() >= ALWAYS for row in rows)
    assert [row.keys() >= VALIDATION for row in rows] == [False, True, False, True]

    (last,) = folder.glob("epoch_*_step_3")
    shutil.rmtree(last)
    lab.run("wandb_run", steps=4, **changes)
    assert wandb.run.id == first, "goes on in the same run"
    wandb.teardown()
    (again,) = set((lab.folder / "wandb").glob(f"offline-run-*-{first}")) - {offline}
    assert [row["_step"] for row in read_offline(again)[1]] == [2, 3]
    second = lab.build("wandb_run", steps=4, **{**changes, "wandb": {**changes["wandb"], "resume": "never"}})
    assert wandb.run.id != first, "unless the recipe says otherwise"
    second.checkpointer.close()
    wandb.finish()


def test_mlflow_with_a_store_of_files(lab, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (lab.folder / "mlruns").as_uri()
    changes = {**rich(lab), "mlflow": {"experiment_name": "bard", "tracking_uri": uri, "tags": {"task": "digits"}}}
    _, log = lab.run("mlflow_run", steps=4, **changes)
    run_id = mlflow.active_run().info.run_id
    mlflow.end_run()
    client = mlflow.MlflowClient(uri)
    run = client.get_run(run_id)
    assert (run.info.status, run.data.tags["task"]) == ("FINISHED", "digits")
    assert run.data.metrics.keys() >= ALWAYS | VALIDATION
    sent = client.get_metric_history(run_id, "loss")
    assert [(metric.step, metric.value) for metric in sent] == [
        (step, pytest.approx(loss)) for step, loss in enumerate(losses(log))
    ]
    assert run.data.params["model.block_size"] == "8"
    assert run.info.run_name == "mlflow_run"
    lab.run("mlflow_run", steps=4, **changes)
    assert mlflow.active_run().info.run_id == run_id, "goes on in the same run"


def test_a_run_that_fails_is_marked_so(lab, mlflow, monkeypatch):
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    uri = (lab.folder / "mlruns").as_uri()
    recipe = lab.build("failing", mlflow={"experiment_name": "failing", "tracking_uri": uri})
    run_id = mlflow.active_run().info.run_id

    def fail(*_):
        raise ValueError("a bad sample")

    recipe.train_step = fail
    with pytest.raises(ValueError, match="a bad sample"):
        recipe.run_train_validation_loop()
    assert mlflow.active_run() is None
    assert mlflow.MlflowClient(uri).get_run(run_id).info.status == "FAILED"


def test_what_a_tracker_refuses_is_one_line(lab, mlflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    uri = (lab.folder / "refused").as_uri()
    with pytest.raises(ValueError, match="mlflow: .*MLFLOW_ALLOW_FILE_STORE=true") as found:
        lab.build("refused", mlflow={"experiment_name": "refused", "tracking_uri": uri})
    assert "\n" not in str(found.value)


def test_a_tracker_that_is_not_installed_is_named_before_anything_starts(lab, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(
        ValueError, match=r"wandb: the package wandb is not installed; pip install 'nemo-bard\[wandb\]'"
    ):
        check_trackers({"wandb": {"project": "bard"}})
    check_trackers({"wandb": {"project": "bard", "enable": False}, "mlflow": None})
