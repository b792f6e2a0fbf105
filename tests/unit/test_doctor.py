"""Each check of ``nemo-bard doctor`` finds what it is for and names a repair."""

import json
from importlib import metadata

import pytest

from nemo_bard.cli import installation as doctor
from nemo_bard.cli.app import main


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
    monkeypatch.setattr(doctor, "installed_version", versions.get)
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
    monkeypatch.setattr(doctor, "installed_version", {"torch": "2.12.1"}.get)
    assert [check.state for check in doctor.check_requirements("nemo-bard")] == [doctor.OK]


def test_entry_point_missing(monkeypatch):
    monkeypatch.setattr(metadata, "entry_points", lambda group: metadata.EntryPoints())
    check = doctor.check_entry_point()
    assert (check.state, check.repair) == (doctor.BROKEN, doctor.REINSTALL)


def test_import_that_fails_becomes_a_finding(monkeypatch):
    def fail(_):
        raise RuntimeError("triton 3.9\nis too new")

    monkeypatch.setattr(doctor.importlib, "import_module", fail)
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
