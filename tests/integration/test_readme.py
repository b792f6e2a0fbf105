"""What README.md prints works: the demo (in a small size), every command line, the JSONL line and the Python code."""

import contextlib
import io
import json
import re
import shlex
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

from nemo_bard.base.paths import find_recipe
from nemo_bard.cli.app import build_parser
from nemo_bard.cli.commands import COMMANDS
from nemo_bard.cli.commands.finetune import load_raw_config, parse_overrides
from nemo_bard.pipeline.checks import check_inputs
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.job import make_job
from nemo_bard.report.run import read_run, scores_of
from nemo_bard.train.config import validate_recipe

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


def run_demo(*words):
    command = [sys.executable, "-m", "nemo_bard.cli.demo", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The demo in its small size, as ``make demo`` runs it: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("demo") / "out"
    done = run_demo("--small", "--output", str(folder))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder, done.stdout


@pytest.fixture
def workplace(demo, tmp_path, monkeypatch):
    """A folder with the files that README.md names."""
    (tmp_path / "runs/b4/LATEST/model").mkdir(parents=True)
    (tmp_path / "runs/b8/LATEST/model").mkdir(parents=True)
    (tmp_path / "start").symlink_to(demo[0] / "start/export")
    (tmp_path / "runs/b4" / EXPORT).symlink_to(demo[0] / "pbm_b4/export")
    (tmp_path / "runs/b8" / EXPORT).symlink_to(demo[0] / "pbm_b8/export")
    (tmp_path / "Qwen3-VL-4B-Instruct").symlink_to(demo[0] / "source/export")
    for folder in ("receipts", "photos/receipts"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (64, 64), "white").save(tmp_path / folder / "1.png")
    Image.new("RGB", (64, 64), "white").save(tmp_path / "receipt.png")
    conversations, line = blocks("json")[:2]
    (tmp_path / "photos/train.json").write_text(conversations)
    (tmp_path / "train.jsonl").write_text(line)
    (tmp_path / "mix.yaml").write_text(blocks("yaml")[0])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_demo_leaves_a_report_and_a_picture(demo):
    folder, told = demo
    scored = scores_of(read_run(folder))
    assert [row["stage"] for row in scored] == [
        "source", "joint_b8", "speculative_b8", "pbm_b4", "pbm_b8", "pbm_b16", "pbm_b32", "swd_b32",
    ]  # fmt: skip
    assert [row["block_size"] for row in scored] == [None, 8, 8, 4, 8, 16, 32, 32]
    assert all(0 <= row["scores"]["digit_accuracy"] <= 1 and row["tpf"] > 0 for row in scored)
    assert "automodel finetune --config" in told
    assert "| swd_b32 | 32 | low confidence dynamic |" in told
    assert "| swd_b32 | 32 | low confidence dynamic |" in (folder / "report.md").read_text()
    for name in ("answers.png", "report/losses.png", "report/scores.png"):
        with Image.open(folder / name) as picture:
            assert picture.width > 800
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


@pytest.mark.slow
def test_demo_does_not_touch_a_folder_of_others(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    done = run_demo("--output", str(tmp_path))
    assert done.returncode == 2
    assert f"error: run_dir {tmp_path} holds thesis.txt and is no run of a pipeline; use another" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_readme_names_every_command():
    mentioned = set(re.findall(r"nemo-bard (\w+)", README))
    assert mentioned <= set(COMMANDS), f"README.md names commands that do not exist: {mentioned - set(COMMANDS)}"


@pytest.mark.parametrize("words", commands("nemo-bard"), ids=" ".join)
def test_command_lines_parse(words):
    _, extra = build_parser(words[0]).parse_known_args(words)
    assert not extra


def line_of(command: str, folder: Path) -> list[str]:
    """README.md's line of a command, with a folder for DIR."""
    words = next(words for words in commands("nemo-bard") if words[0] == command)
    return [sys.executable, "-m", "nemo_bard.cli", *(str(folder) if word == "DIR" else word for word in words)]


def test_the_server_starts_answers_and_stops(start):
    for package in ("fastapi", "uvicorn", "prometheus_client"):
        pytest.importorskip(package, reason="needs nemo-bard[serve]")
    command = [*line_of("serve", start), "--engine", "local", "--port", "0"]
    question = {"messages": [{"role": "user", "content": "What is the total?"}], "max_tokens": 4, "temperature": 0}
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        try:
            told = next((line for line in server.stderr if "http://" in line), "")
            address = re.search(r"http://[\d.]+:\d+", told)
            assert address, told
            asked = urllib.request.Request(
                f"{address[0]}/v1/chat/completions", json.dumps(question).encode(), {"Content-Type": "application/json"}
            )
            with urllib.request.urlopen(asked, timeout=60) as answer:
                assert json.load(answer)["usage"]["completion_tokens"] > 0
        finally:
            server.terminate()
        assert server.wait(30) == 0


def test_the_harness_prints_its_command(start):
    done = subprocess.run([*line_of("eval", start), "--dry-run"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--tasks mmmu_val,mmstar" in done.stdout + done.stderr
    assert str(start) in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", commands("automodel"), ids=" ".join)
def test_training_commands_are_valid(words, workplace):
    args, extra = build_parser("finetune").parse_known_args(words)
    assert args.command == "finetune"
    recipe = find_recipe(args.config)
    if recipe.stem.startswith("bard_"):
        job = make_job(compose(read_words(recipe, extra)))
        check_inputs(job)
        assert job.stages[-1].name == "swd_b32"
        return
    raw = load_raw_config(recipe, parse_overrides(extra))
    validate_recipe(raw, with_anchor="anchor" in raw)


@pytest.mark.slow
def test_jsonl_line_is_read(workplace):
    from nemo_bard.data.jsonl import make_jsonl

    sample = make_jsonl("train.jsonl")[0]
    assert [turn["role"] for turn in sample["conversation"]] == ["user", "assistant"]


@pytest.mark.slow
def test_data_commands_run(workplace):
    """From a folder of images and LLaVA's JSON to a prepared folder that is looked at, checked and drawn from."""
    from nemo_bard.data import MixtureDataset

    lines = [words for words in commands("nemo-bard") if words[0] == "data"]
    assert [words[1] for words in lines] == ["prepare", "show", "check"]
    # the small model stands in for one of Qwen's vocabulary, which needs no start point
    (workplace / "mix.yaml").write_text(blocks("yaml")[0].replace("Qwen3-VL-4B-Instruct", "start"))
    for words in lines:
        words = ["start" if word == "Qwen3-VL-4B-Instruct" else word for word in words]
        done = subprocess.run(
            [sys.executable, "-m", "nemo_bard.cli", *words], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert list((workplace / "prepared/photos").glob("lengths-*.npz"))
    assert "What is the total?" in (workplace / "data.html").read_text(encoding="utf-8")
    sample = MixtureDataset("prepared")[0]
    assert sample["conversation"][1]["content"] == [{"type": "text", "text": "12.40 EUR"}]


@pytest.mark.slow
def test_python_code_runs(workplace):
    out = io.StringIO()
    code = blocks("python")[0].replace("max_new_tokens=256", "max_new_tokens=16")
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})
    assert out.getvalue().endswith("\n")
