"""Checkpoint folders that bring their own code, without this package: the same interpreter, where it cannot be imported."""

import json
import shutil
import sys

import plain_cases
import pytest

from nemo_bard.checkpoints import self_contained

ABSENT = ("nemo_bard", "nemo_automodel", "hydra", "omegaconf", "megatron")


@pytest.fixture(scope="module")
def folder(start, tmp_path_factory):
    """A folder with its own code, moved to a path with blanks and dots."""
    made = tmp_path_factory.mktemp("made") / "made"
    shutil.copytree(start, made)
    written = self_contained.write_code(made)
    assert written == sorted(path.name for path in made.glob("*.py"))
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
