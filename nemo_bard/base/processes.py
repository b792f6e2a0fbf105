"""Processes that must not outlive the one that started them."""

from __future__ import annotations

import os
import signal
import sys
import threading

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process, at once, when its parent ends, however that comes about.

    Args:
        parent: Process that started this one; if it is gone already, this one ends now.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    elif not any(thread.name == _WATCH for thread in threading.enumerate()):
        threading.Thread(target=_watch, name=_WATCH, daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


_WATCH = "die with parent"


def _watch() -> None:
    """Where the kernel does not tell: wait for the parent's end."""
    import multiprocessing

    if (parent := multiprocessing.parent_process()) is not None:
        parent.join()
    os._exit(1)
