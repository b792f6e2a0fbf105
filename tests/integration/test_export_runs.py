"""``nemo-bard export`` of what NeMo AutoModel writes: shards, torch's own format, LoRA, and the card of a plain recipe run."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent))
from test_upstream import LORA, lab, weights  # noqa: F401 (a fixture)

from nemo_bard.checkpoints.exporting.export import export
from nemo_bard.cli.app import main

pytestmark = pytest.mark.slow
SAVING = {"checkpoint.enabled": True, "step_scheduler.ckpt_every_steps": 1}


def assert_exported(model, folder):
    """The folder holds the weights of a model, bit by bit."""
    from transformers import AutoModelForImageTextToText

    found = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    expected = weights(model)
    assert found.config.block_size == model.config.block_size
    for name, weight in weights(found).items():
        assert weight.equal(expected[name]), name


@pytest.mark.parametrize("kind", ["safetensors", "torch_save"])
def test_a_checkpoint_of_either_format(lab, tmp_path, kind, capsys):  # noqa: F811
    changes = {**SAVING, "checkpoint.model_save_format": kind, "checkpoint.save_consolidated": False}
    recipe, _ = lab.run(kind, steps=2, **changes)
    run = lab.folder / kind
    assert main(["export", str(run), str(tmp_path / "last")]) == 0
    assert f"({'shards' if kind == 'safetensors' else 'distributed'})" in capsys.readouterr().out
    assert_exported(recipe.model_parts[0], tmp_path / "last")
    export(run / "epoch_0_step_0", tmp_path / "first")
    first, last = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "last"))
    assert not all(first[name].equal(last[name]) for name in last), "another step has other weights"
    card = (tmp_path / "first" / "README.md").read_text()
    assert "| block diffusion (PBM) | 8 | 1 |" in card
    assert "`JsonlDataset`, path " in card
    assert str(lab.folder) not in card


def test_adapters_are_added_to_their_base(lab, tmp_path):  # noqa: F811
    recipe, _ = lab.run("adapters", steps=2, peft=LORA, **SAVING)
    run = lab.folder / "adapters"
    report = export(run, tmp_path / "final")
    assert report.kind == "folder", "AutoModel's recipe merged its last checkpoint"
    shutil.rmtree(run / "LATEST" / "model" / "consolidated")
    report = export(run, tmp_path / "merged", max_shard_size="300KB")
    assert report.kind == "adapters"
    whole = load_file(tmp_path / "final" / "model.safetensors")
    found = {}
    for file in (tmp_path / "merged").glob("model-*.safetensors"):
        found |= load_file(file)
    assert found.keys() == whole.keys()
    assert all(found[name].equal(weight) for name, weight in whole.items())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["block_size"] == recipe.model_parts[0].config.block_size
    assert "LoRA of rank 4" in (tmp_path / "merged" / "README.md").read_text()
    start = load_file(next(lab.start.glob("*.safetensors")))
    assert not all(start[name].equal(weight) for name, weight in whole.items())


def test_the_card_of_a_folder_with_its_own_code_runs_without_the_package(start, tmp_path):
    export(start, tmp_path / "export", self_contained=True)
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(tmp_path / "image.png")
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "export" / "README.md").read_text(), re.DOTALL)
    plain = Path(__file__).parents[1] / "plain"
    absent = ("nemo_bard", "nemo_automodel", "hydra", "omegaconf", "megatron")
    block = f"import sys; sys.path.insert(0, {str(plain)!r}); import plain_answers; "
    block += f"sys.meta_path.insert(0, plain_answers.Blocked({absent!r}))\n"
    (tmp_path / "card.py").write_text(block + code.replace("max_new_tokens=256", "max_new_tokens=8"))
    done = subprocess.run([sys.executable, "card.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("\n")
