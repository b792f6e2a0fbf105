"""``prepare``: all units of all sources, then the manifest."""

from __future__ import annotations

import dataclasses
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from nemo_bard import __version__
from nemo_bard.base.files import is_locked, locked
from nemo_bard.data.prepare import lengths
from nemo_bard.data.prepare.fold import Fold, RejectsFile, SourceWork
from nemo_bard.data.prepare.folder import WORKERS_LOCK, OutFolder, UnitRecord
from nemo_bard.data.prepare.mix import Mix
from nemo_bard.data.prepare.plan import PlannedSource, describe, plan_source, settle
from nemo_bard.data.prepare.progress import Progress
from nemo_bard.data.prepare.unit import do_unit
from nemo_bard.data.prepare.workers import ENDING, Workers, wait_for_workers_of_others
from nemo_bard.data.prepared.layout import Manifest, SourceEntry, is_prepared, load_manifest
from nemo_bard.data.raw.unit import printable

LOCK_SECONDS = 1.0


class Interrupted(BaseException):
    """Raised where the work is left because a signal asked for it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def prepare(
    mix: Mix, out: Path, *, jobs: int = 1, retry: bool = False, say: Callable[[str], None] = lambda _: None
) -> Manifest:
    """Make the prepared folder of a mixture, or go on with it.

    Args:
        mix: See ``mix.read_mix``.
        out: The folder.
        jobs: Worker processes; with 0 or 1 the work is done in this one.
        retry: Do units again in which rows were rejected.
        say: Gets lines for the user.

    Returns:
        What the folder holds.

    Raises:
        ValueError: If an input cannot be read, ``out`` is not of this mixture, or too many rows cannot be used.
        OSError: If a file cannot be written.
        RunError: If a worker is gone.
        Interrupted: If a signal asked to stop.
    """
    folder, names = OutFolder(out), [source.name for source in mix.sources]
    with ExitStack() as stack:
        stack.enter_context(_signals())
        folder.check_own()
        if is_locked(out):
            raise ValueError(f"OUT {out} is in use by another run")
        if mix.model is not None:
            lengths.make_collator(mix.model)
        planned = [plan_source(source, out) for source in mix.sources]
        stack.enter_context(locked(out, key="OUT", wait_seconds=LOCK_SECONDS))
        folder.check_own()
        finished = is_prepared(out)
        if finished and retry:
            raise ValueError(f"OUT {out} is whole already, --retry is for one that is not; prepare into another folder")
        settle(folder, describe(mix, planned), finished=finished)
        wait_for_workers_of_others(folder.state / WORKERS_LOCK)
        folder.sweep(names)
        workers = stack.enter_context(Workers(jobs, folder.state / WORKERS_LOCK))
        if finished:
            manifest = _renew(mix, load_manifest(out))
            say(f"{out} is whole already")
        else:
            manifest = _make(mix, planned, folder, workers, retry=retry, say=say)
        if mix.model is not None:
            lengths.measure_all(folder, manifest, mix.model, workers, say)
        if not finished or manifest != load_manifest(out):
            manifest.write(out)
        folder.forget_units()
    return manifest


@contextmanager
def _signals() -> Iterator[None]:
    """Turn signals that ask for an end into ``Interrupted``; a second one ends the process at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous: dict[int, Any] = {}

    def stop(number: int, _frame: FrameType | None) -> None:
        for one in previous:
            signal.signal(one, signal.SIG_DFL)
        raise Interrupted(number)

    for number in ENDING:
        previous[number] = signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _renew(mix: Mix, manifest: Manifest) -> Manifest:
    """The manifest of a whole folder with the settings of the file as it is now; they change no sample."""
    sections = {source.name: dict(source.section) for source in mix.sources}
    sources = [dataclasses.replace(entry, settings=sections[entry.name]) for entry in manifest.sources]
    return dataclasses.replace(manifest, sources=sources, settings=dict(mix.section))


def _make(
    mix: Mix,
    planned: list[PlannedSource],
    folder: OutFolder,
    workers: Workers,
    *,
    retry: bool,
    say: Callable[[str], None],
) -> Manifest:
    """Do all units that are not done, and put them together."""
    works = [
        SourceWork(
            index=i,
            source=one.source,
            layout=one.layout,
            files=[printable(piece.unit.file) for piece in one.pieces],
            rows=one.rows,
        )
        for i, one in enumerate(planned)
    ]
    with RejectsFile(folder.path) as rejects:
        fold = Fold(folder, works, rejects)
        total = sum(one.rows for one in planned)
        with Progress("preparing", total, "row", say) as progress:
            _Schedule(planned, folder, workers, fold, progress, retry=retry).run()
        rejects.publish()
    for entry in fold.entries:
        folder.keep_parts(entry.name, [part.name for part in entry.parts])
    return Manifest(sources=fold.entries, settings=dict(mix.section), version=__version__)


class _Schedule:
    """Hands units out in order, and puts them together in order as they are finished."""

    def __init__(
        self,
        planned: list[PlannedSource],
        folder: OutFolder,
        workers: Workers,
        fold: Fold,
        progress: Progress,
        *,
        retry: bool,
    ) -> None:
        self.planned, self.folder, self.workers = planned, folder, workers
        self.fold, self.progress, self.retry = fold, progress, retry
        self.ready: dict[tuple[int, int], UnitRecord] = {}
        self.source = self.unit = 0
        """The next unit to hand out."""
        self.folded = 0
        """Units of the fold's current source that are put together."""

    def run(self) -> None:
        """Do it all."""
        while self.fold.current is not None:
            self._hand_out()
            self._put_together()
            if self.fold.current is None or not self.workers.busy:
                continue
            for task, record in self.workers.next():
                where = self._index(task.source), task.number
                self.ready[where] = record
                rows = self.planned[where[0]].pieces[where[1]].rows
                self.progress.update(rows, 0 if record.part is None else record.part.bytes)
            self._put_together()
            self.progress.tell(self.fold.counts)
        self.workers.abandon()  # units beyond a limit

    def _index(self, name: str) -> int:
        return next(i for i, one in enumerate(self.planned) if one.source.name == name)

    def _hand_out(self) -> None:
        while self.source < len(self.planned) and self.workers.busy < self.workers.capacity:
            one = self.planned[self.source]
            if self.unit == len(one.pieces):
                self.source, self.unit = self.source + 1, 0
                continue
            folded = self.folded if self._current() == self.source else 0
            if one.source.options.limit and self.unit - folded >= self.workers.capacity:
                return
            self._begin(one, self.unit)
            self.unit += 1

    def _begin(self, one: PlannedSource, number: int) -> None:
        """Let a unit be done, unless an earlier run has."""
        record = self.folder.read_record(one.source.name, number)
        if record is not None and not (self.retry and record.rejects):
            self.ready[self.source, number] = record
            self.progress.skip(one.pieces[number].rows)
            return
        with_keys = self.fold.needs_keys(self.fold.works[self.source])
        self.workers.submit(do_unit, one.task(self.folder, number, with_keys=with_keys))

    def _current(self) -> int:
        work = self.fold.current
        return -1 if work is None else work.index

    def _put_together(self) -> None:
        while (work := self.fold.current) is not None:
            if self.folded < len(work.files):
                record = self.ready.pop((work.index, self.folded), None)
                if record is None:
                    return
                enough = self.fold.add(self.folded, record)
                self.folded += 1
                if not enough and self.folded < len(work.files):
                    continue
            self._finish(work)

    def _finish(self, work: SourceWork) -> None:
        """Finish a source; of its units that were begun nothing is waited for."""
        entry = self.fold.finish_source()
        one = self.planned[work.index]
        if self.source == work.index:
            left = one.pieces[self.unit :]
            self.progress.skip(sum(piece.rows for piece in left))
            self.source, self.unit = work.index + 1, 0
        self.folded = 0
        self.ready = {where: record for where, record in self.ready.items() if where[0] > work.index}
        self.progress.say(describe_source(entry))


def describe_source(entry: SourceEntry) -> str:
    """One line of what became of a source's rows."""
    left = {**entry.filtered, **entry.rejected}
    why = "".join(f", {name} {count:,}" for name, count in sorted(left.items(), key=lambda pair: -pair[1]))
    return f"source {entry.name}: {entry.rows:,} samples of {entry.read:,} rows{why}"
