"""CSV and TSV: quoted fields may hold line ends, so that only reading tells where a row ends."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.raw import lines
from nemo_bard.data.raw.unit import UNIT_BYTES, ByteRows, Row, Unit, printable
from nemo_bard.data.sample import RejectedError

FIELD_BYTES = 1 << 28
"""Longest field; the csv module's own limit is made for smaller tables."""
_BOM = b"\xef\xbb\xbf"


def units(file: str) -> Iterator[Unit]:
    """Cut a table; its first row names the columns.

    Raises:
        ValueError: If the columns have no or the same names, or a quote does not close.
    """
    name = printable(file)
    with open(file, "rb") as stream:
        end = lines.text_end(stream.fileno(), b"\r\n")  # a tab at the end is an empty field
    scanned = _scan(file, 0, end)
    header = next(scanned, None)
    if header is None:
        return
    begin, fields = header[1], _header(header[2], name)
    start = rows = 0
    stop = begin
    for row_begin, stop, found in scanned:
        if isinstance(found, RejectedError) and found.kind == "unreadable_file":
            raise ValueError(f"{name}: the quote that row {start + rows} opens does not close")
        if rows and stop - begin > UNIT_BYTES:
            yield _unit(file, start, rows, (begin, row_begin), fields)
            begin, start, rows = row_begin, start + rows, 0
        rows += 1
    if rows:
        yield _unit(file, start, rows, (begin, stop), fields)


def _unit(file: str, start: int, rows: int, span: tuple[int, int], fields: tuple[str, ...]) -> Unit:
    place = (*span, fields)
    return Unit(file=file, format="csv", start=start, rows=rows, bytes=span[1] - span[0], place=place)


def _header(found: list[str] | RejectedError, name: str) -> tuple[str, ...]:
    if isinstance(found, RejectedError):
        raise ValueError(f"{name}: the names of the columns cannot be read ({found})")
    try:
        fields = _decoded(found)
    except RejectedError as error:
        raise ValueError(f"{name}: the names of the columns are not UTF-8") from error
    twice = next((field for field in fields if fields.count(field) > 1), None)
    if twice is not None:
        raise ValueError(f"{name}: the column {twice!r} is there twice")
    return tuple(fields)


def _scan(file: str, begin: int, end: int) -> Iterator[tuple[int, int, list[str] | RejectedError]]:
    """Begin, end and fields of each row of a range; each character of a field is a byte."""
    csv.field_size_limit(max(csv.field_size_limit(), FIELD_BYTES))
    at = begin
    with open(file, "rb") as stream:
        stream.seek(begin)

        def texts() -> Iterator[str]:
            nonlocal at
            while at < end:
                line = stream.readline()
                if not line:
                    return
                line, first = line[: end - at], at == 0
                at += len(line)
                yield (line.removeprefix(_BOM) if first else line).decode("latin-1")

        reader = csv.reader(texts(), delimiter="\t" if file.lower().endswith(".tsv") else ",", strict=True)
        while True:
            row_begin = at
            try:
                fields = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                kind = "unreadable_file" if at >= end and "end of data" in str(error) else "unreadable_row"
                yield row_begin, at, RejectedError(kind, f"the row cannot be read ({one_line(error)})")
            else:
                yield row_begin, at, fields


def _decoded(fields: list[str]) -> list[str]:
    try:
        return [field.encode("latin-1").decode("utf-8") for field in fields]
    except UnicodeDecodeError as error:
        raise RejectedError("not_utf8", f"the row is not UTF-8 ({one_line(error)})") from error


class TableRows(ByteRows):
    """Rows of a range of a table; an empty field is null."""

    def __iter__(self) -> Iterator[Row | RejectedError]:
        """Read on from row to row."""
        begin, end, _ = self.unit.place
        for _, _, found in _scan(self.unit.file, begin, end):
            try:
                yield self._row(found)
            except RejectedError as error:
                yield error

    def __getitem__(self, number: int) -> Row:
        """Read a row."""
        begin, end = self._spans[number]
        return self._row(next(_scan(self.unit.file, int(begin), int(end)))[2])

    @cached_property
    def _spans(self) -> np.ndarray:
        """Begin and end of each row, ``[rows, 2]``."""
        begin, end, _ = self.unit.place
        spans = ((row_begin, row_end) for row_begin, row_end, _ in _scan(self.unit.file, begin, end))
        try:
            return np.fromiter(spans, np.dtype((np.int64, 2)), count=len(self))
        except ValueError as error:
            raise RejectedError("unreadable_row", "the file was changed since it was opened") from error

    def _row(self, found: list[str] | RejectedError) -> Row:
        if isinstance(found, RejectedError):
            raise found
        columns = self.unit.place[2]
        if len(found) != len(columns):
            raise RejectedError("unreadable_row", f"{len(found)} fields in a table of {len(columns)} columns")
        return {column: field or None for column, field in zip(columns, _decoded(found), strict=True)}
