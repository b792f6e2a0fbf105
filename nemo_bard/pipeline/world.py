"""The processes of a run: agreeing on decisions, and stopping together when a signal says so."""

from __future__ import annotations

import datetime
import logging
import os
import pickle
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

from nemo_bard.base.errors import EXIT_USER_ERROR, USER_ERRORS
from nemo_bard.base.processes import die_with
from nemo_bard.launch.exits import PREEMPTION_SIGNALS, under_torchrun

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Preempted(Exception):
    """Raised where work is left because a signal asked for it."""


class StopSignal:
    """Remembers that a preemption signal came; recipes put their own handler on top while they train."""

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Take the preemption signals over."""
        for name in PREEMPTION_SIGNALS:
            number = signal.Signals[name]
            self._previous[number] = signal.signal(number, self._remember)

    def ignore(self) -> None:
        """Let the signals pass from now on, in a worker; elsewhere ``release`` comes next."""
        if under_torchrun():
            for number in self._previous:
                signal.signal(number, signal.SIG_IGN)
            self._previous.clear()

    def release(self) -> None:
        """Give them back."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        logger.warning("received %s: stopping at the next step", signal.Signals(number).name)
        self.received = True


def _travels(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return False
    return True


def die_with_launcher() -> None:
    """Let the kernel end this worker if torchrun is killed (Linux).

    Otherwise workers would train on without anyone waiting for them, and hold the run directory.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ and sys.platform == "linux":
        die_with(os.getppid())


class World:
    """All processes of a run; alone if no launcher started several.

    The process group that is made here serves all stages; NeMo AutoModel's recipes find it and use it.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ["RANK"]) if under_torchrun() else 0
        self.size = int(os.environ["WORLD_SIZE"]) if under_torchrun() else 1
        self.stop = StopSignal()
        self.watchers: list[Callable[[Any], object]] = []
        """Called with every recipe that is ready to train, before it does."""
        self._group: Any = None

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes files."""
        return self.rank == 0

    def connect(self, timeout_minutes: int) -> None:
        """Set up collectives; the agreements here go through the CPU, whatever training uses."""
        from nemo_bard.upstream import cpu

        cpu.apply()
        if self.size == 1:
            return
        import torch
        from nemo_automodel.components.distributed.init_utils import initialize_distributed

        initialize_distributed("nccl" if torch.cuda.is_available() else "gloo", timeout_minutes)
        self._group = torch.distributed.new_group(backend="gloo", timeout=datetime.timedelta(minutes=timeout_minutes))

    def on_main(self, function: Callable[[], T]) -> T:
        """Run ``function`` on rank 0 and return its result, which must be picklable, on every rank.

        Raises:
            Exception: What it raised, on every rank; if that is the user's to mend, the other ranks end in silence.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome = [function(), None]
            except Exception as error:
                if self.size == 1:
                    raise
                outcome = [None, error if _travels(error) else RuntimeError(f"{type(error).__name__}: {error}")]
        if self.size > 1:
            import torch

            torch.distributed.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            if isinstance(outcome[1], USER_ERRORS) and not self.is_main:
                raise SystemExit(EXIT_USER_ERROR)  # rank 0 tells it
            raise outcome[1]
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Return what every rank has, by rank."""
        if self.size == 1:
            return [value]
        import torch

        values: list[Any] = [None] * self.size
        torch.distributed.all_gather_object(values, value, group=self._group)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.gather(None)

    def should_stop(self) -> bool:
        """Whether any rank has received a preemption signal."""
        return any(self.gather(self.stop.received))
