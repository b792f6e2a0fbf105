"""A reader from a user's own package, and a real video: trained on, measured, evaluated on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from nemo_bard.base.paths import recipes_dir

sys.path.insert(0, str(Path(__file__).parent))
from test_pbm import TRAIN, read_log

pytestmark = pytest.mark.slow

PACKAGE = '''
from PIL import Image


class Sides:
    """Squares of a grey level, and how light it is."""

    def __init__(self, answer="light", count=4):
        self.answer, self.count = answer, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        image = {"type": "image", "image": Image.new("L", (64, 64), 50 * index).convert("RGB")}
        turns = [{"role": "user", "content": [image, {"type": "text", "text": "How light?"}]}]
        turns.append({"role": "assistant", "content": [{"type": "text", "text": f"{self.answer} {index}"}]})
        return {"conversation": turns, "sample_index": index}

    def score(self, prediction, reference):
        return {"own_score": float(self.answer in reference)}
'''
ENTRY_POINTS = "[nemo_bard.readers]\nsides = sides_reader:Sides\n"


@pytest.fixture(scope="module")
def package(tmp_path_factory, install_package) -> Path:
    """A folder with an installed package that declares a reader."""
    modules = {"sides_reader": PACKAGE}
    return install_package(tmp_path_factory.mktemp("site"), "sides-reader", modules, ENTRY_POINTS)


def command(*words: object, path: Path | None = None) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), os.environ.get("PYTHONPATH", "")])
    start = [sys.executable, "-c", "import sys; from nemo_bard.cli import main; sys.exit(main(sys.argv[1:]))"]
    return subprocess.run([*start, *map(str, words)], capture_output=True, text=True, env=environment, check=False)


def train(start: Path, folder: Path, *words: str, path: Path | None = None, config: object = "pbm") -> list[dict]:
    settings = {**TRAIN, "model.pretrained_model_name_or_path": start, "checkpoint.checkpoint_dir": folder}
    settings |= {"step_scheduler.max_steps": 2, "checkpoint.enabled": False}
    settings |= {"step_scheduler.global_batch_size": 2, "step_scheduler.local_batch_size": 1}
    overrides = [f"{key}={value}" for key, value in settings.items()]
    done = command("finetune", "--config", config, *overrides, *words, path=path)
    assert done.returncode == 0, done.stderr[-3000:]
    log = read_log(folder)
    assert len(log) == 2
    assert all(line["loss"] > 0 for line in log)
    return log


@pytest.mark.parametrize(
    "section",
    [
        '{"_target_": "sides_reader.Sides", "answer": "dark"}',
        '{"_target_": "nemo_bard.data.open_dataset", "spec": "sides:dark"}',
    ],
)
def test_training_on_a_reader_from_outside(start, package, tmp_path, section):
    raw = yaml.safe_load((recipes_dir() / "pbm.yaml").read_text())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**raw, "dataset": json.loads(section)}))
    words = ["dataloader.num_workers=1"]
    log = train(start, tmp_path / "run", *words, path=package, config=tmp_path / "recipe.yaml")
    assert [line["num_samples"] for line in log] == [2, 2]


def test_evaluation_on_a_reader_from_outside(start, package, tmp_path):
    """By the name that its package declares, with its own scorer."""
    words = ["--data", "sides:dark,count=3", "--limit", 2, "--max-new-tokens", 4, "--output", tmp_path / "r.json"]
    done = command("evaluate", "--model", start, *words, path=package)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "r.json").read_text())
    assert (result["num_samples"], result["scores"]) == (2, {"own_score": 1.0})
    unknown = command("evaluate", "--model", start, "--data", "side:dark", path=package)
    assert unknown.returncode == 2
    assert "did you mean sides:dark?" in unknown.stderr


@pytest.mark.parametrize("packed", [False, True])
def test_a_real_video_trains(start, tmp_path, write_clip, packed):
    """Two steps on clips of a JSONL file, one with an image beside it; measured lengths are those of the rows."""
    from PIL import Image

    lines = []
    Image.new("RGB", (90, 60)).save(tmp_path / "a.png")
    for index in range(4):
        write_clip(tmp_path / f"{index}.mp4", 16 + 8 * index)
        image = index % 2 * "<image>"
        messages = [{"role": "user", "content": f"<video>{image}what?"}, {"role": "assistant", "content": "a red bar"}]
        lines.append({"messages": messages, "videos": [f"{index}.mp4"], "images": ["a.png"] if image else []})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = [f"dataset.path={tmp_path / 'train.jsonl'}", "dataloader.num_workers=1"]
    words += ["packing.max_length=700", "step_scheduler.global_batch_size=1"] if packed else []
    log = train(start, tmp_path / "run", *words)
    assert sum(line["num_samples"] for line in log) >= (2 if packed else 4)
