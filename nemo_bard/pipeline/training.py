"""One training stage: build the recipe that its YAML names, watch it, and leave nothing of it in memory."""

from __future__ import annotations

import gc
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

from nemo_bard.base.files import read_json, sync_tree, write_json
from nemo_bard.launch.exits import PREEMPTION_SIGNALS, note_progress
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.job import Stage
from nemo_bard.pipeline.world import World
from nemo_bard.report.run import duration
from nemo_bard.train.recipe_file import load_config, load_recipe_class
from nemo_bard.train.trackers import end_runs
from nemo_bard.upstream import automodel
from nemo_bard.upstream.torch import shield_workers, stop_workers

logger = logging.getLogger(__name__)

PROGRESS_SECONDS = 15.0
"""Between two writings of ``progress.json``."""
LINE_SECONDS = 60.0
"""Between two lines about a stage where no progress bar can be drawn, such as a job's log."""


def train(stage: Stage, recipe: dict[str, Any], world: World, data_cache: Path) -> bool:
    """Train a stage from its newest whole checkpoint to its end, or until a signal.

    Args:
        stage: A stage whose ``stage.yaml`` is written.
        recipe: What that file holds.
        world: The processes; all of them call this.
        data_cache: Folder for what the recipe finds out about its data sets, for all stages and goes.

    Returns:
        Whether the stage's final checkpoint is there; False means a signal came before.

    Raises:
        RuntimeError: If the recipe ended without either.
    """
    resume = world.on_main(lambda: prepare_resume(stage))
    path = stage.folder / manifest.STAGE_YAML
    recipe_class = load_recipe_class(path, recipe)
    config = load_config(path, [])
    config.set_by_dotted("checkpoint.restore_from", None if resume is None else str(resume))
    trainer = recipe_class(config)
    trainer.data_cache = data_cache
    try:
        trainer.setup()
        for loader in loaders_of(trainer):
            shield_workers(loader, PREEMPTION_SIGNALS)
        if world.should_stop():
            return False
        for watch in world.watchers:
            watch(trainer)
        Watch(trainer, stage, world).start()
        trainer.run_train_validation_loop()
        preempted = bool(trainer.step_scheduler.sigterm_flag)
    finally:
        teardown(trainer)
    world.stop.received |= preempted
    done = world.on_main(lambda: final_export(stage) is not None)
    if not done and not preempted:
        raise RuntimeError(f"stage {stage.name} ended without a final checkpoint in {stage.checkpoints}")
    return done


def prepare_resume(stage: Stage) -> Path | None:
    """Name and set aside damaged checkpoints, cut the metrics back, and return where to go on from, if anywhere."""
    newest, wrong = manifest.newest_checkpoint(stage.checkpoints)
    for line in wrong:
        logger.warning("checkpoint not used: %s", line)
    manifest.set_aside(wrong)
    steps = 0
    if newest is not None:
        import torch

        steps = torch.load(newest / "step_scheduler.pt", weights_only=True)["step"]
        logger.warning("stage %s goes on from %s, after %d steps", stage.name, newest, steps)
    elif wrong:
        logger.warning("stage %s starts again: none of its checkpoints is whole", stage.name)
    for name in ("training.jsonl", "validation.jsonl"):
        manifest.keep_steps(stage.checkpoints / name, steps)
    return newest


def final_export(stage: Stage) -> Path | None:
    """The Hugging Face folder inside the final checkpoint; None while there is none."""
    newest, _ = manifest.newest_checkpoint(stage.checkpoints)
    folder = None if newest is None else newest / manifest.EXPORTED
    return folder if folder is not None and (folder / "config.json").is_file() else None


class Watch:
    """Follows a recipe through its methods: what it logs per step, and when it saves.

    Progress goes to ``progress.json`` now and then, which no step waits for the disk for. The metrics reach the disk before every checkpoint does,
    and a checkpoint's files before its publication.
    """

    def __init__(self, recipe: Any, stage: Stage, world: World) -> None:
        self.recipe, self.stage, self.world, self.is_main = recipe, stage, world, world.is_main
        before = (read_json(stage.folder / manifest.PROGRESS) or {}) if world.is_main else {}
        self.seconds = float(before.get("seconds", 0.0))
        self.host_memory = float(before.get("host_memory_gib", 0.0))
        self.device_memory = float(before.get("device_memory_gib", 0.0))
        self.step_seconds: float | None = None
        self.sample: Any = None
        self.last = self.written = time.monotonic()
        self.said: float | None = None

    def start(self) -> None:
        """Put the methods in between."""
        automodel.before_publication(self.recipe, self.settle)
        automodel.around_saving(self.recipe, self.saving, self.saved)
        if not self.is_main:
            return
        self.draws = sys.stderr.isatty()
        automodel.set_progress_bar(self.recipe, self.stage.name if self.draws else None)
        automodel.after_step(self.recipe, self.step)
        self.write(None)

    def saved(self) -> None:
        """Look for a signal, which every checkpoint step has to do."""
        automodel.look_for_signal(self.recipe)
        if self.is_main:
            note_progress()

    def settle(self, path: str) -> None:
        """Bring a written checkpoint onto the disk on every machine, before it counts as whole."""
        if int(os.environ.get("LOCAL_RANK", 0)) == 0:
            sync_tree(Path(path))
        self.world.barrier()

    def saving(self) -> None:
        """Bring the metrics of all steps so far onto the disk, and the progress up to date."""
        if not self.is_main:
            return
        self.write(self.sample)
        for name in ("metric_logger_train", "metric_logger_valid"):
            getattr(self.recipe, name).flush()

    def step(self, sample: Any) -> None:
        """Note one finished step."""
        self.sample = sample
        now = time.monotonic()
        duration, self.last = now - self.last, now
        self.seconds += duration
        self.step_seconds = duration if self.step_seconds is None else 0.9 * self.step_seconds + 0.1 * duration
        self.host_memory = max(self.host_memory, resident_gib())
        self.device_memory = max(self.device_memory, float(sample.metrics.get("mem", 0.0)))
        if now - self.written >= PROGRESS_SECONDS:
            self.write(sample)
        if not self.draws and (self.said is None or now - self.said >= LINE_SECONDS):
            self.said = now
            self.say(sample)

    def say(self, sample: Any) -> None:
        """Write a line in place of a progress bar."""
        scheduler = self.recipe.step_scheduler
        left = duration((scheduler.max_steps - scheduler.step - 1) * self.step_seconds)
        loss = float(sample.metrics["loss"])
        sys.stdout.write(
            f"      {self.stage.name}: step {scheduler.step + 1}/{scheduler.max_steps}, loss {loss:.4f}, {left} left\n"
        )
        sys.stdout.flush()

    def write(self, sample: Any) -> None:
        """Write ``progress.json``."""
        scheduler = self.recipe.step_scheduler
        done = scheduler.step + (sample is not None)
        left = None if self.step_seconds is None else (scheduler.max_steps - done) * self.step_seconds
        loss = None if sample is None else float(sample.metrics["loss"])
        self.written = time.monotonic()
        write_json(
            self.stage.folder / manifest.PROGRESS,
            {
                "steps": done,
                "max_steps": int(scheduler.max_steps),
                "loss": loss,
                "seconds": self.seconds,
                "seconds_per_step": self.step_seconds,
                "eta_seconds": left,
                "host_memory_gib": self.host_memory,
                "device_memory_gib": self.device_memory,
                "time": time.time(),
            },
            durable=False,
        )


def loaders_of(recipe: Any) -> list[Any]:
    """The data loaders that a recipe has."""
    loaders = (getattr(recipe, name, None) for name in ("dataloader", "val_dataloader"))
    return [loader for loader in loaders if loader is not None]


def resident_gib() -> float:
    """Memory of this process in GiB; 0 where ``/proc`` does not tell."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return 0.0
    import resource

    return pages * resource.getpagesize() / 1024**3


def teardown(recipe: Any) -> None:
    """Free everything a recipe holds, so that the next stage has the machine to itself.

    Upstream never releases its signal handler (0.7.0), workers of data loaders live as long as their iterator, and
    optimizer states and hooks hold each other in cycles.
    """
    automodel.release_signals(recipe)
    for loader in loaders_of(recipe):
        stop_workers(loader)
    for optimizer in getattr(recipe, "optimizer", None) or []:
        optimizer.state.clear()
        optimizer.param_groups.clear()
    for name in ("metric_logger_train", "metric_logger_valid", "checkpointer"):
        close = getattr(getattr(recipe, name, None), "close", None)
        if close is not None:
            close()
    end_runs()
    recipe.__dict__.clear()
    gc.collect()
    if (torch := sys.modules.get("torch")) is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
