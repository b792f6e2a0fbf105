"""How far a run directory is, told from its files alone."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_bard.base.files import is_locked, ran_here, read_json
from nemo_bard.launch.slurm import find_job
from nemo_bard.pipeline import manifest
from nemo_bard.report.run import duration

STALE_SECONDS = 300.0
FRESH_SECONDS = 60.0
"""A run on another machine, whose lock may not be seen here, is taken to go on if its progress is as young as this."""


@dataclass(frozen=True, kw_only=True)
class StageStatus:
    """One stage."""

    name: str
    state: str
    """``finished``, ``running``, ``stopped`` (begun, and no run is going on), ``unknown`` (begun), or ``waiting``."""
    steps: int | None = None
    max_steps: int | None = None
    loss: float | None = None
    eta_seconds: float | None = None
    age_seconds: float | None = None
    """Since progress was last written."""
    seconds: float | None = None
    evaluation: dict[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """A run directory."""

    pipeline: str
    stages: list[StageStatus]
    running: bool | None
    """Whether a process holds the run directory, or has just written its progress from another machine; None if it has
    not, and the file system has no locks."""
    reported: bool
    job: str | None = None
    """Number of the newest Slurm job."""
    queue: str | None = None
    """What the queue says of it (``PENDING (Resources)``); None if it is not there."""

    @property
    def complete(self) -> bool:
        """Whether all stages are finished and the report is written."""
        return self.reported and all(stage.state == "finished" for stage in self.stages)

    @property
    def needs_resume(self) -> bool | None:
        """Whether the command has to be run again; None if nobody can tell."""
        if self.complete or self.running or self.queue is not None:
            return False
        return None if self.running is None else True


def read_status(run_dir: Path) -> RunStatus:
    """Read a run directory.

    Raises:
        ValueError: If it is no run of a pipeline.
    """
    identity = read_json(run_dir / manifest.IDENTITY)
    if identity is None:
        raise ValueError(f"{run_dir} is no run directory of a pipeline: it has no {manifest.IDENTITY}")
    config = (
        yaml.safe_load((run_dir / manifest.COMPOSED).read_text()) if (run_dir / manifest.COMPOSED).is_file() else {}
    )
    outputs = {name: section.get("output") or name for name, section in (config.get("stage") or {}).items()}
    folders = {name: run_dir / outputs.get(name, name) for name in identity["stages"]}
    written = [file.stat().st_mtime for folder in folders.values() if (file := folder / manifest.PROGRESS).is_file()]
    running = is_locked(run_dir)
    if not running and (running is None or not ran_here(run_dir)):
        fresh = time.time() - max(written, default=0.0) < FRESH_SECONDS
        running = fresh or (None if running is None else False)
    job, queue = _find_job(run_dir, config)
    if queue is not None and queue.split()[0] in ("RUNNING", "COMPLETING"):
        running = True
    stages = [_read_stage(name, folder, running) for name, folder in folders.items()]
    return RunStatus(
        pipeline=identity["pipeline"],
        stages=stages,
        running=running,
        reported=(run_dir / "report.html").is_file(),
        job=job,
        queue=queue,
    )


def _find_job(run_dir: Path, config: Mapping[str, Any]) -> tuple[str | None, str | None]:
    folder = (config.get("launch") or {}).get("folder")
    for place in (run_dir / "slurm", *([] if folder is None else [Path(folder)])):
        if (found := find_job(place)) is not None:
            return found
    return None, None


def _read_stage(name: str, folder: Path, running: bool | None) -> StageStatus:
    record, progress = read_json(folder / manifest.MANIFEST), read_json(folder / manifest.PROGRESS) or {}
    known = {
        "steps": progress.get("steps"),
        "max_steps": progress.get("max_steps"),
        "loss": progress.get("loss"),
        "evaluation": read_json(folder / manifest.EVAL),
    }
    if record is not None:
        return StageStatus(name=name, state="finished", seconds=record.get("seconds"), **known)
    if not (folder / manifest.STARTED).is_file():
        return StageStatus(name=name, state="waiting")
    age = time.time() - progress["time"] if progress else None
    state = "unknown" if running is None else "running" if running else "stopped"
    return StageStatus(name=name, state=state, eta_seconds=progress.get("eta_seconds"), age_seconds=age, **known)


def render(status: RunStatus, run_dir: Path) -> str:
    """Write a status as lines of text."""
    width = max(len(stage.name) for stage in status.stages)
    lines = [f"{status.pipeline}  {run_dir}"]
    for number, stage in enumerate(status.stages, 1):
        words = [f"{stage.state:<8}"]
        if stage.state == "finished":
            words.append(duration(stage.seconds))
        elif stage.steps is not None:
            words.append(f"step {stage.steps}/{stage.max_steps}")
        if stage.loss is not None:
            words.append(f"loss {stage.loss:.4f}")
        if stage.state == "running" and stage.eta_seconds is not None:
            words.append(f"{duration(stage.eta_seconds)} left in this stage")
        if stage.state == "running" and (stage.age_seconds or 0.0) > STALE_SECONDS:
            words.append(f"no news for {duration(stage.age_seconds)}")
        if stage.state == "unknown" and stage.age_seconds is not None:
            words.append(f"last news {duration(stage.age_seconds)} ago")
        if stage.evaluation is not None:
            scores = stage.evaluation["scores"]
            words += [f"{name.replace('_', ' ')} {100 * value:.1f} %" for name, value in scores.items()]
            words.append(f"TPF {stage.evaluation['tpf']:.2f}")
        lines.append(f"  {number}/{len(status.stages)}  {stage.name:<{width}}  {'  '.join(words)}")
    if status.complete:
        lines.append(f"complete; report: {run_dir / 'report.html'}")
    elif status.running:
        lines.append("running" if status.queue is None else f"running; Slurm job {status.job}: {status.queue}")
    elif status.queue is not None:
        lines.append(f"Slurm job {status.job}: {status.queue}; it goes on by itself")
    elif status.running is None:
        lines.append("unknown whether it is running: this file system has no locks")
    else:
        lines.append("not running; run the same command again to go on")
    return "\n".join(lines) + "\n"
