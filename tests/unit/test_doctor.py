"""Each check of ``nemo-bard doctor`` finds what it is for and names a repair."""

import json
import sys
from importlib import metadata

import pytest

from nemo_bard.cli import app, findings, serving_checks
from nemo_bard.cli import installation as doctor
from nemo_bard.cli.app import main
from nemo_bard.upstream import vllm as installed


@pytest.fixture
def environment(tmp_path, monkeypatch):
    """An environment made of folders: site-packages with a hook file, scripts on PATH."""
    scripts, packages = tmp_path / "bin", tmp_path / "site-packages"
    scripts.mkdir()
    packages.mkdir()
    paths = {"scripts": str(scripts), "purelib": str(packages)}
    monkeypatch.setattr(doctor.sysconfig, "get_path", paths.__getitem__)
    monkeypatch.setattr(doctor.site, "getsitepackages", lambda: [str(packages)])
    monkeypatch.setattr(doctor.site, "ENABLE_USER_SITE", False)
    monkeypatch.setenv("PATH", str(scripts))
    return scripts, packages


def write_script(folder, text):
    script = folder / "automodel"
    script.write_text(f"#!/usr/bin/python\n{text}\n")
    script.chmod(0o755)
    return script


OURS, UPSTREAM = "from nemo_bard.cli.app import automodel", "from nemo_automodel.cli.app import main"


@pytest.mark.parametrize(
    ("script", "hook_works", "state"),
    [
        (OURS, True, doctor.OK),
        (OURS, False, doctor.OK),
        (UPSTREAM, True, doctor.OK),
        (UPSTREAM, False, doctor.BROKEN),
        ("import other", True, doctor.BROKEN),
    ],
)
def test_script_owner(environment, script, hook_works, state):
    write_script(environment[0], script)
    check = doctor.check_script(hook_works=hook_works)
    assert check.state == state
    assert bool(check.repair) == (state != doctor.OK)


def test_script_missing_or_elsewhere(environment, tmp_path, monkeypatch):
    assert doctor.check_script(hook_works=True).state == doctor.BROKEN
    other = tmp_path / "other"
    other.mkdir()
    write_script(other, OURS)
    monkeypatch.setenv("PATH", str(other))
    check = doctor.check_script(hook_works=True)
    assert check.state == doctor.WARNING
    assert "another environment" in check.finding


def test_hook_file_missing(environment):
    check = doctor.check_hook()
    assert (check.state, check.repair) == (doctor.BROKEN, doctor.REINSTALL)
    assert doctor.HOOK_FILE in check.finding


def test_requirement_violated(monkeypatch):
    lines = ["triton<3.9", "torch>=2.8", "absent-package>=1", "wandb; extra == 'wandb'"]
    versions = {"triton": "3.9.0", "torch": "2.12.1"}
    monkeypatch.setattr(metadata, "requires", lambda _: lines)
    monkeypatch.setattr(findings, "installed_version", versions.get)
    checks = list(doctor.check_requirements("nemo-bard"))
    assert [check.finding for check in checks] == [
        "triton<3.9, but 3.9.0 is installed",
        "absent-package>=1 is not installed",
    ]
    assert checks[0].repair == "pip install 'triton<3.9'"


def test_what_is_required_is_reported_as_broken_where_it_is_missing(monkeypatch):
    versions = {"nemo-bard": doctor.__version__, "torch": "2.12.1", "torchvision": "0.27"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    states = {check.name: check for check in doctor.check_versions()}
    for name in ("megatron-core", "omegaconf", "qwen-vl-utils", "av"):
        assert (states[name].state, states[name].repair) == (doctor.BROKEN, f"pip install {name}")
    assert states["triton"].state == doctor.OK


def test_requirements_met(monkeypatch):
    monkeypatch.setattr(metadata, "requires", lambda _: ["torch>=2.8"])
    monkeypatch.setattr(findings, "installed_version", {"torch": "2.12.1"}.get)
    assert [check.state for check in doctor.check_requirements("nemo-bard")] == [doctor.OK]


def test_entry_point_missing(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints())
    check = doctor.check_entry_point()
    assert (check.state, check.repair) == (doctor.BROKEN, doctor.REINSTALL)


def test_import_that_fails_becomes_a_finding(monkeypatch):
    def fail(*_):
        raise RuntimeError("triton 3.9\nis too new")

    monkeypatch.setattr(doctor.automodel, "model_class_of", fail)
    check = doctor.check_architecture_registered()
    assert check.state == doctor.BROKEN
    assert "RuntimeError: triton 3.9 is too new" in check.finding


@pytest.mark.parametrize(("state", "code"), [(doctor.OK, 0), (doctor.WARNING, 0), (doctor.BROKEN, 1)])
def test_exit_code_and_json(monkeypatch, capsys, state, code):
    monkeypatch.setattr(
        "nemo_bard.cli.commands.doctor.logging.disable", lambda _: None
    )  # the test process goes on logging
    monkeypatch.setattr(doctor, "run_checks", lambda: iter([doctor.Check("hook", state, "found", "do this")]))
    assert main(["doctor"]) == code
    text = capsys.readouterr().out
    assert "hook: found" in text
    assert "repair: do this" in text
    assert main(["doctor", "--json"]) == code
    report = json.loads(capsys.readouterr().out)
    assert report == {
        "ok": code == 0,
        "checks": [{"name": "hook", "state": state, "finding": "found", "repair": "do this"}],
    }


@pytest.fixture
def beside_vllm(monkeypatch):
    """vLLM is here, and with it our plugin; NeMo AutoModel is not."""
    point = metadata.EntryPoint("bard_vl", "nemo_bard.serving.vllm:register", installed.PLUGIN_GROUP)
    monkeypatch.setattr(metadata, "entry_points", lambda **which: metadata.EntryPoints([point]).select(**which))
    monkeypatch.setattr(installed, "distribution", lambda: "vllm")
    monkeypatch.setattr(installed, "installed_version", lambda: "0.32.1+cpu")
    versions = {"nemo-bard": doctor.__version__, "torch": "2.13.0", "torchvision": "0.28.0", "transformers": "5.18.0"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    monkeypatch.delenv(serving_checks.FILTER, raising=False)
    return monkeypatch


def test_beside_vllm_only_serving_is_checked(beside_vllm):
    beside_vllm.setattr(metadata, "requires", lambda name: ["torch>=2.8", "hydra-core>=99"] if "bard" in name else [])
    beside_vllm.setattr(serving_checks, "check_architecture", lambda: doctor.Check("vllm architecture", doctor.OK, ""))
    checks = {check.name: check for check in doctor.run_checks()}
    assert [check for check in checks.values() if check.state != doctor.OK] == []
    assert {"vllm", "vllm plugin", "vllm architecture", "training"} <= set(checks)
    assert not {"nemo-automodel", "start-up hook", "automodel script", "architecture"} & set(checks)


@pytest.mark.parametrize(
    ("version", "state"), [("0.32.0", "ok"), ("0.33.0", "broken"), ("0.31.2", "broken"), ("x", "broken")]
)
def test_vllm_of_another_version(beside_vllm, version, state):
    beside_vllm.setattr(installed, "installed_version", lambda: version)
    check = serving_checks.check_version()
    assert check.state == state
    assert version in check.finding
    assert ("vllm==0.32.*" in check.repair) == (state == "broken")


def test_plugin_missing_or_left_out(beside_vllm):
    assert serving_checks.check_plugin().state == doctor.OK
    beside_vllm.setenv(serving_checks.FILTER, "other,bard_vl")
    assert serving_checks.check_plugin().state == doctor.OK
    beside_vllm.setenv(serving_checks.FILTER, "other")
    assert serving_checks.check_plugin().repair == "unset VLLM_PLUGINS"
    beside_vllm.setattr(metadata, "entry_points", lambda **_: metadata.EntryPoints())
    assert "pip install" in serving_checks.check_plugin().repair


def test_plugin_that_cannot_be_loaded_is_a_finding(beside_vllm):
    beside_vllm.setitem(sys.modules, "vllm", None)
    check = serving_checks.check_architecture()
    assert check.state == doctor.BROKEN
    assert "cannot be loaded" in check.finding


def test_without_vllm_one_line_says_how(monkeypatch):
    monkeypatch.setattr(installed, "distribution", lambda: None)
    for name in ("check_versions", "check_requirements", "check_shipped_files"):
        monkeypatch.setattr(doctor, name, lambda *_: iter(()))
    last = list(doctor.run_checks())[-1]
    assert (last.name, last.state) == ("vllm", doctor.OK)
    assert "pip install --no-deps nemo-bard" in last.finding


def test_a_command_beside_vllm_says_what_is_missing(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "nemo_automodel", None)
    monkeypatch.setitem(sys.modules, "nemo_automodel.cli.app", None)
    monkeypatch.setattr(app.importlib.util, "find_spec", lambda name: None)
    assert main([str(tmp_path / "recipe.yaml")]) == 1
    assert capsys.readouterr().err == (
        "error: this needs nemo_automodel, which is not installed here; nemo-bard doctor says what is missing\n"
    )
    with pytest.raises(ModuleNotFoundError):
        app.say_missing(ModuleNotFoundError("no", name="nemo_bard.gone"))
