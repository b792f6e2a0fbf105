"""Parquet and Arrow: units are row groups, or rows of a memory-mapped file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.raw.unit import UNIT_BYTES, Row, Rows, Unit, printable
from nemo_bard.data.sample import RejectedError

BATCH_ROWS = 16
"""Rows of a Parquet file that are in memory at a time when it is read from its start to its end."""
_END = b"\xff\xff\xff\xff\0\0\0\0"
"""The end of an Arrow stream; readers take a stream without it that was cut between two batches for a whole one."""


def _errors() -> tuple[type[BaseException], ...]:
    import pyarrow

    return (pyarrow.ArrowException, OSError, ValueError)


def parquet_units(file: str) -> Iterator[Unit]:
    """Cut a Parquet file between row groups.

    Raises:
        ValueError: If it is damaged, such as one that was not written to its end.
    """
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            groups = [table.metadata.row_group(number) for number in range(table.num_row_groups)]
            sizes = [(group.num_rows, group.total_byte_size) for group in groups]
            if min((size for _, size in sizes), default=0) < 0 or min((rows for rows, _ in sizes), default=0) < 0:
                raise ValueError("a row group is of a negative size")
            if sum(rows for rows, _ in sizes) != table.metadata.num_rows:
                raise ValueError("its row groups are not all its rows")
    except _errors() as error:
        raise ValueError(f"{printable(file)} cannot be read as Parquet ({one_line(error)})") from error
    first = start = rows = size = 0
    for number, (group_rows, group_size) in enumerate(sizes):
        if rows and size + group_size > UNIT_BYTES:
            yield _parquet_unit(file, start, rows, size, (first, number))
            first, start, rows, size = number, start + rows, 0, 0
        rows, size = rows + group_rows, size + group_size
    if rows:
        yield _parquet_unit(file, start, rows, size, (first, len(sizes)))


def _parquet_unit(file: str, start: int, rows: int, size: int, groups: tuple[int, int]) -> Unit:
    return Unit(file=file, format="parquet", start=start, rows=rows, bytes=size, place=groups)


def parquet_columns(file: str) -> list[str]:
    """Names of the columns."""
    import pyarrow.parquet

    return pyarrow.parquet.read_schema(file).names


class ParquetRows(Rows):
    """Rows of some row groups. A row by its number costs a whole row group, of which the last is kept."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit)
        self._kept: tuple[int, Any] | None = None
        self._table: tuple[int, Any] | None = None

    def __iter__(self) -> Iterator[Row | RejectedError]:
        """Read on in batches of ``BATCH_ROWS``; rows behind a damage in a row group are errors."""
        first, end = self.unit.place
        for group in range(first, end):
            left = self._rows_of(group)
            reason: BaseException = ValueError("it ends early")
            try:
                for batch in self._open().iter_batches(BATCH_ROWS, row_groups=[group], use_threads=False):
                    yield from batch.slice(0, left).to_pylist()
                    left -= min(batch.num_rows, left)
            except _errors() as error:
                reason = error
            for _ in range(left):
                yield self._damaged(group, reason)

    def __getitem__(self, number: int) -> Row:
        """Read a row, and its row group if that is not the last one read."""
        place = int(np.searchsorted(self._edges, number, side="right")) - 1
        if self._kept is None or self._kept[0] != place:
            self._kept = None
            group = self.unit.place[0] + place
            try:
                table = self._open().read_row_group(group, use_threads=False)
                if table.num_rows != self._rows_of(group):
                    raise ValueError("it ends early")
                self._kept = place, table
            except _errors() as error:
                raise self._damaged(group, error) from error
        return self._kept[1].slice(number - int(self._edges[place]), 1).to_pylist()[0]

    def _damaged(self, group: int, error: BaseException) -> RejectedError:
        return RejectedError("unreadable_row", f"row group {group} cannot be read ({one_line(error)})")

    def _rows_of(self, group: int) -> int:
        return int(np.diff(self._edges)[group - self.unit.place[0]])

    @cached_property
    def _edges(self) -> np.ndarray:
        metadata, (first, end) = self._open().metadata, self.unit.place
        return np.cumsum([0, *(metadata.row_group(group).num_rows for group in range(first, end))])

    def _open(self) -> Any:
        import pyarrow.parquet

        if self._table is None or self._table[0] != os.getpid():  # processes must not share a place in a file
            table = pyarrow.parquet.ParquetFile(self.unit.file, buffer_size=1 << 20, pre_buffer=False)
            self._table = os.getpid(), table
        return self._table[1]

    def close(self) -> None:
        """Close the file."""
        if self._table is not None and self._table[0] == os.getpid():
            self._table[1].close()
        self._table = self._kept = None


def arrow_batches(file: str) -> tuple[Any, list[Any]]:
    """Schema and record batches of an Arrow file of either format, mapped into memory.

    Raises:
        ValueError: If it is damaged.
    """
    import pyarrow

    try:
        source = pyarrow.memory_map(file)
        try:
            reader = pyarrow.ipc.open_file(source)
            return reader.schema, [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pyarrow.ArrowInvalid:
            source.seek(0)
            stream = pyarrow.ipc.open_stream(source)
            batches = list(stream)
            if not _ends(file):
                raise ValueError("the mark at its end is missing, it was not written to its end") from None
            return stream.schema, batches
    except FileNotFoundError:
        raise
    except _errors() as error:
        raise ValueError(f"{printable(file)} cannot be read as Arrow ({one_line(error)})") from error


def _ends(file: str) -> bool:
    with open(file, "rb") as stream:
        stream.seek(-len(_END), os.SEEK_END)
        return stream.read() == _END


def arrow_units(file: str) -> Iterator[Unit]:
    """Cut an Arrow file between rows.

    Raises:
        ValueError: If it is damaged.
    """
    _, batches = arrow_batches(file)
    total, size = sum(batch.num_rows for batch in batches), os.stat(file).st_size
    if total == 0:
        return
    rows = max(total * UNIT_BYTES // max(size, 1), 1)
    for start in range(0, total, rows):
        number = min(rows, total - start)
        yield Unit(file=file, format="arrow", start=start, rows=number, bytes=size * number // total, place=(start,))


def arrow_columns(file: str) -> list[str]:
    """Names of the columns."""
    return arrow_batches(file)[0].names


class ArrowRows(Rows):
    """Rows of a memory-mapped Arrow file."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit)
        self._sound: set[int] = set()

    def __getitem__(self, number: int) -> Row:
        """Read a row."""
        edges, batches = self._batches
        row = self.unit.place[0] + number
        place = int(np.searchsorted(edges, row, side="right")) - 1
        try:
            if place not in self._sound:  # what offsets of a damaged file point at would end the process
                batches[place].validate(full=True)
                self._sound.add(place)
            return batches[place].slice(row - int(edges[place]), 1).to_pylist()[0]
        except _errors() as error:
            raise RejectedError("unreadable_row", f"the row cannot be read ({one_line(error)})") from error

    @cached_property
    def _batches(self) -> tuple[np.ndarray, list[Any]]:
        try:
            _, batches = arrow_batches(self.unit.file)
        except ValueError as error:
            raise RejectedError("unreadable_file", one_line(error)) from error
        return np.cumsum([0, *(batch.num_rows for batch in batches)]), batches
