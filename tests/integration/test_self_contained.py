"""Checkpoint folders that bring their own code, without this package: the same interpreter, where it cannot be imported."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import plain_cases
import pytest

from nemo_bard.checkpoints.self_contained import code
from nemo_bard.cli.app import main

ROOT = Path(__file__).resolve().parents[2]
ABSENT = ("nemo_bard", "nemo_automodel", "hydra", "omegaconf", "megatron")


@pytest.fixture(scope="module")
def folder(start, tmp_path_factory):
    """A folder with its own code, moved to a path with blanks and dots."""
    made = tmp_path_factory.mktemp("made") / "made"
    assert main(["export", str(start), str(made), "--self-contained"]) == 0
    assert {path.name for path in made.glob("*.py")} == set(code())
    target = tmp_path_factory.mktemp("moved") / "my models" / "BARD v1.5-b4"
    shutil.copytree(made, target)
    shutil.rmtree(made)
    return target


def test_without_the_package_it_answers_as_with_it(folder, tmp_path):
    asked = plain_cases.cases()
    wanted = plain_cases.expected(folder, asked)
    found = plain_cases.ask(sys.executable, folder, asked, tmp_path, blocked=ABSENT)
    assert plain_cases.differing(asked, found["answers"], wanted) == []
    assert not set(found["modules"]) & set(ABSENT)
    by_name = {case["name"]: one for case, one in zip(asked, wanted, strict=True)}
    assert len({tuple(one["ids"][0]) for one in by_name.values() if isinstance(one, dict)}) > 3
    assert all(one["same"] for one in by_name.values() if isinstance(one, dict))
    assert isinstance(by_name["self_speculative, causal"], dict)
    assert by_name["wrong name"].startswith("ValueError: remasking_strategy must be one of")
    # what a user saves again has the code, too, and the code is not this package's
    assert found["again"] == wanted[0]
    assert set(found["files"]) >= {path.name for path in folder.glob("*.py")}
    assert found["class"].startswith("transformers_modules.")
    assert found["backend"] != "bard"


def test_the_configuration_names_the_classes(folder):
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"] == {
        "AutoConfig": "configuration_bard_vl.BardVLConfig",
        "AutoModelForImageTextToText": "modeling_bard_vl.BardVLForConditionalGeneration",
    }


def test_beside_the_installed_package(folder, tmp_path, install_package):
    """Folder and package do not get into each other's way, nor do strategies made for the package."""
    strategy = """
from dataclasses import dataclass
from nemo_bard.generation import Strategy

@dataclass(frozen=True, kw_only=True)
class Everything(Strategy):
    def fix(self, state):
        return state.is_masked
"""
    entry = "[nemo_bard.strategies]\neverything = a_strategy:Everything\n"
    extra = install_package(tmp_path / "extra", "a_strategy", {"a_strategy": strategy}, entry)
    done = subprocess.run(
        [sys.executable, plain_cases.SCRIPT.with_name("plain_both.py"), folder, tmp_path / "out.json"],
        env={
            **os.environ,
            "HF_MODULES_CACHE": str(tmp_path / "modules"),
            "PYTHONPATH": os.pathsep.join([str(extra), str(ROOT)]),
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=plain_cases.LIMIT_S,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "out.json").read_text())
    backends = found.pop("backends")
    assert len({str(one["ids"]) for one in found.values()}) == 1
    for name, one in found.items():
        package = "transformers_modules" if name.startswith("own") else "nemo_bard"
        assert {one["model"].partition(".")[0], one["config"].partition(".")[0]} == {package}, name
    assert backends.pop("bard") == "nemo_bard.model.attention"
    assert backends.pop("bard_prefix") == "nemo_bard.generation.prefix"
    assert [module.partition(".")[0] for module in backends.values()] == ["transformers_modules"] * 2
