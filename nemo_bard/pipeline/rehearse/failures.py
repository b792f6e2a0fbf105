"""Why a rehearsal failed, in one line."""

from __future__ import annotations

import errno
import platform
from pathlib import Path

from nemo_bard.base.errors import USER_ERRORS, one_line
from nemo_bard.pipeline.rehearse.derive import STEPS
from nemo_bard.pipeline.rehearse.watch import Measured

FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
NO_MEMORY = ("can't allocate memory", "not enough memory", "out of memory")
"""How a RuntimeError says that there is no memory left, on the CPU and in libraries of CUDA."""


def explain(
    error: Exception, *, stage: str | None, measured: Measured, rank: int, lower: str, folder: Path
) -> str | None:
    """What a user needs to know of an error; None if it is no user's to mend.

    Args:
        error: What was raised.
        stage: The stage that was rehearsed; None before the first one.
        measured: How far this rank got with it.
        rank: This one.
        lower: What lowers the memory of the stage; may be empty.
        folder: Where the rehearsal writes.
    """
    where = "" if stage is None else f"stage {stage}: "
    if out_of_memory(error):
        change = f"; change {lower}" if lower else ""
        return f"{where}out of memory on rank {rank} (node {platform.node()}) {when(measured)}{change}"
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"{where}disk too small: {error.strerror} in {folder}; make room or lower keep_last"
    return one_line(error) if isinstance(error, USER_ERRORS) else None


def out_of_memory(error: Exception) -> bool:
    """Whether memory was too small, that of a GPU or of the machine."""
    import torch

    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in NO_MEMORY)


def when(measured: Measured) -> str:
    """How far a stage was when something happened."""
    if len(measured.steps) == STEPS:
        return "after training"
    if measured.row_length is None:
        return "before the first step"
    return f"in step {len(measured.steps) + 1} of {STEPS} with rows of {measured.row_length} tokens"
