"""Files that are damaged after the start: dropped and listed, or the end of the run; one and two ranks, cut and packed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_pbm import TRAIN, drive, read_log, write_data

pytestmark = pytest.mark.slow

STEPS = 8
BAD = (0, 3, 8, 9)
"""Two steps lose one of their two samples, a third loses both, and at two ranks sample 0 is repeated in the sixth."""
ORDERED = {
    "step_scheduler.global_batch_size": 2,
    "step_scheduler.local_batch_size": 1,
    "step_scheduler.max_steps": STEPS,
    "step_scheduler.val_every_steps": 100,
    "dataloader.shuffle": False,
}


def damage(folder: Path) -> None:
    """Truncate, delete and overwrite: what a check of headers at the start sees, and what it does not."""
    for index in (0, 3):
        picture = folder / f"{index}.png"
        picture.write_bytes(picture.read_bytes()[: picture.stat().st_size * 2 // 3])
    (folder / "8.png").unlink()
    (folder / "9.png").write_text("no image any more")


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    whole, broken = write_data(folder / "whole", 11), write_data(folder / "broken", 11)
    damage(folder / "broken")

    def job(name, data=broken, **changes):
        where = {
            "model.pretrained_model_name_or_path": str(start),
            "dataset.path": str(data),
            "validation_dataset": {"_target_": "nemo_bard.data.JsonlDataset", "path": str(data)},
            "checkpoint.checkpoint_dir": str(folder / name),
            "on_bad_sample": "drop",
        }
        return {"overrides": {**TRAIN, **ORDERED, **where, **changes}}

    checked = {"step_scheduler.val_every_steps": 4}
    rows = {"packing.max_length": 64, "step_scheduler.max_steps": 5}
    drive(
        [
            {**job("left_out", whole, **{"on_bad_sample": "error"}), "leave_out": BAD},
            job("one", **checked),
            job("workers", **{"dataloader.num_workers": 2}),
            {**job("cut"), "sigterm_at": 2},
            job("cut"),
            job("rows", **rows),
            {**job("rows_cut", **rows), "sigterm_at": 1},
            job("rows_cut", **rows),
        ],
        folder,
    )
    drive([job("two", **checked), job("rows_two", **rows)], folder, ranks=2)
    return folder


def same(first: list[dict], second: list[dict], tolerance: float = 1e-6) -> None:
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        for key in ("loss", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=tolerance, abs=1e-9), (a["step"], key)
        for key in ("num_samples", "num_loss_tokens", "num_tokens_per_step"):
            assert a[key] == b[key], (a["step"], key)


def rejects(folder: Path, split: str = "train") -> list[tuple[int, int, int]]:
    records = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    return [(r["epoch"], r["step"], r["sample_index"]) for r in records if r["split"] == split]


EXPECTED = [(0, 0, 0), (0, 1, 3), (0, 4, 8), (0, 4, 9), (1, 6, 0), (1, 7, 3)]


@pytest.mark.parametrize("name", ["one", "workers"])
def test_a_dropped_sample_leaves_the_loss_of_the_others(runs, name):
    """As if it did not count in a run on whole data; nothing takes its place, and a step may lose all its samples."""
    log = read_log(runs / name)
    same(log, read_log(runs / "left_out"))
    assert [line["num_samples"] for line in log] == [1, 1, 2, 2, 0, 1, 1, 1]
    assert [line["num_bad"] for line in log] == [1, 1, 0, 0, 2, 0, 1, 1]
    assert rejects(runs / name) == EXPECTED


def test_two_ranks_are_one(runs):
    """In some steps one rank has nothing at all; in the sixth its sample is a repeated one, which does not count."""
    same(read_log(runs / "one"), read_log(runs / "two"), 1e-4)
    assert [line["num_bad"] for line in read_log(runs / "two")] == [1, 1, 0, 0, 2, 0, 1, 1]
    assert sorted(rejects(runs / "two")) == EXPECTED


def test_the_list_says_what_was_wrong(runs):
    records = [json.loads(line) for line in (runs / "one" / "rejects.jsonl").read_text().splitlines()]
    third = next(record for record in records if record["sample_index"] == 3)
    assert third["source"] == f"{runs}/broken/train.jsonl:4"
    assert "3.png cannot be read" in third["reason"]
    assert "8.png does not exist" in next(r for r in records if r["sample_index"] == 8)["reason"]


def test_validation_drops_them_too(runs):
    one, two = (read_log(runs / name, "validation") for name in ("one", "two"))
    assert [line["num_samples"] for line in one] == [7] * len(one)
    assert [line["num_bad"] for line in one] == [4] * len(one)
    for a, b in zip(one, two, strict=True):
        assert a["val_loss"] == pytest.approx(b["val_loss"], rel=1e-4)
    assert sorted({sample for _, _, sample in rejects(runs / "one", "validation")}) == list(BAD)


def test_a_resumed_run_drops_the_same(runs):
    same(read_log(runs / "cut"), read_log(runs / "left_out"))
    assert rejects(runs / "cut") == EXPECTED


def test_rows_lose_their_bad_samples(runs):
    """Rows are planned from headers; what cannot be measured is dealt out among them and dropped when it is read."""
    log = read_log(runs / "rows")
    first = [line for line in log if line["epoch"] == 0]
    assert sum(line["num_samples"] for line in first) == 7
    assert sum(line["num_bad"] for line in first) == 4
    same(log, read_log(runs / "rows_two"), 1e-4)
    same(log, read_log(runs / "rows_cut"))
    assert rejects(runs / "rows_cut") == rejects(runs / "rows")


def finetune(start: Path, data: Path, folder: Path, *words: str) -> subprocess.CompletedProcess:
    settings = {**TRAIN, **ORDERED, "model.pretrained_model_name_or_path": start, "dataset.path": data}
    settings |= {"checkpoint.checkpoint_dir": folder, "checkpoint.enabled": False}
    command = [sys.executable, "-m", "nemo_bard.cli", "finetune", "--config", "pbm"]
    command += [f"{key}={value}" for key, value in settings.items()]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([*command, *words], capture_output=True, text=True, env=environment, check=False)


def errors(done: subprocess.CompletedProcess) -> list[str]:
    return [line for line in done.stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("ranks", [1, 2])
def test_error_ends_the_run_with_code_2_and_the_files_name(start, tmp_path, ranks):
    """Code 2 is what a Slurm job does not put back into the queue."""
    data = write_data(tmp_path / "data", 6)
    picture = tmp_path / "data" / "3.png"
    picture.write_bytes(picture.read_bytes()[: picture.stat().st_size * 2 // 3])
    words = ["--nproc-per-node", str(ranks), "dataloader.num_workers=1"]
    done = finetune(start, data, tmp_path / "run", *words)
    assert done.returncode == 2, done.stderr[-3000:]
    assert errors(done)
    assert all("3.png cannot be read" in line and "on_bad_sample: drop" in line for line in errors(done))
    assert "Traceback" not in done.stderr


def test_too_many_bad_samples_end_the_run(start, tmp_path):
    data = write_data(tmp_path / "data", 6)
    for index in (2, 3):
        (tmp_path / "data" / f"{index}.png").unlink()
    words = ["on_bad_sample.action=drop", "on_bad_sample.max_samples=1"]
    done = finetune(start, data, tmp_path / "run", *words)
    assert done.returncode == 2, done.stderr[-3000:]
    (line,) = errors(done)
    assert "2 of 6 samples (train) are bad, on_bad_sample allows 1" in line
    assert "rejects.jsonl" in line
