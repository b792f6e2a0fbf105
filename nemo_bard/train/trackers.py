"""Weights & Biases and MLflow: checked before the run, gone on with when the run goes on, told when it fails.

AutoModel starts them on the first rank and hands them what it logs. It keeps MLflow's run in ``checkpoint_dir`` and goes on
in it; W&B would get a new run with every start.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.base.files import write_text
from nemo_bard.base.settings import check_keys
from nemo_bard.upstream.sections import wandb_keys

TRACKERS = ("wandb", "mlflow")
"""Sections of a recipe, packages and extras of ours have the same names."""
NAMES = {"wandb": "name", "mlflow": "run_name"}
"""Tracker -> its key for the name of a run."""
WANDB_RUN = "wandb_run_id"
"""File in ``checkpoint_dir``, beside upstream's ``mlflow_run_id``."""


def check_trackers(raw: Mapping[str, Any]) -> None:
    """Check that the trackers of a recipe are installed, and what W&B is asked for.

    Args:
        raw: The recipe as plain dictionaries.

    Raises:
        ValueError: One line that names the key, or what to install.
    """
    for name in TRACKERS:
        section = raw.get(name)
        if not section:
            continue
        if not isinstance(section, Mapping):
            raise ValueError(f"{name} must be a section of keys, got {section!r}")
        if section.get("enable") is False:
            continue
        if name not in sys.modules and importlib.util.find_spec(name) is None:
            raise ValueError(f"{name}: the package {name} is not installed; pip install 'nemo-bard[{name}]'")
        if name == "wandb" and (known := wandb_keys()):
            check_keys("wandb", section, known)


def prepare(config: Any, folder: Path) -> None:
    """Name the runs after the folder that they write to, and let W&B go on in the run that wrote to it before.

    Both are left alone where the recipe says something else, the latter where the environment does.

    Args:
        config: The recipe's configuration, before anything has read its sections ``wandb`` and ``mlflow``.
        folder: ``checkpoint_dir``.
    """
    name = folder.parent.name if folder.name == "checkpoints" else folder.name
    for tracker, key in NAMES.items():
        section = config.get(tracker, None)
        if not section:
            continue
        values = section.to_dict() if hasattr(section, "to_dict") else dict(section)
        values[key] = values.get(key) or name
        file = folder / WANDB_RUN
        asked = {values.get("id"), values.get("resume"), os.environ.get("WANDB_RUN_ID")} != {None}
        if tracker == "wandb" and file.is_file() and not asked:
            values |= {"id": file.read_text(encoding="utf-8").strip(), "resume": "allow"}
        config.set_by_dotted(tracker, values)


def note_run(folder: Path) -> None:
    """Write down which run W&B has started in this process, if any; call it on the first rank."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    if run is not None and isinstance(run_id := getattr(run, "id", None), str):
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / WANDB_RUN, run_id + "\n")


def send(metrics: Mapping[str, Any], step: int, *, prefix: str = "") -> None:
    """Send metrics to the runs of this process.

    Args:
        metrics: Numbers by name; one that has the prefix already keeps its name. ``lr`` and ``mem`` are training's.
        step: The optimizer step.
        prefix: Begins the names.
    """
    named = {
        name if name.startswith(prefix) else prefix + name: float(value)
        for name, value in metrics.items()
        if name not in ("lr", "mem")
    }
    wandb, mlflow = (sys.modules.get(name) for name in TRACKERS)
    if getattr(wandb, "run", None) is not None:
        assert wandb is not None
        wandb.log(named, step=step)
    if mlflow is not None and mlflow.active_run() is not None:
        mlflow.log_metrics(named, step=step)


@contextlib.contextmanager
def failures_told() -> Iterator[None]:
    """Mark the runs as failed if something is raised inside, whoever catches it; a tracker's own errors become one line.

    Raises:
        ValueError: For an error of a tracker, such as a server that refuses.
    """
    try:
        yield
    except BaseException as error:
        end_runs(failed=True)
        name = type(error).__module__.partition(".")[0]
        if name in TRACKERS:
            raise ValueError(f"{name}: {one_line(error)}") from error
        raise


def end_runs(*, failed: bool = False) -> None:
    """End the runs of this process.

    Args:
        failed: Whether they count as failed.
    """
    wandb, mlflow = (sys.modules.get(name) for name in TRACKERS)
    if getattr(wandb, "run", None) is not None:
        assert wandb is not None
        wandb.finish(exit_code=1 if failed else 0)
    if mlflow is not None and mlflow.active_run() is not None:
        mlflow.end_run(status="FAILED" if failed else "FINISHED")
