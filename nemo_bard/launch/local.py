"""Worker processes: how many, how they are started and stopped, and what their exit codes mean.

``launch.name`` of a pipeline picks one of ``LAUNCHERS``. A launcher is a table entry: the keys of its section and a
function that starts everything and returns the exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bard.upstream.console import hush

EXIT_PREEMPTED = 75
"""Stopped by a signal with everything saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""
EXIT_USER_ERROR = 2
PREEMPTION_SIGNALS = ("SIGTERM", "SIGUSR1")
"""Signals that end a run at the next step, with a checkpoint."""
MODES = ("one_job", "per_stage")
FORWARDED_SIGNALS = "SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT"


JOB_FILES = "NEMO_BARD_JOB"
"""Environment variable of a job that goes on by itself: what its files' names begin with."""
FAILURES, COMPLETE = ".failures", ".complete"
"""Ends of the names of its files: goes that have failed since the last checkpoint, a line each; the chain is complete."""


def under_torchrun() -> bool:
    """Whether a launcher has started this process as one of several (it sets ``RANK`` and ``WORLD_SIZE``)."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def count_processes(requested: int | None) -> int:
    """Return how many processes to start here: ``requested``, else one per GPU, else 1.

    Raises:
        ValueError: If ``requested`` is below 1 or above the number of GPUs, where there are any.
    """
    import torch

    gpus = torch.cuda.device_count()
    if requested is None:
        return max(gpus, 1)
    if requested < 1 or (gpus and requested > gpus):
        allowed = f"1 to {gpus} (the GPUs of this machine)" if gpus else "at least 1"
        raise ValueError(f"--nproc-per-node must be {allowed}, got {requested}")
    return requested


def run_torchrun(
    processes: int, config_path: Path, words: Sequence[str], *, grace_seconds: int = 30, resumable: bool = False
) -> int:
    """Start ``processes`` workers of ``finetune`` on a free port, forward signals to them and wait.

    Args:
        processes: Workers to start on this machine.
        config_path: The recipe.
        words: What follows it on the command line.
        grace_seconds: How long workers may take to save after a signal before they are killed.
        resumable: Whether a run that a preemption signal ended can be gone on with (``EXIT_PREEMPTED``).

    Returns:
        The exit code; a worker that failed has told why.
    """
    command = ["--standalone", f"--nproc-per-node={processes}", f"--shutdown-timeout={grace_seconds}"]
    command += [f"--signals-to-handle={FORWARDED_SIGNALS}", "-m", "nemo_bard.cli"]
    return supervise([*command, "finetune", "--config", str(config_path), *words], resumable=resumable)


def supervise(arguments: Sequence[str], *, resumable: bool) -> int:
    """Run torchrun in this process and make one exit code of what its workers say.

    Args:
        arguments: torchrun's own.
        resumable: Whether a run that a preemption signal ended can be gone on with (``EXIT_PREEMPTED``).

    Returns:
        0, ``EXIT_USER_ERROR``, ``EXIT_PREEMPTED``, 128 + a signal, or 1; torchrun's own script knows 0 and 1 only.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

    hush()
    parsed = get_args_parser().parse_args(list(arguments))
    try:
        torchrun(parsed)
    except ChildFailedError as error:
        codes = {failure.exitcode for failure in error.failures.values()}
        _, first = error.get_first_failure()
        if first.exitcode == EXIT_USER_ERROR:
            return EXIT_USER_ERROR
        if EXIT_PREEMPTED in codes:
            return EXIT_PREEMPTED
        how = f"exit code {first.exitcode}"
        if first.exitcode < 0:
            how = {one.value: one.name for one in signal.Signals}.get(-first.exitcode, f"signal {-first.exitcode}")
        sys.stderr.write(f"error: worker {first.local_rank} of {parsed.nproc_per_node}{_node()} ended with {how}\n")
        return 1
    except SignalException as error:
        sys.stderr.write(f"error: stopped by {error.sigval.name}{_node()}\n")
        return EXIT_PREEMPTED if resumable and error.sigval.name in PREEMPTION_SIGNALS else 128 + error.sigval
    except RendezvousError as error:
        sys.stderr.write(f"error: the other nodes are gone: {' '.join(str(error).split())}\n")
        return 1
    return 0


def _node() -> str:
    name = os.environ.get("SLURMD_NODENAME")
    return f" on {name}" if name else ""


def note_progress() -> None:
    """Tell the job, if this is a worker of one, that it gets on: a checkpoint is written or a stage finished."""
    if prefix := os.environ.get(JOB_FILES):
        Path(prefix + FAILURES).unlink(missing_ok=True)


def note_complete() -> None:
    """Tell the job, if this is a worker of one, that nothing is left to do, whatever happens to its processes now."""
    if prefix := os.environ.get(JOB_FILES):
        Path(prefix + COMPLETE).touch()


class Launcher(NamedTuple):
    """One way to start a pipeline."""

    keys: tuple[str, ...]
    """Keys of the ``launch`` section besides those of ``COMMON_KEYS``."""
    start: Callable[..., int | None]
    """``start(settings, stages, config_path, words, processes)``: starts everything and returns the exit code, or None
    to go on in this process. ``stages`` are the parts of ``per_stage``, in order."""
    world_size: Callable[[Mapping[str, Any], int | None], int]
    """``world_size(settings, processes)``: how many processes there will be, of all nodes; checks what it reads."""
    elsewhere: bool
    """Whether the workers start later, and on other machines."""


COMMON_KEYS = ("name", "mode", "processes", "timeout_minutes", "grace_seconds")


def run_local(
    settings: Mapping[str, Any], stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> int | None:
    """Run on this machine: in this process, under one torchrun, or under one torchrun per stage.

    Args:
        settings: The ``launch`` section.
        stages: Names to pass as ``--stage``, in order.
        config_path: The pipeline's recipe YAML.
        words: The command line after it.
        processes: ``--nproc-per-node``; ``settings["processes"]`` if None.

    Returns:
        The exit code, or None if the caller is to go on in its own process.
    """
    processes = local_world_size(settings, processes)
    grace = settings["grace_seconds"]
    if settings["mode"] == "one_job":
        if processes == 1:
            return None
        return run_torchrun(processes, config_path, words, grace_seconds=grace, resumable=True)
    for stage in stages:
        code = run_torchrun(processes, config_path, [*words, f"--stage={stage}"], grace_seconds=grace, resumable=True)
        if code:
            return code
    return 0


def local_world_size(settings: Mapping[str, Any], processes: int | None) -> int:
    """Return how many processes ``run_local`` starts; arguments as there."""
    return count_processes(processes if processes is not None else settings["processes"])


def slurm_world_size(settings: Mapping[str, Any], processes: int | None) -> int:
    """Return how many processes the Slurm job starts on all nodes; arguments as ``run_slurm``."""
    from nemo_bard.launch.slurm import check, processes_per_node

    check(settings)
    return settings["nodes"] * processes_per_node(settings, processes)


def run_slurm(
    settings: Mapping[str, Any], stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> int:
    """Write the script of a Slurm job and submit it; see ``nemo_bard.launch.slurm.submit``."""
    from nemo_bard.launch.slurm import submit

    return submit(settings, stages, config_path, words, processes)


SLURM_KEYS = (
    "nodes", "gpus_per_node", "cpus_per_task", "partition", "account", "time", "job_name", "folder", "submit",
    "max_requeues", "max_failures", "python", "modules", "setup", "container", "container_mounts", "sbatch",
)  # fmt: skip
LAUNCHERS: dict[str, Launcher] = {
    "local": Launcher((), run_local, local_world_size, elsewhere=False),
    "slurm": Launcher(SLURM_KEYS, run_slurm, slurm_world_size, elsewhere=True),
}
"""``launch.name`` -> launcher."""
