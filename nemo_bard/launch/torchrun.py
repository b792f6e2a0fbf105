"""torchrun: how many workers, how they are started and stopped, and what their exit codes mean."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from nemo_bard.base.errors import EXIT_USER_ERROR
from nemo_bard.launch.exits import EXIT_PREEMPTED, FORWARDED_SIGNALS, NODES, PREEMPTION_SIGNALS
from nemo_bard.upstream.console import hush


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


def node_options(environment: Mapping[str, str]) -> list[str]:
    """Options of torchrun on one node of a Slurm job: its own address, and whether the nodes meet at it.

    Otherwise torchrun asks the machine for its name, which other nodes may not know and which may be ``localhost``.

    Args:
        environment: With the job's ``NEMO_BARD_NODES`` and Slurm's name of this node; nothing is said without.
    """
    addresses = dict(entry.split("=", 1) for entry in environment.get(NODES, "").split())
    name = environment.get("SLURMD_NODENAME")
    if name not in addresses:
        return []
    is_host = int(name == next(iter(addresses)))
    return [f"--local-addr={addresses[name]}", f"--rdzv-conf=is_host={is_host}"]


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
