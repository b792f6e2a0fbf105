"""Rehearsals of a small chain for real: at one rank with everything, at one with a bad sample, at two with faults."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl
from nemo_bard.cli.app import main

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("source") / "tiny")


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("nemo_bard.pipeline.rehearse.rows.MEASURED", 64)
    monkeypatch.setattr("nemo_bard.pipeline.rehearse.rows.EXTRA", 16)


def words(source, folder, *more):
    return [
        f"model.source={source}",
        f"run_dir={folder / 'run'}",
        "order=[start,pbm_b4]",
        *(f"stage.{name}.local_batch_size=2" for name in ("pbm_b4", "swd_b32")),
        *(f"stage.{name}.global_batch_size=4" for name in ("pbm_b4", "swd_b32")),
        "stage.swd_b32.block_size=8",
        "data.rows=1",
        "overrides.dataloader.num_workers=0",
        *more,
    ]


def test_a_chain_is_run_measured_and_removed(source, tmp_path, capsys):
    more = ["order=[start,pbm_b4,swd_b32]", "evaluation.generation.max_new_tokens=8", "evaluation.warm_up=false",
            "stage.pbm_b4.overrides.packing.max_length=64"]  # fmt: skip
    assert main(["rehearse", "--config", "bard_tiny", *words(source, tmp_path, *more)]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run.rehearsal.json"]
    told = json.loads((tmp_path / "run.rehearsal.json").read_text())
    start, *stages = told["stages"]
    assert (start["name"], start["step_seconds"]) == ("start", None)
    for stage, steps in zip(stages, (300, 100), strict=True):
        assert stage["resumed"]
        assert stage["max_steps"] == steps
        assert stage["days"] * 86400 >= steps * stage["step_seconds"] > 0
        assert 0 < stage["predicted_memory_gib"] < stage["memory_gib"]
        assert stage["rows"]["measured"] == 64
        assert stage["rows_given"] > 0
        assert stage["checkpoint_gib"] > stage["export_gib"] > 0
        assert stage["predicted_step_seconds"] is None, "of a CPU nothing is known"
    assert stages[0]["longest_row"] > stages[0]["rows"]["typical"], "several samples share a row"
    assert stages[1]["longest_row"] >= stages[1]["rows"]["longest"]
    assert told["files"][0]["lock"] == "ok"
    assert told["days"] == sum(stage["days"] for stage in stages)
    out = capsys.readouterr().out
    assert "stage    longest  typical" in out
    assert "[3/3] swd_b32: exact match" in out


def test_a_corrupt_sample_is_named_as_in_the_real_run(source, tmp_path, capsys):
    picture = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "white").save(picture)
    (tmp_path / "cut.png").write_bytes(picture.read_bytes()[:60])
    lines = [
        {
            "messages": [{"role": "user", "content": "<image>Which?"}, {"role": "assistant", "content": "one " * 9}],
            "images": ["cut.png" if number == 5 else "a.png"],
        }
        for number in range(9)
    ]
    file = tmp_path / "train.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = ["data=jsonl", f"data.path={file}", "evaluation.data=null"]
    chosen = [word for word in words(source, tmp_path, *more) if word != "data.rows=1"]
    assert main(["rehearse", "--config", "bard_tiny", *chosen]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith(f"error: {file}:6: ")
    assert json.loads((tmp_path / "run.rehearsal.json").read_text())["error"] == error.removeprefix("error: ")
    assert not list(tmp_path.glob("run.rehearsal-*"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss", "line"),
    [
        ("SlowLoss", "stage pbm_b4: rank 1 (node "),
        ("FullLoss", "stage pbm_b4: out of memory on rank 1 (node "),
    ],
)
def test_a_rank_that_is_too_slow_or_has_no_memory_is_named(source, tmp_path, loss, line):
    chosen = words(
        source,
        tmp_path,
        "evaluation.data=null",
        f"stage.pbm_b4.overrides.loss_fn={{_target_: rehearse_faults.{loss}, reduction: mean}}",
    )
    environment = {
        **os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]),
    }  # fmt: skip
    command = [sys.executable, "-m", "nemo_bard.cli", "rehearse", "--config", "bard_tiny", "--nproc-per-node", "2"]
    done = subprocess.run([*command, *chosen], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr[-3000:]
    errors = [one for one in done.stderr.splitlines() if one.startswith("error: ")]
    assert len(errors) == 1, done.stderr[-3000:]
    assert line in errors[0]
    assert [path.name for path in tmp_path.iterdir()] == ["run.rehearsal.json"]
    told = json.loads((tmp_path / "run.rehearsal.json").read_text())
    assert told["error"] in errors[0]
    if loss == "SlowLoss":
        assert told["network"]["ranks"] == 2
        assert told["stages"][1]["slow_rank"]["rank"] == 1
        assert "network   gloo, 2 ranks" in done.stdout
    else:
        assert "distributed.defer_fsdp_grad_sync: false" not in errors[0], "a step has one microbatch"
        assert "Traceback" not in done.stderr
