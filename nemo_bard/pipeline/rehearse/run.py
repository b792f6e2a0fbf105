"""The rehearsal of a chain: the pipeline's own code on a derived chain, with every training stage stopped once.

``derive`` makes the chain, ``rows`` chooses its samples, ``probes`` look at the machines, ``watch`` measures the stages,
``findings`` and ``advice`` say what that means, ``report`` prints it.
"""

from __future__ import annotations

import contextlib
import json
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from nemo_bard.base.errors import EXIT_USER_ERROR
from nemo_bard.base.files import write_json
from nemo_bard.data.readers import open_dataset
from nemo_bard.launch.exits import EXIT_PREEMPTED
from nemo_bard.pipeline import checks
from nemo_bard.pipeline.job import Job, Stage
from nemo_bard.pipeline.recipe_stage import RecipeStage
from nemo_bard.pipeline.rehearse import advice, findings
from nemo_bard.pipeline.rehearse.derive import (
    STEPS,
    Rehearsed,
    indices_file,
    rehearsal_job,
    rehearsed_stage,
)
from nemo_bard.pipeline.rehearse.failures import explain
from nemo_bard.pipeline.rehearse.findings import Findings, StageFindings
from nemo_bard.pipeline.rehearse.predict import Machine, Prediction, predict
from nemo_bard.pipeline.rehearse.probes import OK, probe_files, probe_network
from nemo_bard.pipeline.rehearse.report import render
from nemo_bard.pipeline.rehearse.rows import Measured as Part
from nemo_bard.pipeline.rehearse.rows import Rows, choose, measure_part
from nemo_bard.pipeline.rehearse.watch import Measured, Watcher, device_name, has_cuda, memory_gib
from nemo_bard.pipeline.world import Preempted, World
from nemo_bard.report.run import write_report
from nemo_bard.train.recipe_file import translate


def beside(run_dir: Path, ending: str) -> Path:
    """A path next to a run directory, on its file system."""
    real = run_dir.resolve()
    return real.with_name(f"{real.name}.rehearsal{ending}")


def scratch_folder(run_dir: Path) -> Path:
    """A new name for the folder of a rehearsal."""
    return beside(run_dir, f"-{secrets.token_hex(4)}")


class Rehearsal:
    """A rehearsal in the processes that are there; all of them call its methods.

    Args:
        job: The real chain.
        world: The processes.
        scratch: The folder to work in, which does not exist; one of its own if None.
    """

    def __init__(self, job: Job, world: World, scratch: Path | None = None) -> None:
        self.real, self.world = job, world
        self.scratch = scratch or scratch_folder(job.run_dir)
        self.job = job
        self.facts: dict[str, Rehearsed] = {}
        self.found: Findings
        self._begin = time.monotonic()
        self._nodes: list[str] = []
        self._parts: dict[str, Part] = {}
        self._stage: str | None = None
        self._measured, self._resumed = Measured(), False

    # ------------------ before ------------------
    def prepare(self) -> Job:
        """Check the real chain, look at the machines, and return the chain to run instead.

        Raises:
            ValueError: For what makes the real run fail at its start.
        """
        self.scratch = self.world.on_main(self._make_scratch)
        with self._failing():
            self._look()
            self.found.network = probe_network(self.world)
            for stage in self.real.stages:
                if isinstance(stage, RecipeStage):
                    seconds = self.world.on_main(lambda stage=stage: self._step_seconds(stage))
                    self.facts[stage.name] = rehearsed_stage(stage, self.world.size, seconds)
            self.job = rehearsal_job(self.real, self.scratch, self.facts)
            self.world.on_main(lambda: [stage.check(self.job) for stage in self.job.stages] and None)
        return self.job

    def _step_seconds(self, stage: RecipeStage) -> float | None:
        """Time of a real step before anything is measured; None if nothing is known of the model yet."""
        source = self.real.model.source
        if stage.block_size is None or source is None or not Path(source).is_dir():
            return None
        return predict(translate(stage.recipe), Path(source), None, rows=None, machine=self._machine()).step_seconds

    def _look(self) -> None:
        """Check the real chain, and probe the file system."""
        cuda = has_cuda()
        self._nodes = self.world.gather(platform.node())
        self.found = Findings(
            pipeline=self.real.name,
            run_dir=str(self.real.run_dir),
            ranks=self.world.size,
            nodes=list(dict.fromkeys(self._nodes)),
            device=device_name(cuda),
            memory_gib=memory_gib(cuda),
        )
        self.say(f"rehearsal of {self.real.name} in {self.scratch}, which is removed at the end")
        self.world.on_main(self._check)
        self.found.files = probe_files(self.world, self.scratch)
        if line := advice.find_error(self.found):
            raise ValueError(line)

    def _make_scratch(self) -> Path:
        self.scratch.mkdir(parents=True)
        return self.scratch

    def _check(self) -> None:
        checks.check_run_dir(self.real)
        checks.check_chain(self.real)
        checks.check_world(self.real, self.world.size)

    # ------------------ the stages ------------------
    def run(self, run_stage: Callable[[Stage], bool]) -> int:
        """Rehearse all stages, tell what was found, and remove the scratch folder.

        Args:
            run_stage: Brings a stage to its end and scores it; False if a signal came first.

        Returns:
            0, or ``EXIT_PREEMPTED`` if a signal ended the rehearsal.

        Raises:
            ValueError: One line, for what makes the real run fail.
        """
        with contextlib.closing(self), self._failing():
            try:
                if not all(self._rehearse(stage, run_stage) for stage in self.job.stages):
                    raise Preempted
                self.world.on_main(lambda: write_report(self.scratch) and None)
                self.world.on_main(self._tell)
            except Preempted:
                self.say("the rehearsal was stopped by a signal")
                return EXIT_PREEMPTED
        return 0

    def _rehearse(self, stage: Stage, run_stage: Callable[[Stage], bool]) -> bool:
        """One stage, and what was found of it; False if a signal came from outside."""
        self._stage, self._measured, self._resumed = stage.name, Measured(), False
        begin = time.monotonic()
        facts = self.facts.get(stage.name)
        if facts is None:
            if not run_stage(stage):
                return False
            size = self.world.on_main(lambda: folder_gib(stage.export))
            self.found.stages.append(StageFindings(name=stage.name, seconds=time.monotonic() - begin, export_gib=size))
            return True
        rows, expected = self.world.on_main(lambda: self._choose(stage, facts))
        if not self._train_twice(stage, run_stage):
            return False
        checkpoint, export = self.world.on_main(lambda: self._weigh(stage))
        told = self.world.gather(self._measured)
        seconds = time.monotonic() - begin
        if any(not one.steps for one in told):  # a recipe whose steps cannot be followed
            found = StageFindings(name=stage.name, seconds=seconds, rows=rows)
        else:
            found = findings.trained(stage.name, told, facts, rows=rows, nodes=self._nodes, seconds=seconds)
        self.found.stages.append(
            replace(
                found,
                resumed=self._resumed,
                checkpoint_gib=checkpoint,
                export_gib=export,
                predicted_memory_gib=expected.memory_gib,
                predicted_step_seconds=expected.step_seconds,
            )
        )
        return True

    def _train_twice(self, stage: Stage, run_stage: Callable[[Stage], bool]) -> bool:
        """To the first checkpoint, as far as a preemption lets it, and from there to the end."""
        for stop in (True, False):
            watcher = Watcher(self._measured, self.world, stop_after_save=stop)
            self.world.watchers[:] = [watcher]
            try:
                if run_stage(stage):
                    break
            finally:
                self.world.watchers.clear()
            if not stop or any(self.world.gather(watcher.stopped_from_outside or not watcher.saved)):
                return False
            self.world.stop.received, self._resumed = False, True
        self.world.on_main(lambda: self._check_steps(stage))
        return True

    def _check_steps(self, stage: Stage) -> None:
        lines = (stage.checkpoints / "training.jsonl").read_text().splitlines()
        steps = [json.loads(line)["step"] for line in lines]
        if steps != list(range(STEPS)):
            raise ValueError(f"stage {stage.name} did not go on after a preemption: it logged the steps {steps}")

    def _choose(self, stage: Stage, facts: Rehearsed) -> tuple[Rows | None, Prediction]:
        """Write which samples the stage reads, and say what is expected of it; rank 0."""
        recipe = facts.recipe
        if not recipe.get("dataset"):
            return None, Prediction()
        key = json.dumps([recipe["dataset"], stage.block_size is None], default=str)
        start = Path(self.job.input_path(stage.inputs["init"]))
        anchor = None if "anchor" not in stage.inputs else Path(self.job.input_path(stage.inputs["anchor"]))
        if key not in self._parts:
            self._parts[key] = measure_part(recipe, start, stage.block_size)
        size = None if anchor is None else json.loads((anchor / "config.json").read_text())["block_size"]
        indices, rows = choose(
            self._parts[key], recipe, stage.block_size, anchor_block_size=size, samples=facts.samples
        )
        write_json(indices_file(self.scratch, stage.name), indices)
        if recipe.get("validation_dataset"):
            section = {k: value for k, value in recipe["validation_dataset"].items() if k != "chat_template"}
            count = min(len(open_dataset(section, validate=False)), facts.local_batch_size * self.world.size)
            write_json(indices_file(self.scratch, stage.name, "validation"), list(range(count)))
        return rows, predict(recipe, start, anchor, rows=rows, machine=self._machine())

    def _machine(self) -> Machine:
        found = self.found
        return Machine(
            found.device, found.memory_gib, ranks=found.ranks, ranks_per_node=found.ranks // len(found.nodes)
        )

    def _weigh(self, stage: Stage) -> tuple[float, float]:
        """Sizes of a checkpoint and of the export; the checkpoints make room for those of the next stage."""
        sizes = []
        for folder in stage.checkpoints.glob("epoch_*"):
            sizes.append(folder_gib(folder) - folder_gib(folder / "model" / "consolidated"))
            shutil.rmtree(folder)
        return max(sizes, default=0.0), folder_gib(stage.export)

    # ------------------ after ------------------
    def _tell(self) -> None:
        found, facts = self.found, list(self.facts.values())
        links = all(one.hard_links == OK for one in found.files)
        needed = findings.needed_gib(found.stages, facts, keep_last=self.real.config["keep_last"], links=links)
        found.needed_gib = max(needed - folder_gib(self.real.run_dir), 0.0)
        found.changes = advice.find_changes(found, facts)
        found.error = advice.find_error(found)
        self._write()
        self.say(f"\n{render(found)}\nresult: {beside(self.real.run_dir, '.json')}")
        if found.error is not None:
            raise ValueError(found.error)

    def _write(self) -> None:
        self.found.seconds = time.monotonic() - self._begin
        write_json(beside(self.real.run_dir, ".json"), self.found.as_dict())

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Let one rank tell, in one line, why the rehearsal fails, the others end in silence; remove what there is."""
        done = False
        try:
            yield
            done = True
        except Exception as error:
            if not self._first_to_fail():
                raise SystemExit(EXIT_USER_ERROR) from error
            line = self._explain(error)
            if line is None:
                raise
            if hasattr(self, "found"):
                self.found.error = line
                self._write()
            raise ValueError(line) from error
        finally:
            if not done:
                self.close()

    def _first_to_fail(self) -> bool:
        """Whether no other rank has failed before; when one has, what happens to the others is its doing."""
        try:
            (self.scratch / "failed").touch(exist_ok=False)
        except (FileExistsError, FileNotFoundError):
            return False
        return True

    def _explain(self, error: Exception) -> str | None:
        facts = None if self._stage is None else self.facts.get(self._stage)
        lower = "" if facts is None else advice.less_memory(facts.recipe, self.world.size)
        return explain(
            error,
            stage=self._stage,
            measured=self._measured,
            rank=self.world.rank,
            lower=lower,
            folder=self.scratch.parent,
        )

    def close(self) -> None:
        """Remove the scratch folder."""
        if self.world.is_main:
            shutil.rmtree(self.scratch, ignore_errors=True)

    def say(self, text: str) -> None:
        """Write a line for the reader, once."""
        if self.world.is_main:
            sys.stdout.write(f"{text}\n")
            sys.stdout.flush()


def folder_gib(folder: Path) -> float:
    """What a folder's files take, each once however many names it has."""
    states = [path.stat() for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return sum({(state.st_dev, state.st_ino): state.st_size for state in states}.values()) / 1024**3
