"""What the processes of a run tell each other: exit codes, signals, and the files of a job that goes on by itself."""

from __future__ import annotations

import os
from pathlib import Path

EXIT_PREEMPTED = 75
"""Stopped by a signal with everything saved: run the same command again (EX_TEMPFAIL of sysexits.h)."""
PREEMPTION_SIGNALS = ("SIGTERM", "SIGUSR1")
"""Signals that end a run at the next step, with a checkpoint."""
FORWARDED_SIGNALS = "SIGTERM,SIGUSR1,SIGINT,SIGHUP,SIGQUIT"
JOB_FILES = "NEMO_BARD_JOB"
"""Environment variable of a job that goes on by itself: what its files' names begin with."""
NODES = "NEMO_BARD_NODES"
"""Environment variable of a job on several nodes: ``name=address`` of each, the one where all meet first."""
FAILURES, COMPLETE = ".failures", ".complete"
"""Ends of the names of its files: goes that have failed since the last checkpoint, a line each; the chain is complete."""


def under_torchrun() -> bool:
    """Whether a launcher has started this process as one of several (it sets ``RANK`` and ``WORLD_SIZE``)."""
    return {"RANK", "WORLD_SIZE", "LOCAL_RANK"} <= os.environ.keys()


def note_progress() -> None:
    """Tell the job, if this is a worker of one, that it gets on: a checkpoint is written or a stage finished."""
    if prefix := os.environ.get(JOB_FILES):
        Path(prefix + FAILURES).unlink(missing_ok=True)


def note_complete() -> None:
    """Tell the job, if this is a worker of one, that nothing is left to do, whatever happens to its processes now."""
    if prefix := os.environ.get(JOB_FILES):
        Path(prefix + COMPLETE).touch()
