"""The command line: dispatch, overrides, recipe lookup, one line per error."""

import errno
import os
import subprocess
import sys
import time
import types

import pytest

from nemo_bard.base import paths
from nemo_bard.base.errors import RunError
from nemo_bard.cli import app as cli
from nemo_bard.cli import startup as _startup
from nemo_bard.cli.commands import COMMANDS, finetune

RECIPE_MODULE = '''
"""Recipes that record what they are given."""
import json, os
from pathlib import Path

LOG = Path(os.environ["RECIPE_LOG"])

class Recipe:
    def __init__(self, cfg):
        self.cfg = cfg

    @classmethod
    def validate_config(cls, raw):
        if raw.get("steps", 0) < 0:
            raise ValueError(f"steps must be >= 0,\\ngot {raw['steps']}")

    def setup(self):
        LOG.write_text(json.dumps({"steps": self.cfg.get("steps"), "lr": self.cfg.get("optimizer.lr")}))

    def run_train_validation_loop(self):
        pass

class Pipeline(Recipe):
    parses_overrides = True

    @classmethod
    def from_overrides(cls, config_path, overrides):
        return cls({"words": overrides})

    def setup(self):
        if "fail=yes" in self.cfg["words"]:
            raise ValueError("fail: must be no")
        with LOG.open("a") as file:
            file.write(json.dumps([os.environ.get("RANK"), os.environ.get("WORLD_SIZE"), *self.cfg["words"]]) + "\\n")

class Failing(Recipe):
    def setup(self):
        from nemo_automodel.components.config.loader import ConfigNode
        ConfigNode({"_target_": "recorded_recipes.open_data", "path": "a.jsonl"}).instantiate()

def open_data(path):
    if os.environ.get("UNEXPECTED"):
        raise RuntimeError("a bug")
    raise ValueError(f"{path}:3: not JSON")
'''


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """A module with recorded recipes on the path, one YAML for each; returns (folder, log)."""
    (tmp_path / "recorded_recipes.py").write_text(RECIPE_MODULE)
    for name in ("Recipe", "Pipeline", "Failing"):
        text = f"recipe: recorded_recipes.{name}\nsteps: 1\noptimizer: {{lr: 1e-3}}\ndata: null\n"
        (tmp_path / f"{name.lower()}.yaml").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("RECIPE_LOG", str(tmp_path / "log"))
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    yield tmp_path, tmp_path / "log"
    sys.modules.pop("recorded_recipes", None)


@pytest.fixture
def upstream(monkeypatch):
    """Stands in for NeMo AutoModel's CLI module; returns the command lines that reached it."""
    seen = []
    app = types.ModuleType("nemo_automodel.cli.app")
    app.main = lambda: seen.append(list(sys.argv)) or 7
    monkeypatch.setitem(sys.modules, "nemo_automodel.cli.app", app)
    return seen, app


# ---------------------------------------------------------------- dispatch
@pytest.mark.parametrize("words", [["x.yaml", "--a.b=1"], [], ["--help"], ["doctor"], ["x.yaml", "finetune"]])
def test_automodel_forwards_everything_but_finetune(upstream, monkeypatch, words):
    monkeypatch.setattr(sys, "argv", ["automodel", *words])
    assert cli.automodel() == 7
    assert upstream[0] == [["automodel", *words]]


def test_main_forwards_a_yaml_file(upstream, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["nemo-bard"])
    assert cli.main(["x.yaml", "--a=1"]) == 7
    assert upstream[0] == [["nemo-bard", "x.yaml", "--a=1"]]


def test_hook_wraps_upstreams_main(upstream, monkeypatch, capsys):
    seen, app = upstream
    _startup.add_command(app)
    monkeypatch.setattr(sys, "argv", ["automodel", "x.yaml"])
    assert app.main() == 7
    monkeypatch.setattr(sys, "argv", ["automodel", "finetune", "--config", "absent.yaml"])
    assert app.main() == 2
    assert seen == [["automodel", "x.yaml"]]
    assert capsys.readouterr().err.startswith("error: --config absent.yaml: ")


def test_every_command_has_a_module_with_help(capsys):
    for name, (_, text) in COMMANDS.items():
        with pytest.raises(SystemExit) as stop:
            cli.main([name, "--help"])
        assert stop.value.code == 0
        assert "usage: " in capsys.readouterr().out
        assert text


@pytest.mark.parametrize("words", [[], ["no-such-command"], ["doctor", "--verbos"], ["finetune"]])
def test_wrong_usage_ends_with_2(words, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert stop.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_full_disk_is_one_line(monkeypatch, capsys):
    def run(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/b4/x.safetensors")

    monkeypatch.setattr(cli, "run_command", run)
    assert cli.main(["doctor"]) == 1
    line = "error: No space left on device (runs/b4/x.safetensors); make room and run the same command again\n"
    assert capsys.readouterr().err == line


def test_a_rank_that_is_gone_is_one_line_and_worth_a_new_try(monkeypatch, capsys):
    def run(_):
        raise RunError("checking samples: a rank is gone\n(Ranks 2)")

    monkeypatch.setattr(cli, "run_command", run)
    assert cli.main(["doctor"]) == 1
    assert capsys.readouterr().err == "error: checking samples: a rank is gone (Ranks 2)\n"


def test_a_read_only_disk_is_one_line_and_not_worth_a_new_try(monkeypatch, capsys):
    def run(_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), "runs/b4")

    monkeypatch.setattr(cli, "run_command", run)
    assert cli.main(["doctor"]) == 2
    assert capsys.readouterr().err == "error: Read-only file system (runs/b4)\n"


def test_other_system_errors_keep_their_traceback(monkeypatch):
    def run(_):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(cli, "run_command", run)
    with pytest.raises(OSError, match="Input/output error"):
        cli.main(["doctor"])


def test_help_is_fast_and_imports_nothing_heavy():
    code = (
        "import sys, runpy; sys.argv = ['nemo-bard', '--help']\n"
        "try: runpy.run_module('nemo_bard.cli', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'transformers', 'nemo_automodel', 'hydra', 'numpy'} & sys.modules.keys()))"
    )
    start = time.perf_counter()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert time.perf_counter() - start < 5  # 0.05 s alone; the bound leaves room for a machine that is busy
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


# ---------------------------------------------------------------- overrides
@pytest.mark.parametrize(
    ("words", "pairs"),
    [
        (["a.b=c", "--d.e=f", "--g.h", "i"], [("a.b", "c"), ("d.e", "f"), ("g.h", "i")]),
        (["--lr", "-1", "--flag", "--x=1"], [("lr", "-1"), ("flag", "True"), ("x", "1")]),
        (["a=b=c", "a="], [("a", "b=c"), ("a", "")]),
    ],
)
def test_overrides(words, pairs):
    assert finetune.parse_overrides(words) == pairs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["word"], "unexpected argument 'word'"),
        (["-x", "1"], "unexpected argument '-x'"),
        (["--flag", "a.b=c"], "ambiguous: '--flag a.b=c'"),
    ],
)
def test_wrong_overrides(words, message):
    with pytest.raises(ValueError, match=message):
        finetune.parse_overrides(words)


def test_raw_config_reads_like_upstream(tmp_path, monkeypatch):
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    monkeypatch.setenv("DATA", "/data")
    path = tmp_path / "x.yaml"
    path.write_text("lr: 1e-3\ndata: {path: '${DATA}/x', workers: '${WORKERS,2}'}\nname: None\nbetas: [0.9, '0.95']\n")
    pairs = finetune.parse_overrides(["data.seed=3", "--optimizer.lr=2e-5", "--name", "run"])
    raw = finetune.load_raw_config(path, pairs)
    assert raw["data"] == {"path": "/data/x", "workers": 2, "seed": 3}
    assert raw["betas"] == [0.9, 0.95]
    config = parse_args_and_load_config(str(path), [f"--{key}={text}" for key, text in pairs])
    assert raw == config.to_yaml_dict(use_orig_values=False)


@pytest.mark.parametrize(
    ("text", "pairs", "message"),
    [
        ("[1]", [], "must hold a YAML mapping, got list"),
        ("a: {", [], "not a YAML file"),
        ("a: 1", [("a.b", "2")], "override a.b=2: a is 1 in .*, not a section"),
        ("a: ${NO_SUCH_VARIABLE}", [], "a: Environment variable 'NO_SUCH_VARIABLE' is not set"),
    ],
)
def test_wrong_config(tmp_path, text, pairs, message):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        finetune.load_raw_config(path, pairs)


# ---------------------------------------------------------------- recipe lookup
@pytest.fixture
def shipped(tmp_path, monkeypatch):
    folder = tmp_path / "shipped" / "recipes"
    (folder / "sub").mkdir(parents=True)
    for name in ("pbm.yaml", "sub/swd.yaml"):
        (folder / name).write_text("recipe: x\n")
    monkeypatch.setattr(paths, "recipes_dir", lambda: folder)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.mark.parametrize("name", ["pbm", "pbm.yaml", "recipes/pbm", "recipes/pbm.yaml"])
def test_shipped_recipe_by_name(shipped, name):
    assert paths.find_recipe(name) == shipped / "pbm.yaml"
    assert paths.find_recipe("recipes/sub/swd.yaml") == shipped / "sub/swd.yaml"


def test_existing_file_wins(shipped, tmp_path):
    (tmp_path / "pbm.yaml").write_text("recipe: mine\n")
    assert paths.find_recipe("pbm.yaml").read_text() == "recipe: mine\n"
    assert paths.find_recipe("pbm") == shipped / "pbm.yaml"


@pytest.mark.parametrize("name", ["pmb", "/recipes/pbm.yaml", ""])
def test_unknown_recipe(shipped, name):
    with pytest.raises(FileNotFoundError, match="shipped: pbm, sub/swd"):
        paths.find_recipe(name)


def test_this_checkout_has_recipes():
    assert paths.recipes_dir().name == "recipes"


def test_shipped_folder_of_a_wheel_and_of_neither(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "site-packages/nemo_bard")
    (tmp_path / "site-packages/recipes").mkdir(parents=True)  # somebody else's
    with pytest.raises(FileNotFoundError, match="has no recipes/"):
        paths.recipes_dir()
    inside = tmp_path / "site-packages/nemo_bard/recipes"
    inside.mkdir(parents=True)
    assert paths.recipes_dir() == inside


# ---------------------------------------------------------------- finetune
def test_recipe_gets_the_final_config(recipes):
    folder, log = recipes
    words = ["finetune", "-c", str(folder / "recipe.yaml"), "steps=5", "--optimizer.lr", "2e-5"]
    assert cli.main(words) == 0
    assert log.read_text() == '{"steps": 5, "lr": 2e-05}'


def test_validation_comes_before_the_recipe(recipes, capsys, monkeypatch):
    folder, log = recipes
    words = ["finetune", "--config", str(folder / "recipe.yaml"), "steps=-1", "--nproc-per-node=2"]
    assert cli.main(words) == 2
    assert capsys.readouterr().err == "error: steps must be >= 0, got -1\n"
    assert not log.exists()
    monkeypatch.setenv("NEMO_BARD_DEBUG", "1")
    with pytest.raises(ValueError, match="steps must be"):
        cli.main(words)


def test_pipeline_parses_its_own_overrides(recipes):
    folder, log = recipes
    words = ["finetune", "--config", str(folder / "pipeline.yaml"), "stage=pbm", "+x=1", "~y", "--nproc-per-node", "1"]
    assert cli.main(words) == 0
    assert log.read_text() == '[null, null, "stage=pbm", "+x=1", "~y"]\n'


def test_wrong_input_is_one_line_without_upstreams_report(recipes, capsys, monkeypatch):
    folder, _ = recipes
    words = ["finetune", "--config", str(folder / "failing.yaml")]
    assert cli.main(words) == 2
    captured = capsys.readouterr()
    assert captured.err == "error: a.jsonl:3: not JSON\n"
    assert "Traceback" not in captured.out
    monkeypatch.setenv("UNEXPECTED", "1")
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(words)
    assert "Instantiation failed for `open_data`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1", "recipe: must name a recipe class"),
        ("recipe: recorded_recipes.Absent", "recipe: cannot import recorded_recipes.Absent"),
        ("recipe: {_target_: no_such_module.Recipe}", "recipe: cannot import no_such_module.Recipe"),
        ("recipe: NoSuchRecipe", "Unknown recipe class 'NoSuchRecipe'"),
    ],
)
def test_wrong_recipe_key(recipes, capsys, text, message):
    path = recipes[0] / "wrong.yaml"
    path.write_text(text)
    assert cli.main(["finetune", "--config", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["recipe=x.Y"], "recipe: cannot be overridden"),
        (["--nproc-per-node", "0"], "--nproc-per-node must be "),
    ],
)
def test_wrong_finetune_arguments(recipes, capsys, words, message):
    assert cli.main(["finetune", "--config", str(recipes[0] / "recipe.yaml"), *words]) == 2
    assert message in capsys.readouterr().err


def test_process_count_under_torchrun(recipes, capsys, monkeypatch):
    folder, log = recipes
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    words = ["finetune", "--config", str(folder / "pipeline.yaml")]
    assert cli.main([*words, "--nproc-per-node=3"]) == 2
    assert "error: [rank 0] --nproc-per-node 3: torchrun started 2 processes here" in capsys.readouterr().err
    assert cli.main([*words, "--nproc-per-node=2"]) == 0
    assert log.read_text() == '["0", "2"]\n'


@pytest.mark.slow
def test_two_processes(recipes):
    folder, log = recipes
    words = [sys.executable, "-m", "nemo_bard.cli", "finetune", "--config", str(folder / "pipeline.yaml")]
    words += ["--nproc-per-node=2"]
    result = subprocess.run([*words, "stage=pbm"], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert sorted(log.read_text().splitlines()) == ['["0", "2", "stage=pbm"]', '["1", "2", "stage=pbm"]']
    result = subprocess.run([*words, "fail=yes"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "error: [rank 0] fail: must be no" in result.stderr or "error: [rank 1] fail: must be no" in result.stderr
    assert "Traceback" not in result.stderr
