"""How a command ends: wrong input and refusals of the system as one line, and the exit code that goes with them."""

from __future__ import annotations

import errno
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import TypeVar

from nemo_bard.base.errors import EXIT_USER_ERROR, USER_ERRORS, RunError, one_line

Code = TypeVar("Code", int, int | None)
FULL_DISK = (errno.ENOSPC, errno.EDQUOT)
READ_ONLY = (errno.EROFS, errno.ENAMETOOLONG)
"""What will be refused again."""
REQUIRED = ("av", "datasets", "hydra", "megatron", "nemo_automodel", "omegaconf", "pyarrow", "qwen_vl_utils")
"""Modules of the requirements that are not there where nemo-bard was installed without them, beside vLLM."""


def exit_code_of(run: Callable[[], Code]) -> Code | int:
    """Run something and return its exit code, or None if it has none yet; wrong input is told in one line."""
    try:
        return run()
    except (*USER_ERRORS, RunError) as error:
        if os.environ.get("NEMO_BARD_DEBUG") == "1":
            raise
        rank = f"[rank {os.environ['RANK']}] " if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
        sys.stderr.write(f"error: {rank}{one_line(error)}\n")
        return 1 if isinstance(error, RunError) else EXIT_USER_ERROR
    except ModuleNotFoundError as error:
        return say_missing(error)
    except OSError as error:
        if error.errno not in (*FULL_DISK, *READ_ONLY) or os.environ.get("NEMO_BARD_DEBUG") == "1":
            raise
        where = f" ({error.filename})" if error.filename else ""
        if error.errno in READ_ONLY:
            sys.stderr.write(f"error: {error.strerror}{where}\n")
            return EXIT_USER_ERROR
        sys.stderr.write(f"error: {error.strerror}{where}; make room and run the same command again\n")
        return 1


def say_missing(error: ModuleNotFoundError) -> int:
    """Say that a requirement is not installed and return the exit code; raise the error if it is about anything else."""
    module = (error.name or "").split(".")[0]
    if module not in REQUIRED or importlib.util.find_spec(module) or os.environ.get("NEMO_BARD_DEBUG") == "1":
        raise error
    sys.stderr.write(
        f"error: this needs {module}, which is not installed here; nemo-bard doctor says what is missing\n"
    )
    return 1
