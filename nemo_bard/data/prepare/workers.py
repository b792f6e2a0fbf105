"""Worker processes that do units, and end when this process does."""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import RunError
from nemo_bard.base.files import LOCK_WAIT_SECONDS, NO_LOCKS
from nemo_bard.base.processes import die_with

Job = Callable[[Any, Callable[[], bool]], Any]
"""From a task, and a question whether to stop, to a result; a function of a module."""

ENDING = (signal.SIGINT, signal.SIGTERM)
"""Signals that ask for an end; the main process answers them."""

_stop: Any = None
_lock: Any = None


class Workers:
    """Does tasks, in other processes or in this one; use as a context.

    Args:
        jobs: Processes; with 0 or 1 the work is done here.
        lock: File that workers hold (shared) while they live, so that nobody takes their folder over before.
    """

    def __init__(self, jobs: int, lock: Path) -> None:
        self.width = max(jobs, 1)
        self.capacity = 2 * jobs if jobs > 1 else 1
        """Tasks to hand out at a time: more than are done at once, so that no worker waits."""
        self._pool: ProcessPoolExecutor | None = None
        self._event: Any = None
        self._done: dict[Future[Any], Any] = {}
        self._stopped = False
        if jobs > 1:
            context = multiprocessing.get_context("spawn")
            self._event = context.Event()
            self._pool = ProcessPoolExecutor(
                jobs, mp_context=context, initializer=_start, initargs=(os.getpid(), self._event, str(lock))
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self._stopped = True
        if self._pool is not None:
            self._event.set()
            self._pool.shutdown(wait=True, cancel_futures=True)

    @property
    def busy(self) -> int:
        """Tasks that are not done yet, or not handed out by ``next``."""
        return len(self._done)

    def submit(self, job: Job, task: Any) -> None:
        """Let a task be done."""
        if self._pool is not None:
            with _telling_of_lost_workers(), _signals_held():  # what is started here inherits that
                self._done[self._pool.submit(_do, job, task)] = task
            return
        future: Future[Any] = Future()
        future.set_result(job(task, lambda: self._stopped))
        self._done[future] = task

    def abandon(self) -> None:
        """Leave all tasks that are not done, and wait until nobody works on them."""
        if self._pool is None:
            return
        for future in self._done:
            future.cancel()
        self._event.set()
        wait(self._done)
        self._done.clear()
        self._event.clear()

    def next(self) -> Iterator[tuple[Any, Any]]:
        """Wait for a task; returns those that are done, with their results.

        Raises:
            Exception: What a task raised.
            RunError: If a worker is gone.
        """
        finished, _ = wait(self._done, return_when=FIRST_COMPLETED)
        for future in finished:
            with _telling_of_lost_workers():
                result = future.result()
            yield self._done.pop(future), result


@contextlib.contextmanager
def _telling_of_lost_workers() -> Iterator[None]:
    try:
        yield
    except BrokenProcessPool as error:
        raise RunError(
            "a worker process ended without a word (killed, or out of memory?); the same command goes on, with fewer --jobs"
            " if memory is short"
        ) from error


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Let signals that ask for an end wait."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(parent: int, event: Any, lock: str) -> None:
    """Make a worker: it ends with its parent, leaves signals to it, and holds the lock."""
    global _stop, _lock
    die_with(parent)
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)
    _stop = event
    _lock = open(lock, "a")  # noqa: SIM115  (for life)
    os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"] = "1", "false"  # there is a worker per core
    with contextlib.suppress(OSError):  # a file system without locks; the main process has told it
        fcntl.flock(_lock, fcntl.LOCK_SH)
    die_with(parent)


def _do(job: Job, task: Any) -> Any:
    return job(task, _stop.is_set)


def wait_for_workers_of_others(lock: Path) -> None:
    """Wait until the workers of a killed run are gone; they end by themselves.

    Raises:
        ValueError: If they are not gone after a while.
    """
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError as error:
                if time.monotonic() >= deadline:
                    raise ValueError(f"workers of an earlier run still hold {lock}; end them first") from error
                time.sleep(0.1)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                return
