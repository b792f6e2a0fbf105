"""A run goes on at other numbers of ranks: the samples and the noise of an undisturbed run, bit by bit, and its losses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_folder import sample, write_prepared
from test_pbm import read_log, write_mixture

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
STEPS = 9
SAMPLES = {"plain": 21, "packed": 21, "lora": 21, "swd": 21, "mixture": 40}
"""In an epoch; 40 draws of 13 rows."""
TOLERANCE = 1e-6
"""Of losses in float32, of which different orders of summation move the seventh digit."""
TRAIN = {
    "compute_dtype": "float32",
    "step_scheduler.global_batch_size": 4,
    "step_scheduler.local_batch_size": 4,
    "step_scheduler.max_steps": STEPS,
    "step_scheduler.ckpt_every_steps": 100,
    "step_scheduler.save_checkpoint_every_epoch": False,
    "dataloader.shuffle": True,
    "dataloader.collate_fn.pad_to_multiple_of": 1,
    "lr_scheduler.lr_warmup_steps": 0,
    "optimizer.lr": 1e-3,
    "model.block_size": 8,
    "noise.schedule": [{"until": 0.4, "high": 0.6}, {"until": 0.8, "ramp": True}, {"per": "sample"}],
}
GOES = [
    (1, 2, {}),
    (2, 5, {"step_scheduler.local_batch_size": 1, "dataloader.num_workers": 1}),
    (4, 7, {"step_scheduler.local_batch_size": 1}),
    (1, None, {"step_scheduler.local_batch_size": 2}),
]
"""Ranks, the step in which SIGTERM comes (2 and 5 may be the last ones of an epoch), and what else changes."""
FEWER = [(2, 1, {"step_scheduler.local_batch_size": 1}), GOES[-1]]
SHORT = {"step_scheduler.max_steps": 3, "noise.schedule": None}
LORA = {
    "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
    "target_modules": ["*_proj"],
    "dim": 4,
    "alpha": 8,
}
CASES = {
    "plain": ("pbm", {}, GOES),
    "packed": ("pbm", {"packing.max_length": 120}, GOES),
    "lora": ("pbm", {**SHORT, "peft": LORA}, FEWER),
    "swd": ("swd", SHORT, FEWER),
    "mixture": ("pbm", {**SHORT, "packing.max_length": 120}, FEWER),
}
"""Name -> recipe, what it changes, and how it is cut. An epoch has six steps, the last one with a single sample; or two of
rows."""


@pytest.fixture(scope="module")
def runs(start, tmp_path_factory):
    """``NAME`` on one rank, and ``NAME_cut``, which goes on on others."""
    from nemo_bard.checkpoints.convert import convert
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    folder = tmp_path_factory.mktemp("resume")
    convert(make_tiny_qwen3_vl(folder / "other", seed=1), folder / "anchor", block_size=4)
    sources = {
        name: [sample(f"{name}{i}", answer="word " * (1 + i % 4), sizes=[(40, 30)] * (i % 2)) for i in range(number)]
        for name, number in (("a", 9), ("b", 4))
    }
    write_prepared(folder / "prepared", sources)
    mixture = {
        "_target_": "nemo_bard.data.MixtureDataset",
        "path": str(folder / "prepared"),
        "sources": {"a": {"weight": 2}, "b": {"weight": 1}},
        "samples": SAMPLES["mixture"],
    }
    where = {
        "model.pretrained_model_name_or_path": str(start),
        "dataset.path": str(write_mixture(folder / "data", SAMPLES["plain"])),
    }

    def job(case, name, changes, **more):
        recipe, own, _ = CASES[case]
        anchor = {"anchor.pretrained_model_name_or_path": str(folder / "anchor")} if recipe == "swd" else {}
        if case == "mixture":
            own = {**own, "dataset": mixture}
        place = {"checkpoint.checkpoint_dir": str(folder / name)}
        return {
            "overrides": {**TRAIN, **where, **anchor, **own, **changes, **place},
            "recipe": recipe,
            "stream": str(folder / f"{name}_stream"),
            **more,
        }

    turns: list[dict[int, list]] = [{1: [job(case, case, {}) for case in CASES]}]
    for case, (*_, goes) in CASES.items():
        for turn, (ranks, stop, changes) in enumerate(goes):
            turns += [{}] if turn == len(turns) else []
            turns[turn].setdefault(ranks, []).append(job(case, f"{case}_cut", changes, sigterm_at=stop))
    file = folder / "jobs.json"
    file.write_text(json.dumps(turns))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(HERE / "ranks_driver.py"), str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return folder


def stream(folder):
    """Step, index and noise of all samples, of all ranks and goes."""
    lines = [line for file in folder.glob("*.jsonl") for line in file.read_text().splitlines()]
    return sorted(json.loads(line) for line in lines)


@pytest.mark.parametrize("case", CASES)
def test_samples_and_noise_are_those_of_the_undisturbed_run(runs, case):
    whole, cut = stream(runs / f"{case}_stream"), stream(runs / f"{case}_cut_stream")
    assert cut == whole
    assert len({noise for *_, noise in whole}) > 0.8 * len(whole), "short answers may come twice"
    epoch_of = {line["step"]: line["epoch"] for line in read_log(runs / case)}
    assert sorted({step for step, *_ in whole}) == sorted(epoch_of)
    for epoch in range(max(epoch_of.values())):
        indices = [index for step, index, _ in whole if epoch_of[step] == epoch]
        assert len(indices) == len(set(indices)) == SAMPLES[case], "a row that is drawn again has another number"


@pytest.mark.parametrize("case", CASES)
def test_losses_are_those_of_the_undisturbed_run(runs, case):
    whole, cut = read_log(runs / case), read_log(runs / f"{case}_cut")
    assert [line["step"] for line in cut] == list(range(len(whole)))
    for a, b in zip(whole, cut, strict=True):
        for key in ("epoch", "num_samples", "num_loss_tokens", "lr", "noise_high"):
            assert a.get(key) == b.get(key), (a["step"], key)
        assert a["loss"] == pytest.approx(b["loss"], rel=TOLERANCE), a["step"]


@pytest.mark.parametrize("case", CASES)
def test_checkpoints_hold_no_state_of_the_loader(runs, case):
    found = list((runs / f"{case}_cut").glob("epoch_*_step_*"))
    assert len(found) == len(CASES[case][2]), "one for each number of ranks"
    for folder in found:
        assert not (folder / "dataloader").exists()
        assert (folder / "data_stream.pt").is_file()
