"""Checks of an installation, each with its repair; ``nemo-bard doctor`` prints them."""

from __future__ import annotations

import importlib
import platform
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from nemo_bard import __version__
from nemo_bard.base.names import CONFIG_CLASS, MODEL_CLASS, MODEL_TYPE
from nemo_bard.cli import serving_checks
from nemo_bard.cli.findings import (
    BROKEN,
    OK,
    OPTIONAL,
    WARNING,
    Check,
    check_requirements,
    installed_version,
    one_line,
)
from nemo_bard.upstream import automodel
from nemo_bard.upstream import vllm as installed

DISTRIBUTION = "nemo-bard"
HOOK_FILE = "nemo_bard_automodel.pth"
ENTRY_POINT_GROUP = "nemo_automodel.architectures"
REINSTALL = f"pip install --force-reinstall --no-deps {DISTRIBUTION}"
NO_TRAINING = "not here: NeMo AutoModel cannot be beside vLLM; training needs an environment of its own"
REPORTED = (
    "torch",
    "torchvision",
    "transformers",
    "nemo-automodel",
    "triton",
    "hydra-core",
    "omegaconf",
    "megatron-core",
    "qwen-vl-utils",
    "av",
)
SHARED = ("torch", "torchvision", "transformers")
"""Of these, what serving needs too."""


def run_checks() -> Iterator[Check]:
    """Yield the checks in order, cheap ones first; the last ones import torch, transformers, NeMo AutoModel and vLLM.

    Where vLLM is, NeMo AutoModel cannot be: such an environment only serves, and is checked for that.
    """
    serves = installed.distribution() is not None
    trains = installed_version("nemo-automodel") is not None or not serves
    yield from check_versions(REPORTED if trains else SHARED)
    if trains:
        yield from check_requirements(DISTRIBUTION)
        yield from check_requirements("nemo-automodel")
    yield from check_shipped_files()
    if trains:
        yield check_entry_point()
        hook = check_hook()
        yield hook
        yield check_script(hook_works=hook.state == OK)
    yield check_devices()
    yield check_config_registered()
    if trains:
        yield check_architecture_registered()
    else:
        yield Check("training", OK, NO_TRAINING)
    if serves:
        yield from serving_checks.run_checks()
    else:
        yield Check("vllm", OK, f"not installed (optional, and not beside NeMo AutoModel: {installed.INSTALL})")


def check_versions(reported: Sequence[str] = REPORTED) -> Iterator[Check]:
    """Yield the versions of Python, this package and the distributions ``reported``, which it stands on."""
    yield Check("python", OK, f"{platform.python_version()} ({sys.executable})")
    version = installed_version(DISTRIBUTION)
    where = Path(__file__).parents[1]
    if version is None:
        yield Check(
            DISTRIBUTION, BROKEN, f"{__version__} in {where} is not installed", f"pip install -e {where.parent}"
        )
    elif version != __version__:
        finding = f"{version} is installed, but {__version__} is imported from {where}"
        yield Check(DISTRIBUTION, BROKEN, finding, f"{REINSTALL} (a checkout: pip install -e .)")
    else:
        yield Check(DISTRIBUTION, OK, f"{version} ({where})")
    for name in reported:
        version = installed_version(name)
        if version is not None:
            yield Check(name, OK, version)
        elif name in OPTIONAL:
            yield Check(name, OK, f"not installed (optional; {OPTIONAL[name]})")
        else:
            yield Check(name, BROKEN, "not installed", f"pip install {name}")


def check_shipped_files() -> Iterator[Check]:
    """Yield whether the shipped recipes are found."""
    from nemo_bard.base.paths import shipped_recipes

    try:
        names = list(shipped_recipes())
    except FileNotFoundError as error:
        yield Check("recipes", BROKEN, str(error), REINSTALL)
    else:
        state, repair = (OK, "") if names else (BROKEN, REINSTALL)
        yield Check("recipes", state, ", ".join(names) or "none", repair)


def check_entry_point() -> Check:
    """Check that NeMo AutoModel finds our model class by the installed metadata."""
    found = {point.name: point.value for point in metadata.entry_points(group=ENTRY_POINT_GROUP)}
    if MODEL_CLASS in found:
        return Check("entry point", OK, f"{MODEL_CLASS} = {found[MODEL_CLASS]}")
    return Check("entry point", BROKEN, f"{ENTRY_POINT_GROUP} has no {MODEL_CLASS}", REINSTALL)


def site_dirs() -> list[Path]:
    """Return the folders whose ``.pth`` files this interpreter reads."""
    user = [site.getusersitepackages()] if site.ENABLE_USER_SITE else []
    paths = [sysconfig.get_path("purelib"), *site.getsitepackages(), *user]
    return [Path(path) for path in dict.fromkeys(paths)]


def check_hook() -> Check:
    """Check that a fresh interpreter called with ``finetune`` gets the start-up hook."""
    files = [folder / HOOK_FILE for folder in site_dirs() if (folder / HOOK_FILE).is_file()]
    name = "start-up hook"
    if not files:
        return Check(name, BROKEN, f"no {HOOK_FILE} in {', '.join(map(str, site_dirs()))}", REINSTALL)
    probe = "import sys; sys.exit(not any(type(f).__module__ == 'nemo_bard.cli.startup' for f in sys.meta_path))"
    command = [sys.executable, "-c", probe, "finetune"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=sysconfig.get_path("purelib"))
    if result.returncode != 0:
        last = (result.stderr.strip().splitlines() or ["nothing was printed"])[-1]
        return Check(name, BROKEN, f"{files[0]} has no effect: {last}", REINSTALL)
    return Check(name, OK, str(files[0]))


def script_owner(script: Path) -> str:
    """Return which package an ``automodel`` script runs: ``nemo-bard``, ``nemo-automodel`` or ``unknown``."""
    text = script.read_bytes()[:4096].decode("utf-8", errors="replace")
    if "nemo_bard.cli" in text:
        return DISTRIBUTION
    return "nemo-automodel" if "nemo_automodel" in text else "unknown"


def check_script(*, hook_works: bool) -> Check:
    """Check who owns the ``automodel`` that a shell finds, and that its ``finetune`` is ours."""
    name, own_folder = "automodel script", Path(sysconfig.get_path("scripts"))
    on_path = shutil.which("automodel")
    if on_path is None:
        if (own_folder / "automodel").is_file():
            return Check(name, WARNING, f"{own_folder} is not on PATH", f'export PATH="{own_folder}:$PATH"')
        return Check(name, BROKEN, "there is none on PATH", f"{REINSTALL}, or use python -m nemo_bard.cli")
    script = Path(on_path)
    owner = script_owner(script)
    finding = f"{script}, owned by {owner}"
    if script.parent.resolve() != own_folder.resolve():
        repair = f'export PATH="{own_folder}:$PATH", or use {sys.executable} -m nemo_bard.cli'
        return Check(name, WARNING, f"{finding}, belongs to another environment than {sys.prefix}", repair)
    if owner == DISTRIBUTION:
        return Check(name, OK, finding)
    if owner == "nemo-automodel" and hook_works:
        return Check(name, OK, f"{finding}; the start-up hook adds finetune")
    return Check(name, BROKEN, f"{finding}; it has no finetune", f"{REINSTALL}, or use python -m nemo_bard.cli")


def check_devices() -> Check:
    """Check that torch can be imported, and list the devices it sees."""
    try:
        import torch
    except Exception as error:  # an import may fail with anything; it becomes the finding
        return Check("devices", BROKEN, f"import torch fails: {one_line(error)}", "pip install --force-reinstall torch")
    count = torch.cuda.device_count()
    if count:
        names = ", ".join(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(count))
        return Check("devices", OK, f"{names} (CUDA {torch.version.cuda})")
    build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
    return Check("devices", OK, f"cpu only, {torch.get_num_threads()} threads; torch is {build} and sees no GPU")


def check_config_registered() -> Check:
    """Check that transformers knows the model type."""
    try:
        from transformers import AutoConfig

        kind = type(AutoConfig.for_model(MODEL_TYPE)).__name__
    except Exception as error:  # an import may fail with anything; it becomes the finding
        return Check(
            "config", BROKEN, f"transformers cannot make a {MODEL_TYPE!r} config: {one_line(error)}", REINSTALL
        )
    if kind != CONFIG_CLASS:
        return Check("config", BROKEN, f"{MODEL_TYPE!r} is {kind}, not {CONFIG_CLASS}", "uninstall what registers it")
    return Check("config", OK, f"{MODEL_TYPE!r} is {kind}")


def check_architecture_registered() -> Check:
    """Check that NeMo AutoModel can be imported and resolves the architecture to our class."""
    name = "architecture"
    try:
        found = automodel.model_class_of(MODEL_CLASS)
        module = importlib.import_module("nemo_bard.model.modeling")
    except KeyError:
        return Check(name, BROKEN, f"NeMo AutoModel does not know {MODEL_CLASS}", REINSTALL)
    except Exception as error:  # an import may fail with anything; it becomes the finding
        repair = "repair the requirements named above, or pip install -c constraints.txt nemo-bard"
        return Check(name, BROKEN, f"import of NeMo AutoModel fails: {one_line(error)}", repair)
    if found is not getattr(module, MODEL_CLASS):
        return Check(name, BROKEN, f"{MODEL_CLASS} is {found}", "uninstall what registers it")
    return Check(name, OK, f"{MODEL_CLASS} is known to NeMo AutoModel")
