"""The code that folders bring along: what it is made of, and how it is rewritten."""

import ast
import re
import sys

import pytest

from nemo_bard.checkpoints.self_contained import closure, code, outside, parse, read, rewrite, write_code

MODULES = {
    "base": "copies errors folders names registry settings",
    "cost": "count",
    "generation": "adapter_folders adapters capture causal decode drafts engines entry graph kernels low_rank next_token"
    " parameters prefix products prompt prompt_prefix records resolve runner sampling session settings steps strategies"
    " text",
    "method": "chunked layout",
    "model": "attention bard configuration lean sequences vision",
    "upstream": "qwen3_vl torch touched transformers views",
}


@pytest.fixture(scope="module")
def files():
    return code()


def test_what_it_is_made_of():
    """A new module here is carried by every folder: is it needed for loading or decoding?"""
    known = {f"nemo_bard.{room}.{name}" for room, names in MODULES.items() for name in names.split()}
    assert set(closure()) - known == set()


def test_it_needs_torch_and_transformers_alone():
    """... and what transformers itself cannot be without."""
    found = outside(closure()) - set(sys.stdlib_module_names)
    assert {"torch", "transformers"} <= found <= {"torch", "transformers", "safetensors", "huggingface_hub"}


def test_no_import_of_the_package_is_left(files):
    for name, text in files.items():
        tree = ast.parse(text, name)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                assert not str(node.module).startswith("nemo_bard"), name
                if node.level:
                    assert f"{node.module}.py" in files, name
            elif isinstance(node, ast.Import):
                assert not any(alias.name.startswith("nemo_bard") for alias in node.names), name


def test_transformers_finds_all_files_from_each_entry(files, tmp_path):
    from transformers.dynamic_module_utils import get_relative_import_files

    for name, text in files.items():
        (tmp_path / name).write_text(text)
    found = get_relative_import_files(tmp_path / "modeling_bard_vl.py")
    assert {path.rpartition("/")[2] for path in found} | {"modeling_bard_vl.py"} == set(files)


def test_older_transformers_are_refused_by_name(files, tmp_path, monkeypatch):
    from transformers import dynamic_module_utils
    from transformers.utils import versions

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(versions.importlib.metadata, "version", lambda package: "5.17.2")
    (tmp_path / "folder").mkdir()
    for name, text in files.items():
        (tmp_path / "folder" / name).write_text(text)
    with pytest.raises(ImportError, match=r"transformers>=5\.18 is required .* found transformers==5\.17\.2"):
        dynamic_module_utils.get_class_from_dynamic_module(
            "configuration_bard_vl.BardVLConfig", str(tmp_path / "folder")
        )


def test_every_file_says_where_it_is_from(files):
    for name, text in files.items():
        first, second, _ = text.split("\n", 2)
        assert re.fullmatch(r"# Generated from nemo_bard\.[\w.]+ of nemo_bard \d[\w.]*; do not edit\.", first), name
        assert second == "# SPDX-License-Identifier: Apache-2.0", name


def test_no_file_hides_a_package(files):
    """A Python that starts in the folder finds ``torch.py`` there before torch."""
    names = {name.removesuffix(".py") for name in files}
    assert all(name.startswith("bard_vl_") or name.endswith("_bard_vl") for name in names)


def test_rewriting_changes_imports_and_names_alone():
    text = '''"""Ümläuts before what is rewritten: ``nemo_bard.room.two.Thing``."""
from typing import TYPE_CHECKING
from nemo_bard.room.two import (
    Thing,  # kept
)
if TYPE_CHECKING:
    from nemo_bard.room.heavy import Other
NAMES = {"ü": "nemo_bard.room.two.Thing", "group": "nemo_bard.things"}

def late():
    from nemo_bard.room.two import Thing as Two; return Two
'''
    wanted = '''"""Ümläuts before what is rewritten: ``nemo_bard.room.two.Thing``."""
from typing import TYPE_CHECKING
from .bard_vl_room_two import (
    Thing,  # kept
)
NAMES = {"ü": f"{__package__}.bard_vl_room_two.Thing", "group": "nemo_bard.things"}

def late():
    from .bard_vl_room_two import Thing as Two; return Two
'''
    made = rewrite(parse("nemo_bard.room.one", text), frozenset({"nemo_bard.room.one", "nemo_bard.room.two"}))
    assert made.split("\n", 2)[2] == wanted


@pytest.mark.parametrize(
    "line",
    ["import nemo_bard.room.two", "from nemo_bard.room import two", "from nemo_bard import x", "from . import x"],
)
def test_imports_that_cannot_be_rewritten_are_refused(line):
    with pytest.raises(ValueError, match=r"nemo_bard\.room\.one:1: .*from nemo_bard\.room\.module import name"):
        rewrite(parse("nemo_bard.room.one", line), frozenset())


def test_a_package_is_no_module():
    with pytest.raises(ValueError, match=r"nemo_bard\.generation is no module"):
        read("nemo_bard.generation")


def test_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl"}')
    with pytest.raises(ValueError, match=r"config\.json: model_type is 'qwen3_vl', allowed is bard_vl"):
        write_code(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_writing_twice_is_writing_once(start, tmp_path):
    (tmp_path / "config.json").write_text((start / "config.json").read_text())
    names = write_code(tmp_path)
    first = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert write_code(tmp_path) == names
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == first
    assert set(first) == {*names, "config.json"}
