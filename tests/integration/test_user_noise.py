"""A noise with a parameter of its own, a loss and an objective from a user's own package: trained with by the command."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from test_pbm import TRAIN, read_log, write_data

pytestmark = pytest.mark.slow

PACKAGE = '''
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nemo_bard.base.settings import number, setting
from nemo_bard.method import BatchLoss, BlockDiffusionLoss, Noise, NoiseOutput, PBMObjective


@dataclass(frozen=True, kw_only=True)
class PowerNoise(Noise):
    """A token becomes [MASK] with probability t ** power."""

    path = "power"
    power: float = setting(1.0, number(0.5), "exponent of the level")

    def corrupt(self, clean_ids, t, *, mask_token_id, num_random_ids, generator=None):
        masked = torch.rand(clean_ids.shape, generator=generator) < t**self.power
        return NoiseOutput(clean_ids.masked_fill(masked, mask_token_id), masked, masked)


class SplitObjective(PBMObjective):
    """Logs the cross-entropy of odd and of even ids."""

    parts = ("odd_loss", "even_loss")

    def loss(self, batch):
        whole = super().loss(batch)
        positions, weight = batch["output_positions"], batch["output_weight"]
        labels, sums = batch["labels"].flatten()[positions], torch.zeros(2, device=positions.device)

        def chunk(logits, part):
            each = F.cross_entropy(logits.detach().float(), labels[part], reduction="none") * weight[part]
            odd = labels[part] % 2 == 1
            sums.add_(torch.stack([each[odd].sum(), each[~odd].sum()]))
            return whole(logits, part)

        return BatchLoss(chunk, sums)


class PowerLoss(BlockDiffusionLoss):
    """Cross-entropy for the path of PowerNoise."""

    path = "power"
    objective_class = SplitObjective

    def per_token(self, logits, labels, noisy_ids):
        return F.cross_entropy(logits, labels, reduction="none")
'''
ENTRY_POINTS = "[nemo_bard.noises]\npower = power_noise:PowerNoise\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_data(tmp_path_factory.mktemp("noise") / "data", 6)


@pytest.fixture(scope="module")
def package(tmp_path_factory, install_package) -> Path:
    """A folder with an installed package that declares a noise."""
    modules = {"power_noise": PACKAGE}
    return install_package(tmp_path_factory.mktemp("site"), "power-noise", modules, ENTRY_POINTS)


DRIVER = """
import json, sys
from nemo_bard.cli import main
for words in json.loads(sys.argv[1]):
    sys.stderr.write(f"@code {main(words)}\\n")
"""


def finetune(start: Path, data: Path, package: Path, *jobs: tuple[Path, dict[str, object]]) -> list[tuple[int, str]]:
    """Run trainings one after the other in one process; returns the exit code of each and what it told."""
    lines = []
    for folder, changes in jobs:
        settings = {**TRAIN, "model.pretrained_model_name_or_path": start, "checkpoint.checkpoint_dir": folder}
        settings |= {"step_scheduler.max_steps": 2, "checkpoint.enabled": False}
        settings |= {"dataset.path": data, **changes}
        lines.append(["finetune", "--config", "pbm", *(f"{key}={value}" for key, value in settings.items())])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment["PYTHONPATH"] = os.pathsep.join([str(package), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", DRIVER, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    parts = re.split(r"@code (\d+)\n", done.stderr)
    told = list(zip(map(int, parts[1::2]), parts[0::2], strict=False))
    assert len(told) == len(jobs), done.stderr[-3000:]
    return told


def trained(
    start: Path, data: Path, package: Path, folder: Path, jobs: dict[str, dict[str, object]]
) -> dict[str, list[dict]]:
    for code, text in finetune(start, data, package, *((folder / name, changes) for name, changes in jobs.items())):
        assert code == 0, text[-3000:]
    logs = {name: read_log(folder / name) for name in jobs}
    assert all(len(log) == 2 for log in logs.values())
    return logs


def test_a_noise_by_its_entry_point_and_its_parameter_counts(start, data, package, tmp_path):
    """Few tokens are masked at a high power, in the phase that says so; validation keeps the section's."""
    jobs = {
        "low": {"noise.power": 0.5},
        "high": {"noise.power": 8},
        "phases": {"noise.power": 0.5, "noise.schedule": [{"until": 0.5}, {"power": 8}]},
    }
    logs = trained(start, data, package, tmp_path, {name: {"noise.name": "power", **job} for name, job in jobs.items()})
    tokens = {name: [line["num_loss_tokens"] for line in log] for name, log in logs.items()}
    assert tokens["high"][0] < tokens["low"][0]
    assert tokens["phases"] == [tokens["low"][0], tokens["high"][1]]


def test_a_noise_a_loss_and_an_objective_by_dotted_names(start, data, package, tmp_path):
    names = {"noise.name": "power_noise.PowerNoise", "loss_fn._target_": "power_noise.PowerLoss"}
    validation = {"validation_dataset._target_": "nemo_bard.data.JsonlDataset", "step_scheduler.val_every_steps": 2}
    validation["validation_dataset.path"] = data
    plain = {**names, "loss_fn._target_": "nemo_bard.method.BlockDiffusionCrossEntropy"}
    logs = trained(start, data, package, tmp_path, {"run": {**names, **validation}, "own": names, "plain": plain})
    for line in logs["run"]:
        assert line["loss"] == pytest.approx(line["odd_loss"] + line["even_loss"], rel=1e-5)
    (line,) = read_log(tmp_path / "run", "validation")
    assert line["val_loss"] == pytest.approx(line["val_odd_loss"] + line["val_even_loss"], rel=1e-5)
    assert logs["own"][0]["loss"] == pytest.approx(logs["plain"][0]["loss"], rel=1e-6)


WRONG = [
    (
        {"noise.name": "powr"},
        "noise.name must be one of mask, uniform, mixed, power, got 'powr' (did you mean 'power'?)",
    ),
    ({"noise.name": "power", "noise.powr": 2}, "unknown recipe key noise.powr; did you mean noise.power?"),
    ({"noise.name": "power", "noise.power": 0}, "noise.power must be a finite number >= 0.5, got 0"),
    ({"noise.name": "mask", "noise.power": 2}, "unknown recipe key noise.power"),
    (
        {"noise.name": "power", "noise.complementary": True},
        "noise.complementary needs noise.name: mask, got 'power'",
    ),
    ({"loss_fn._target_": "power_noise.PowerLoss"}, "loss_fn PowerLoss does not go with noise.name: mask"),
]


def test_what_does_not_fit_is_one_line(start, data, package, tmp_path):
    told = finetune(start, data, package, *((tmp_path / "run", changes) for changes, _ in WRONG))
    for (code, text), (_, message) in zip(told, WRONG, strict=True):
        assert code == 2, text
        assert message in text
        assert text.count("error:") == 1
