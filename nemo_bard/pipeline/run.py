"""The pipeline as a recipe class: all stages of a chain, one after the other, in the processes that are there.

Every stage goes the same way: skip it if its manifest is there and matches; make, convert or train it; link its export;
write its manifest; score it. Rank 0 writes, all ranks follow its decisions.
"""

from __future__ import annotations

import logging
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import system_errors_of
from nemo_bard.base.files import locked, read_json, write_json, write_text
from nemo_bard.launch.exits import EXIT_PREEMPTED, note_complete, note_progress, under_torchrun
from nemo_bard.launch.launchers import LAUNCHERS, Launcher
from nemo_bard.pipeline import checks, compare, manifest
from nemo_bard.pipeline.compose import compose, read_words
from nemo_bard.pipeline.evaluation import evaluate_stage
from nemo_bard.pipeline.job import Job, Stage, make_job
from nemo_bard.pipeline.recipe_stage import dump
from nemo_bard.pipeline.rehearse.run import Rehearsal, scratch_folder
from nemo_bard.pipeline.world import Preempted, World, die_with_launcher
from nemo_bard.report.run import duration, write_report
from nemo_bard.upstream.console import allow_all_lines, keep_to_own_lines

logger = logging.getLogger(__name__)

REPORT = "report"
"""``--stage`` of the last part of ``launch.mode=per_stage``."""


class Pipeline:
    """A chain of stages that ``automodel finetune`` runs like a recipe; see ``recipes/bard_b32.yaml``.

    Args:
        job: The chain.
        only: Run this stage only, or, for ``report``, none; all if None.
        scratch: Folder of a rehearsal (``launch.rehearse``); one of its own beside ``run_dir`` if None.
    """

    parses_overrides = True

    def __init__(self, job: Job, *, only: str | None = None, scratch: str | None = None) -> None:
        if only not in (None, REPORT):
            job.stage(only)
        self.job, self.only = job, only
        self.world = World()
        self.rehearsal: Rehearsal | None = None
        if job.launch.rehearse:
            self.rehearsal = Rehearsal(job, self.world, None if scratch is None else Path(scratch))
        self._held = ExitStack()
        self._known: dict[str, Any] | None = None

    # ------------------ command line ------------------
    @classmethod
    def from_overrides(cls, config_path: Path, overrides: Sequence[str]) -> Pipeline:
        """Compose the chain that a command line asks for.

        Raises:
            ValueError: For wrong words, keys or values.
        """
        words = read_words(config_path, overrides)
        job = make_job(compose(words))
        parts = job.launch.mode == "per_stage" and not job.launch.rehearse
        if under_torchrun() and words.stage is None and parts:
            raise ValueError("launch.mode=per_stage starts a torchrun for each stage itself; run it without torchrun")
        return cls(job, only=words.stage, scratch=words.scratch)

    @classmethod
    def launch(cls, config_path: Path, overrides: Sequence[str], processes: int | None) -> int | None:
        """Print the job and check it (``--cfg``), or start it the way its ``launch`` section says.

        Args:
            config_path: The pipeline's recipe YAML.
            overrides: The words after it.
            processes: ``--nproc-per-node``.

        Returns:
            The exit code, or None to run all stages in this process.

        Raises:
            ValueError: For anything that can be known to be wrong before training.
        """
        words = read_words(config_path, overrides)
        job = make_job(compose(words))
        launcher = LAUNCHERS.get(job.launch.name)()
        if words.cfg:
            sys.stdout.write(job_as_yaml(job))
            sys.stdout.flush()
            checks.check_chain(job)
            checks.check_world(job, launcher.world_size(job.launch, processes))
            return 0
        check_early(job)
        if launcher.elsewhere:
            checks.check_chain(job)  # now, not after a day in a queue
        checks.check_world(job, launcher.world_size(job.launch, processes))
        if job.launch.rehearse:
            return _start_rehearsal(job, launcher, config_path, list(overrides), processes)
        parts = [*(stage.name for stage in job.stages), REPORT]
        with system_errors_of(f"run_dir {job.run_dir} cannot be used") if launcher.elsewhere else nullcontext():
            code = launcher.start(job.launch, parts, config_path, list(overrides), processes)
            if launcher.elsewhere and read_json(job.run_dir / manifest.IDENTITY) is None:
                take_run_dir(job)  # for `nemo-bard status` until the first worker does it
        return code

    # ------------------ a run ------------------
    def setup(self) -> None:
        """Connect the processes, check everything and take the run directory.

        Raises:
            ValueError: If anything is wrong; nothing has been trained or overwritten then.
        """
        die_with_launcher()
        self.world.stop.install()
        keep_to_own_lines()
        self.world.connect(self.job.launch.timeout_minutes)
        if self.rehearsal is not None:
            self.job = self.rehearsal.prepare()
        self.world.on_main(self._take)

    def _take(self) -> None:
        with system_errors_of(f"run_dir {self.job.run_dir} cannot be used"):
            if self.rehearsal is None:
                checks.check_run_dir(self.job)
                checks.check_chain(self.job)
                checks.check_world(self.job, self.world.size)
                self._held.enter_context(locked(self.job.run_dir))
            take_run_dir(self.job)

    def run_train_validation_loop(self) -> int:
        """Run what is left of the chain.

        Returns:
            0, or ``EXIT_PREEMPTED`` if a signal came: everything is saved, the same command goes on.
        """
        try:
            if self.rehearsal is not None:
                return self.rehearsal.run(self._run_stage)
            stages = [stage for stage in self.job.stages if self.only in (None, stage.name)]
            for stage in stages:
                if not self._run_stage(stage):
                    return self._preempted(stage)
            if self.only in (None, REPORT):
                self.world.on_main(self._report)
            self.world.stop.ignore()  # nothing is left to do: no reason to end in another way than well
            return 0
        except Preempted:
            return self._preempted(None)
        finally:
            self._held.close()
            self.world.stop.release()
            allow_all_lines()

    def _run_stage(self, stage: Stage) -> bool:
        """Bring one stage to its end and score it; False if a signal came first."""
        number = [s.name for s in self.job.stages].index(stage.name) + 1
        head = f"[{number}/{len(self.job.stages)}] {stage.name}"
        record = self.world.on_main(lambda: compare.finished(stage, self.job))
        if record is not None:
            self.say(f"{head}: finished before")
        else:
            self.world.on_main(lambda: self._refuse_finished_successors(stage))
            if self.world.should_stop():
                return False
            self.say(f"{head}: {stage.title()}")
            begin = time.monotonic()
            started = self.world.on_main(lambda: self._start(stage))
            if not stage.run(self.job, self.world):
                return False
            record = self.world.on_main(lambda: self._finish(stage, started, time.monotonic() - begin))
        self._known = record
        if stage.evaluate and self.job.evaluation.data is not None:
            if self.world.should_stop():
                return False
            export = manifest.export_of(self.job, record)
            last = stage.name == [s.name for s in self.job.stages if s.evaluate][-1]
            scored = evaluate_stage(stage, self.job, self.world, export, record["content"], last=last)
            scores = ", ".join(f"{name.replace('_', ' ')} {100 * v:.1f} %" for name, v in scored["scores"].items())
            self.say(f"{head}: {scores}, {scored['tpf']:.2f} tokens per forward")
        return not self.world.should_stop() or stage is self.job.stages[-1]

    def _refuse_finished_successors(self, stage: Stage) -> None:
        """A stage whose export went into a finished one is not made anew behind its back, except to the same end."""
        readers = [
            s for s in self.job.stages if stage.name in s.inputs.values() and (s.folder / manifest.MANIFEST).exists()
        ]
        if readers:
            logger.warning(
                "stage %s is made again; stage %s, finished from its earlier export, stays only if it comes out the same",
                stage.name,
                readers[0].name,
            )

    def _start(self, stage: Stage) -> dict[str, Any]:
        """Write what the stage is made from, or compare with what it was begun with; rank 0."""
        old = read_json(stage.folder / manifest.STARTED)
        now = compare.ingredients(stage, self.job, old or self._known)
        if old is not None and manifest.newest_checkpoint(stage.checkpoints)[0] is not None:
            compare.check_same(stage, self.job, old, now, "begun")
            stage.check_goes_on(old, self.world.size)
        started = {**now, **stage.split(self.world.size)}
        write_json(stage.folder / manifest.STARTED, started)
        stage.begin()
        return started

    def _finish(self, stage: Stage, started: Mapping[str, Any], seconds: float) -> dict[str, Any]:
        """Write the manifest of a stage whose export is there; rank 0."""
        seconds = (read_json(stage.folder / manifest.PROGRESS) or {}).get("seconds", seconds)
        record = manifest.finish(stage, self.job, started, seconds=seconds, finished_at=time.time())
        self.say(f"      {stage.name}: done in {duration(seconds)}, {stage.export}")
        note_progress()
        return record

    def _report(self) -> None:
        path = write_report(self.job.run_dir)
        self.say(f"report: {path}")
        note_complete()

    def _preempted(self, stage: Stage | None) -> int:
        where = "" if stage is None else f" in stage {stage.name}"
        self.say(f"preempted{where}: everything is saved; run the same command again to go on")
        return EXIT_PREEMPTED

    def say(self, text: str) -> None:
        """Write a line for the reader, once."""
        if self.world.is_main:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


def _start_rehearsal(
    job: Job, launcher: Launcher, config_path: Path, words: list[str], processes: int | None
) -> int | None:
    """Start a rehearsal as the chain itself would be; what workers leave behind that could not tidy up is removed."""
    scratch = scratch_folder(job.run_dir)
    settings = launcher.rehearsal(job.launch, scratch)
    try:
        return launcher.start(settings, [], config_path, [*words, f"--scratch={scratch}"], processes)
    finally:
        if not launcher.elsewhere:
            shutil.rmtree(scratch, ignore_errors=True)


def check_early(job: Job) -> None:
    """Check what is quick, before any process is started.

    Raises:
        ValueError: If anything is wrong.
    """
    checks.check_run_dir(job)
    checks.check_block_sizes(job)
    checks.check_inputs(job)


def take_run_dir(job: Job) -> None:
    """Say in the run directory which pipeline it belongs to, and how it was composed."""
    identity = {"pipeline": job.name, "stages": [stage.name for stage in job.stages]}
    write_json(job.run_dir / manifest.IDENTITY, identity)
    write_text(job.run_dir / manifest.COMPOSED, dump(job.config))


def job_as_yaml(job: Job) -> str:
    """The composed job and every stage's final recipe as one YAML stream (``--cfg``)."""
    parts = [f"# job {job.name}: the composed configuration\n{dump(job.config)}"]
    for index, stage in enumerate(job.stages, 1):
        head = f"# stage {index}/{len(job.stages)}: {stage.name}, written to {stage.folder}\n"
        parts.append(head + stage.heading() + dump(stage.shown()))
    return "---\n".join(parts)
