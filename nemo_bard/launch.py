"""Worker processes: how many, how they are started and stopped, and what their exit codes mean.

``launch.name`` of a pipeline picks one of ``LAUNCHERS``. A launcher is a table entry: the keys of its section and a
function that starts everything and returns the exit code.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

EXIT_PREEMPTED = 75
"""Stopped by a signal with everything saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""
EXIT_USER_ERROR = 2
PREEMPTION_SIGNALS = ("SIGTERM", "SIGUSR1")
"""Signals that end a run at the next step, with a checkpoint."""
MODES = ("one_job", "per_stage")
FORWARDED_SIGNALS = "SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT"


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
    from torch.distributed.run import get_args_parser
    from torch.distributed.run import run as torchrun

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
        sys.stderr.write(
            f"error: worker {first.local_rank} of {parsed.nproc_per_node} ended with exit code {first.exitcode}\n"
        )
        return 1
    except SignalException as error:
        sys.stderr.write(f"error: stopped by {error.sigval.name}\n")
        return EXIT_PREEMPTED if resumable and error.sigval.name in PREEMPTION_SIGNALS else 128 + error.sigval
    return 0


class Launcher(NamedTuple):
    """One way to start a pipeline."""

    keys: tuple[str, ...]
    """Keys of the ``launch`` section besides those of ``COMMON_KEYS``."""
    start: Callable[..., int | None]
    """``start(settings, stages, config_path, words, processes)``: starts everything and returns the exit code, or None
    to go on in this process. ``stages`` are the parts of ``per_stage``, in order."""


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
    processes = count_processes(processes if processes is not None else settings["processes"])
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


def run_slurm(
    settings: Mapping[str, Any], stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> int:
    """Write the script of a Slurm job and submit it; see ``nemo_bard.slurm.submit``."""
    from nemo_bard.slurm import submit

    return submit(settings, stages, config_path, words, processes)


SLURM_KEYS = (
    "nodes", "gpus_per_node", "cpus_per_task", "partition", "account", "time", "job_name", "folder", "submit",
    "max_requeues", "max_failures", "python", "modules", "setup", "container", "container_mounts", "sbatch",
)  # fmt: skip
LAUNCHERS: dict[str, Launcher] = {"local": Launcher((), run_local), "slurm": Launcher(SLURM_KEYS, run_slurm)}
"""``launch.name`` -> launcher."""

if __name__ == "__main__":  # torchrun with the exit codes above: what a Slurm job runs on every node
    sys.exit(supervise(sys.argv[1:], resumable=True))
