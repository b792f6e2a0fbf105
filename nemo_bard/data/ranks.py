"""Work on the samples of a data set, dealt out over the ranks of a run, none of which waits long for another.

Ranks work in rounds of some seconds and tell each other after each how far they are. So a data set may take hours, while a
rank that is dead, or gives no sign of life for too long, ends the run. Nothing has to be on a file system that all see.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Self, TypeVar, cast

import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from nemo_bard.base.errors import RunError, one_line
from nemo_bard.data.rejects import ERRORS

logger = logging.getLogger(__name__)

ROUND_SECONDS = 10.0
LINE_SECONDS = 60.0
"""Between two log lines that say how far all ranks are."""
CHUNK = 64
"""Samples that are dealt out together."""
_NAMED = 8

T = TypeVar("T")


class Ranks:
    """The ranks that share the work; this process alone if nothing is said.

    Args:
        group: A gloo process group of them all.
        patience: How long a rank may give no sign of life.
    """

    def __init__(self, group: Any = None, patience: timedelta = timedelta(minutes=30)) -> None:
        self._group, self._patience = group, patience
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)

    @classmethod
    @contextlib.contextmanager
    def together(cls, patience: timedelta) -> Iterator[Self]:
        """All ranks of the run; each of them enters at about the same time."""
        if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
            yield cls()
            return
        group: Any = dist.new_group(backend="gloo", timeout=patience)
        try:
            yield cls(group, patience)
        finally:
            dist.destroy_process_group(group)

    def exchange(self, value: T, doing: str) -> list[T]:
        """Return what every rank has, by rank.

        Args:
            value: Picklable.
            doing: What the ranks are at, for the error.

        Raises:
            RunError: If a rank is gone or gives no sign of life; the first rank says which.
        """
        if self.size == 1:
            return [value]
        try:
            dist.monitored_barrier(self._group, timeout=self._patience, wait_all_ranks=True)
            values: list[Any] = [None] * self.size
            dist.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            minutes = self._patience.total_seconds() / 60
            who = one_line(error).removeprefix("[Rank 0]: ") if self.rank == 0 else "no answer from rank 0"
            raise RunError(f"{doing}: a rank is gone or stands still, {minutes:g} minutes are given ({who})") from error
        return values

    def on_all(self, function: Callable[[], T], doing: str) -> T:
        """Run ``function`` on every rank and return its own result.

        Raises:
            ValueError: On every rank the same, if it raised one on any, or an OSError.
            RunError: As ``exchange``.
        """
        result, failure = self._attempt(function)
        for told in self.exchange(failure, doing):
            if told is not None:
                raise ValueError(told)
        return cast("T", result)

    def on_first(self, function: Callable[[], T], doing: str) -> T:
        """Run ``function`` on the first rank and return its result, which must be picklable, on every rank.

        Raises:
            ValueError: On every rank the same, if it raised one, or an OSError.
            RunError: As ``exchange``.
        """
        result, failure = self._attempt(function) if self.rank == 0 else (None, None)
        result, failure = self.exchange((result, failure), doing)[0]
        if failure is not None:
            raise ValueError(failure)
        return cast("T", result)

    @staticmethod
    def _attempt(function: Callable[[], T]) -> tuple[T | None, str | None]:
        try:
            return function(), None
        except (ValueError, OSError) as error:
            return None, one_line(error)


@dataclass(frozen=True)
class _Failure:
    """The first sample of a chunk that the work cannot be done on."""

    index: int
    reason: str


class _Chunks(Dataset[Any]):
    """The work on ``CHUNK`` samples each, for a data loader's workers."""

    def __init__(self, function: Callable[[int], Any], join: Callable[[list[Any]], Any], num_samples: int) -> None:
        self.function, self.join, self.num_samples = function, join, num_samples

    def __len__(self) -> int:
        return -(-self.num_samples // CHUNK)

    def __getitem__(self, chunk: int) -> tuple[int, Any]:
        indices = range(chunk * CHUNK, min((chunk + 1) * CHUNK, self.num_samples))
        results = []
        for index in indices:
            try:
                results.append(self.function(index))
            except ERRORS as error:
                return len(results), _Failure(index, one_line(error))
        return len(results), self.join(results)


def _as_it_is(value: Any) -> Any:
    return value


def deal_out(
    function: Callable[[int], Any],
    num_samples: int,
    *,
    join: Callable[[list[Any]], Any] = len,
    ranks: Ranks | None = None,
    num_workers: int = 0,
    doing: str,
) -> list[Any]:
    """Do something with every sample, once, on one of the ranks.

    Args:
        function: From the number of a sample to a result.
        num_samples: The same on all ranks.
        join: From the results of ``CHUNK`` samples to what is kept of them, which must be picklable.
        ranks: Who takes part; each of them calls this. This process alone if None.
        num_workers: Processes of each rank that work.
        doing: What it is, for progress and errors.

    Returns:
        What ``join`` made of all samples, in order, on every rank.

    Raises:
        ValueError: On every rank the same: what ``function`` says of the first sample, of those that were
            found by then, that it cannot work on.
        RunError: As ``Ranks.exchange``.
    """
    ranks = ranks or Ranks()
    chunks = _Chunks(function, join, num_samples)
    own = range(ranks.rank, len(chunks), ranks.size)
    items = iter(DataLoader(chunks, batch_size=None, sampler=own, num_workers=num_workers, collate_fn=_as_it_is))
    kept: list[Any] = []
    done, said = 0, time.monotonic()
    shown = None if ranks.rank == 0 else True  # None: only on a terminal
    with tqdm(total=num_samples, desc=doing, unit="sample", disable=shown, delay=2) as bar:
        while True:
            failure, end = None, time.monotonic() + ROUND_SECONDS
            while failure is None and len(kept) < len(own) and time.monotonic() < end:
                number, result = next(items)
                done += number
                bar.update(number)
                failure = result if isinstance(result, _Failure) else None
                kept.append(result)
            states = ranks.exchange((done, len(kept) == len(own), failure), doing)
            if failures := [failure for _, _, failure in states if failure is not None]:
                raise ValueError(min(failures, key=lambda failure: failure.index).reason)
            bar.update(sum(state[0] for state in states) - bar.n)
            if all(finished for _, finished, _ in states):
                break
            if ranks.rank == 0 and time.monotonic() - said >= LINE_SECONDS:
                said = time.monotonic()
                logger.warning("%s", _line(states, num_samples, doing))
    parts = ranks.exchange(kept, doing)
    return [parts[chunk % ranks.size][chunk // ranks.size] for chunk in range(len(chunks))]


def _line(states: Sequence[tuple[int, bool, Any]], num_samples: int, doing: str) -> str:
    """How far all ranks are, and which are waited for if some have finished."""
    done = sum(state[0] for state in states)
    text = f"{doing}: {done} of {num_samples} samples ({100 * done / num_samples:.1f} %)"
    late = [str(rank) for rank, (_, finished, _) in enumerate(states) if not finished]
    if len(late) < len(states):
        text += f", waiting for rank {', '.join(late[:_NAMED])}{', ...' if len(late) > _NAMED else ''}"
    return text
