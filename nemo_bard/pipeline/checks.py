"""What can be wrong with a chain as a whole, found before any training starts; the stages check themselves."""

from __future__ import annotations

from nemo_bard.base.files import LOCK, read_json
from nemo_bard.launch.launchers import LAUNCHERS
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.evaluation import open_samples
from nemo_bard.pipeline.job import Job, Stage
from nemo_bard.pipeline.start_stages import ConvertStage


def check_chain(job: Job) -> None:
    """Check order, inputs, stages and evaluation; nothing is written and no process group is needed.

    Raises:
        ValueError: One line that names the stage, the key, its value and what is allowed.
    """
    check_block_sizes(job)
    check_inputs(job)
    for stage in job.stages:
        stage.check(job)
    open_samples(job)


def check_block_sizes(job: Job) -> None:
    """Check that blocks grow from one training stage to the next; distillation may keep its student's.

    A start point of its own begins anew.

    Raises:
        ValueError: Names both stages.
    """
    previous: tuple[Stage, int] | None = None
    trained = {stage.name for stage in job.stages if stage.trains and stage.block_size is not None}
    for stage in job.stages:
        size = stage.block_size
        if isinstance(stage, ConvertStage) and stage.inputs["init"] not in trained:
            previous = None
        if not stage.trains or size is None:
            continue
        if previous is not None and (size < previous[1] or (size == previous[1] and "anchor" not in stage.inputs)):
            raise ValueError(
                f"stage.{stage.name}.block_size={size} must be larger than {previous[1]}, that of stage"
                f" {previous[0].name} before it: blocks grow along the chain"
            )
        previous = stage, size


def check_inputs(job: Job) -> None:
    """Check that every input exists, and is what its stage needs.

    Raises:
        ValueError: Names the stage and the input.
    """
    for stage in job.stages:
        stage.check_inputs(job)


def check_world(job: Job, processes: int) -> None:
    """Check that every stage can run in so many processes.

    Raises:
        ValueError: Names stage and numbers.
    """
    for stage in job.stages:
        stage.check_processes(processes)


def check_run_dir(job: Job) -> None:
    """Refuse a run directory that belongs to something else.

    Raises:
        ValueError: If it holds another pipeline's run, or files of no run.
    """
    identity = read_json(job.run_dir / manifest.IDENTITY)
    if identity is None:
        launcher = LAUNCHERS.get(job.launch.name)()
        own = (job.run_dir / LOCK, *launcher.state_folders(job.launch))
        strangers = [p.name for p in job.run_dir.iterdir() if p not in own] if job.run_dir.is_dir() else []
        if strangers:
            raise ValueError(f"run_dir {job.run_dir} holds {strangers[0]} and is no run of a pipeline; use another")
    elif identity["pipeline"] != job.name:
        raise ValueError(
            f"run_dir {job.run_dir} belongs to the pipeline {identity['pipeline']}, not {job.name}; use another"
        )
