"""What README.md prints works: the demo (in a small size), every command line, the JSONL line and the Python code."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from nemo_bard.cli import build_parser
from nemo_bard.commands import COMMANDS
from nemo_bard.commands.finetune import load_raw_config, parse_overrides
from nemo_bard.paths import find_recipe
from nemo_bard.train.recipe_config import validate_recipe

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXPORT = "LATEST/model/consolidated"


def blocks(language: str) -> list[str]:
    """Code blocks of README.md, without the indentation of a list item."""
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, re.M | re.S)
    return [re.sub(rf"^{indent}", "", text, flags=re.M) for indent, text in found]


def commands(program: str) -> list[list[str]]:
    """Command lines of a program, continued lines joined, comments left out."""
    lines = "\n".join(blocks("bash")).replace("\\\n", " ").splitlines()
    words = [shlex.split(line, comments=True) for line in lines]
    return [line[1:] for line in words if line[:1] == [program]]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo in its small size, as ``make demo`` runs it."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = subprocess.run(
        [sys.executable, "-m", "nemo_bard.demo", "--small", "--output", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture
def workplace(demo, tmp_path, monkeypatch):
    """A folder with the files that README.md names."""
    (tmp_path / "runs/b4/LATEST/model").mkdir(parents=True)
    (tmp_path / "runs/b8/LATEST/model").mkdir(parents=True)
    (tmp_path / "start").symlink_to(demo / "start")
    (tmp_path / "runs/b4" / EXPORT).symlink_to(demo / "b4" / EXPORT)
    (tmp_path / "runs/b8" / EXPORT).symlink_to(demo / "b8" / EXPORT)
    (tmp_path / "receipts").mkdir()
    Image.new("RGB", (64, 64), "white").save(tmp_path / "receipts/1.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "receipt.png")
    (tmp_path / "train.jsonl").write_text(blocks("json")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_demo_leaves_a_table_and_a_picture(demo):
    report = json.loads((demo / "demo.json").read_text())
    assert [row["stage"] for row in report["rows"]] == ["source (autoregressive)", "B = 4", "B = 8"]
    assert all(0 <= row["digit_accuracy"] <= 1 and row["tpf"] > 0 for row in report["rows"])
    assert (demo / "table.md").read_text().count("\n") == 5
    with Image.open(demo / "answers.png") as picture:
        assert picture.width > 800
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.slow
def test_demo_does_not_touch_a_folder_of_others(tmp_path):
    from nemo_bard.demo import prepare_folder

    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and not an earlier demo's"):
        prepare_folder(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"


def test_readme_names_every_command():
    mentioned = set(re.findall(r"nemo-bard (\w+)", README))
    assert mentioned <= set(COMMANDS), f"README.md names commands that do not exist: {mentioned - set(COMMANDS)}"


@pytest.mark.parametrize("words", commands("nemo-bard"), ids=" ".join)
def test_command_lines_parse(words):
    _, extra = build_parser(words[0]).parse_known_args(words)
    assert not extra


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("automodel"), ids=" ".join)
def test_training_commands_are_valid(words, workplace):
    args, extra = build_parser("finetune").parse_known_args(words)
    assert args.command == "finetune"
    raw = load_raw_config(find_recipe(args.config), parse_overrides(extra))
    validate_recipe(raw)


@pytest.mark.slow
def test_jsonl_line_is_read(workplace):
    from nemo_bard.data import make_jsonl

    sample = make_jsonl("train.jsonl")[0]
    assert [turn["role"] for turn in sample["conversation"]] == ["user", "assistant"]


@pytest.mark.slow
def test_python_code_runs(workplace):
    out = io.StringIO()
    code = blocks("python")[0].replace("max_new_tokens=256", "max_new_tokens=16")
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().endswith("\n")
