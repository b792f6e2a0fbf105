"""One unit of work: some rows of a file become a part, its rejects and a record."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.layouts import lay_out
from nemo_bard.data.prepare.filters import Filter
from nemo_bard.data.prepare.folder import FILTERED, REJECTED, SAMPLE, OutFolder, UnitRecord, UnitRows
from nemo_bard.data.prepared.layout import File
from nemo_bard.data.prepared.writer import PartWriter
from nemo_bard.data.raw import Unit, open_unit, read_unit
from nemo_bard.data.raw.unit import Rows, printable
from nemo_bard.data.sample import RejectedError, Sample
from nemo_bard.data.vetting import VetSettings, content_key, vet

READ_ON = ("parquet",)
"""Formats in which a row by its number costs more than the rows before it."""


class Stopped(Exception):
    """Raised in a unit that is to be left, because the run ends."""


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Rows of a unit of raw data: all of them, or some, where each may have images in files of their own."""

    unit: Unit
    first: int
    stop: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the unit."""
        return self.rows == self.unit.rows

    @property
    def rows(self) -> int:
        """How many."""
        return self.stop - self.first

    @classmethod
    def of(cls, unit: Unit, rows: int) -> Iterator[Piece]:
        """The pieces of a unit, in order, of at most ``rows`` rows each."""
        for first in range(0, unit.rows, rows):
            yield cls(unit=unit, first=first, stop=min(first + rows, unit.rows))


@dataclass(frozen=True, kw_only=True)
class UnitTask:
    """What a worker has to know."""

    out: Path
    source: str
    number: int
    piece: Piece
    state: Mapping[str, int]
    """Size and time of its file, as planned."""
    layout: str
    root_dir: str | None
    filters: tuple[Filter, ...]
    settings: VetSettings
    with_keys: bool
    """Whether duplicates are looked for."""
    most: int | None
    """Samples after which the rest of the unit need not be read."""


def file_state(file: str) -> dict[str, int]:
    """Size and time of an input file."""
    stat = os.stat(file)
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns}


class _Rows:
    """Collects what becomes of the rows of a unit."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.rows: list[int] = []
        self.fates: list[int] = []
        self.keys: list[bytes] = []
        self.rejects: list[dict[str, Any]] = []

    def add(self, row: int, fate: int) -> None:
        self.rows.append(row)
        self.fates.append(fate)

    def reject(self, row: int, name: str | None, error: RejectedError) -> None:
        self.add(row, REJECTED)
        self.rejects.append({"row": row, "id": name, "kind": error.kind, "reason": one_line(error)})
        if self.unit.format == "images":
            image = Path(self.unit.file, self.unit.place[row - self.unit.start])
            self.rejects[-1]["file"] = printable(image)

    def arrays(self) -> UnitRows:
        return UnitRows(
            rows=np.array(self.rows, dtype=np.int64),
            fates=np.array(self.fates, dtype=np.int16),
            keys=np.array(self.keys, dtype="S16"),
        )


def do_unit(task: UnitTask, stopped: Callable[[], bool]) -> UnitRecord:
    """Do a unit.

    Args:
        task: The unit.
        stopped: Asked before every row whether to leave it.

    Returns:
        The record, which has been written.

    Raises:
        ValueError: If the file cannot be read any more or has changed, or the layout does not work.
        OSError: If a file cannot be written.
        Stopped: If ``stopped`` says so.
    """
    folder, found = OutFolder(task.out), _Rows(task.piece.unit)
    path = folder.part(task.source, task.number)
    folder.forget_unit(task.source, task.number)
    with _naming(path), ExitStack() as stack:
        part: PartWriter | None = None
        for number, sample in enumerate(_samples(task, found, stopped), 1):
            if part is None:
                part = stack.enter_context(PartWriter(path, task.source))
            part.add(sample)
            if number == task.most:
                break
        _check_state(task)
    written: File | None = None if part is None else part.file
    record = UnitRecord(part=written, read=len(found.rows), rejects=found.rejects)
    folder.write_unit(task.source, task.number, record, found.arrays())
    return record


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Give errors of the system the name of the part, where they have none."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def _samples(task: UnitTask, found: _Rows, stopped: Callable[[], bool]) -> Iterator[Sample]:
    """The samples of a unit; what becomes of each row goes into ``found``."""
    file = Path(task.piece.unit.file)
    root_dir = Path(task.root_dir or (file if file.is_dir() else file.parent))
    stem = printable(file.name)
    for row, raw in _rows(task):
        if stopped():
            raise Stopped
        name: str | None = None
        try:
            if isinstance(raw, RejectedError):
                raise raw
            name = _own_id(raw)
            record = lay_out(task.layout, raw)
            name = record.id if record.id is not None else name
            column = next((i for i, one in enumerate(task.filters) if not one.keeps(record.facts)), None)
            if column is not None:
                found.add(row, FILTERED + column)
                continue
            sample = vet(record, root_dir=root_dir, name=f"{stem}:{row}", settings=task.settings)
        except RejectedError as error:
            found.reject(row, name, error)
            continue
        found.add(row, SAMPLE)
        if task.with_keys:
            found.keys.append(content_key(sample))
        yield sample


def _own_id(raw: Mapping[str, Any]) -> str | None:
    """What a row calls itself, for the list of rejects."""
    name = raw.get("id")
    return str(name) if isinstance(name, (str, int)) and not isinstance(name, bool) else None


def _rows(task: UnitTask) -> Iterator[tuple[int, Any]]:
    """The rows of the file; what the system refuses is told with the file's name."""
    rows = read_piece(task.piece)
    while True:
        try:
            row = next(rows, None)
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else None
            raise ValueError(
                f"source {task.source}: {printable(task.piece.unit.file)} cannot be read any more"
                f" ({why or one_line(error)}); when it is there again, the same command goes on"
            ) from error
        if row is None:
            return
        yield row


def read_piece(piece: Piece) -> Iterator[tuple[int, Any]]:
    """Read rows, with their numbers in the file; what cannot be read is a ``RejectedError`` in its place."""
    unit = piece.unit
    if piece.whole or unit.format in READ_ON:
        yield from islice(read_unit(unit), piece.first, piece.stop)
        return
    rows = _opened(unit)
    for number in range(piece.first, piece.stop):
        try:
            row: Any = rows[number]
        except RejectedError as error:
            row = error
        yield unit.start + number, row


@lru_cache(maxsize=1)
def _opened(unit: Unit) -> Rows:
    """A unit whose pieces this process reads, one after the other."""
    return open_unit(unit)


def _check_state(task: UnitTask) -> None:
    try:
        same = file_state(task.piece.unit.file) == task.state
    except OSError:
        same = False
    if not same:
        raise ValueError(
            f"source {task.source}: {printable(task.piece.unit.file)} was changed while it was read; use another OUT"
        )
