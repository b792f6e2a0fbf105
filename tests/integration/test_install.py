"""Wheels and editable wheels, by pip and by uv, beside a package that owns a script of the same name.

The neighbour is a stand-in for nemo-automodel with the same module, function and scripts; so no index is needed and an
environment takes a second to fill.
"""

import email
import shutil
import subprocess
import sys
import timeit
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[2]
PTH = "nemo_bard_automodel.pth"
UPSTREAM_SETUP = """
from setuptools import setup
setup(name="nemo-automodel", version="{version}", packages=["nemo_automodel", "nemo_automodel.cli"],
      entry_points={{"console_scripts": ["automodel = nemo_automodel.cli.app:main", "am = nemo_automodel.cli.app:main"]}})
"""
UPSTREAM_APP = "import sys\n\ndef main():\n    print('upstream {version}', *sys.argv[1:])\n    return 5\n"


def check_output(*command, cwd=None):
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, cwd=cwd)
    assert result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
    return result.stdout


def build(project, hook, out):
    """Build with the setuptools of this environment, as pip does without build isolation."""
    code = f"from setuptools import build_meta; print(build_meta.{hook}({str(out)!r}))"
    return out / check_output(sys.executable, "-c", code, cwd=project).splitlines()[-1]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of what a build reads, without leftovers of earlier builds."""
    folder = tmp_path_factory.mktemp("project")
    for name in (
        "setup.py",
        "pyproject.toml",
        "MANIFEST.in",
        "LICENSE",
        "README.md",
        "CHANGELOG.md",
        "constraints.txt",
    ):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, folder)
    for name in ("nemo_bard", "recipes", "conf"):
        if (ROOT / name).exists():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


@pytest.fixture(scope="module")
def wheels(project, tmp_path_factory):
    """Paths of built wheels: ours as ``wheel`` and ``editable``, the neighbour by version."""
    out = tmp_path_factory.mktemp("wheels")
    built = {}
    for kind, hook in (("wheel", "build_wheel"), ("editable", "build_editable")):
        (out / kind).mkdir()
        built[kind] = build(project, hook, out / kind)
    for version in ("0.7.0", "0.7.1"):
        folder = tmp_path_factory.mktemp("upstream")
        (folder / "nemo_automodel/cli").mkdir(parents=True)
        (folder / "setup.py").write_text(UPSTREAM_SETUP.format(version=version))
        (folder / "nemo_automodel/__init__.py").touch()
        (folder / "nemo_automodel/cli/__init__.py").touch()
        (folder / "nemo_automodel/cli/app.py").write_text(UPSTREAM_APP.format(version=version))
        built[version] = build(folder, "build_wheel", out)
    return built


class Environment:
    """A fresh virtual environment and the installer that fills it."""

    def __init__(self, folder, installer):
        self.folder, self.installer = folder, installer
        self.python = folder / "bin/python"
        if installer == "uv":
            check_output("uv", "venv", "--offline", "--python", sys.executable, folder)
        else:
            check_output(sys.executable, "-m", "venv", folder)
        (self.packages,) = folder.glob("lib/python*/site-packages")

    def pip(self, action, *words):
        if self.installer == "uv":
            flags = ["--offline"] if action == "install" else []
            check_output("uv", "pip", action, "--python", self.python, *flags, *words)
        else:
            flags = ["--no-index", "--disable-pip-version-check"] if action == "install" else ["--yes"]
            check_output(self.python, "-m", "pip", action, *flags, *words)

    def install(self, *wheels):
        again = "--reinstall" if self.installer == "uv" else "--force-reinstall"
        self.pip("install", "--no-deps", again, *wheels)

    def run(self, *words):
        command = [str(self.folder / "bin" / words[0]), *words[1:]]
        return subprocess.run(command, capture_output=True, text=True, check=False, cwd=self.folder)

    def assert_both_work(self, version):
        """``finetune`` is ours, everything else the neighbour's, whoever owns the scripts."""
        for script in ("automodel", "am"):
            ours = self.run(script, "finetune", "--config", "absent")
            assert (ours.returncode, ours.stdout) == (2, ""), ours.stderr
            assert ours.stderr.startswith("error: --config absent: no such file or shipped recipe")
            theirs = self.run(script, "x.yaml", "finetune")
            assert (theirs.returncode, theirs.stdout) == (5, f"upstream {version} x.yaml finetune\n"), theirs.stderr


@pytest.fixture(params=["pip", "uv"])
def environment(request, tmp_path):
    if request.param == "uv" and shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    return Environment(tmp_path / "env", request.param)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_any_order_of_installation(environment, wheels, kind):
    ours, old, new = wheels[kind], wheels["0.7.0"], wheels["0.7.1"]
    environment.install(ours, old)  # both at once
    environment.assert_both_work("0.7.0")
    environment.install(new)  # an upgrade takes the script over
    assert "nemo_automodel" in (environment.folder / "bin/automodel").read_text()
    environment.assert_both_work("0.7.1")
    environment.install(ours)
    assert "nemo_bard" in (environment.folder / "bin/automodel").read_text()
    environment.assert_both_work("0.7.1")
    environment.install(old)
    environment.pip("uninstall", "nemo-bard")
    assert not (environment.packages / PTH).exists()
    environment.install(old)
    theirs = environment.run("automodel", "finetune")
    assert (theirs.returncode, theirs.stdout, theirs.stderr) == (5, "upstream 0.7.0 finetune\n", "")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_shipped_files_are_found(wheels, project, tmp_path, kind):
    environment = Environment(tmp_path / "env", "pip")
    environment.install(wheels[kind])
    code = "from nemo_bard import paths; print(*paths.shipped_recipes())"
    expected = {p.relative_to(ROOT / "recipes").with_suffix("").as_posix() for p in (ROOT / "recipes").rglob("*.yaml")}
    assert set(environment.run("python", "-c", code).stdout.split()) == expected
    inside = environment.packages / "nemo_bard/recipes"
    assert inside.is_dir() == (kind == "wheel" and bool(expected))
    for words in (["nemo-bard"], ["python", "-m", "nemo_bard.cli"]):
        result = environment.run(*words, "--version")
        assert result.stdout.startswith("nemo-bard "), result.stderr
    without_site = environment.run(
        "python", "-S", "-c", f"import sys; sys.path.append({str(project)!r}); import nemo_bard.cli"
    )
    assert without_site.returncode == 0, without_site.stderr


# ---------------------------------------------------------------- the hook itself
@pytest.fixture
def hook_line():
    (line,) = (ROOT / "nemo_bard" / PTH).read_text().splitlines()
    return line


def run_line(line, path, *words):
    """Run the line as ``site`` does, in a fresh interpreter that sees only ``path``."""
    code = f"exec({line!r}); import sys; print(len(sys.meta_path))"  # -c puts the working directory on sys.path
    command = [sys.executable, "-S", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=path)


def test_hook_costs_less_than_a_millisecond(hook_line):
    assert hook_line.startswith("import ")  # what makes site run a line of a .pth file
    assert "finetune" not in sys.orig_argv
    runs = 200
    seconds = min(timeit.repeat(lambda: exec(hook_line), number=runs, repeat=5)) / runs
    assert seconds < 1e-3  # about 1e-5


def test_hook_acts_only_on_the_word(hook_line):
    plain = run_line(hook_line, ROOT)
    hooked = run_line(hook_line, ROOT, "finetune")
    assert (plain.returncode, hooked.returncode) == (0, 0), hooked.stderr
    assert int(hooked.stdout) > int(plain.stdout)


def test_hook_passes_over_a_missing_package(hook_line, tmp_path):
    result = run_line(hook_line, tmp_path, "finetune")
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize("text", ["raise RuntimeError('broken')", "def install(:", "import sys", "1 / 0"])
def test_hook_never_stops_python(hook_line, tmp_path, text):
    (tmp_path / "nemo_bard/cli").mkdir(parents=True)
    (tmp_path / "nemo_bard/__init__.py").touch()
    (tmp_path / "nemo_bard/cli/__init__.py").touch()
    (tmp_path / "nemo_bard/cli/startup.py").write_text(text)
    result = run_line(hook_line, tmp_path, "finetune")
    assert result.returncode == 0
    assert result.stdout
    assert result.stderr.startswith("nemo_bard: cannot add the command finetune to automodel:")
    assert result.stderr.count("\n") == 1


@pytest.fixture(scope="module")
def metadata(wheels):
    with zipfile.ZipFile(wheels["wheel"]) as wheel:
        (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        return email.message_from_bytes(wheel.read(name))


def test_what_a_wheel_requires(metadata):
    """What the package imports is required, not an extra; extras of earlier versions stay as names."""
    lines = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    plain = {line.name: str(line.specifier) for line in lines if line.marker is None or "extra" not in str(line.marker)}
    assert {"av", "megatron-core", "omegaconf", "qwen-vl-utils", "hydra-core"} <= plain.keys()
    assert plain["nemo-automodel"] == "<0.8,>=0.7"
    assert plain["av"] == "", "another package of the same environment may need an old one"
    assert {"demo", "dev", "mixture", "mlflow", "serve", "video", "wandb"} <= set(metadata.get_all("Provides-Extra"))


def test_constraints_name_every_requirement(metadata):
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {Requirement(line).name for line in metadata.get_all("Requires-Dist")} <= pinned
