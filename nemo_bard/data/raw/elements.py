"""JSON files: a list of rows, found by its brackets without reading it whole, or one object."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from functools import cached_property

import numpy as np

from nemo_bard.data.raw import lines
from nemo_bard.data.raw.unit import UNIT_BYTES, ByteRows, Row, Unit, printable
from nemo_bard.data.sample import RejectedError

CHUNK = 4 * 1024 * 1024
_STRING = rb'"(?:[^"\\]++|\\.)*+"'
_TO_BRACKET = re.compile(rb'(?:[^"{}\[\]]++|' + _STRING + rb")*+", re.DOTALL)
_TO_BRACKET_OR_COMMA = re.compile(rb'(?:[^"{}\[\],]++|' + _STRING + rb")*+", re.DOTALL)
_BOM = b"\xef\xbb\xbf"


def units(file: str) -> Iterator[Unit]:
    """Cut a JSON file: a list of rows, an object that is one row, or in truth JSON lines.

    Raises:
        ValueError: If it is none of these, or a list that does not end.
    """
    with open(file, "rb") as stream:
        handle = stream.fileno()
        end = lines.text_end(handle)
        head = stream.read(CHUNK).removeprefix(_BOM).lstrip()
        if head[:1] == b"[":
            yield from _list_units(file, handle, end)
        elif head[:1] == b"{":
            stream.seek(0)
            first, then = stream.readline(), stream.readline()
            if len(first) < end and (_is_row(first) or (_is_row(then) and not _is_row(os.pread(handle, end, 0)))):
                yield from lines.units(file)
            else:
                yield Unit(file=file, format="json", start=0, rows=1, bytes=end, place=(0, end))
        elif end > 0:
            raise ValueError(f"{printable(file)} must hold a list of JSON objects, or one")


def _is_row(text: bytes) -> bool:
    try:
        lines.json_row(text)
    except RejectedError as error:
        return error.kind == "layout"
    return True


def _list_units(file: str, handle: int, end: int) -> Iterator[Unit]:
    begin = os.pread(handle, CHUNK, 0).index(b"[") + 1
    start = rows = 0
    last = begin
    try:
        for element_begin, element_end in elements(handle, begin, end):
            if rows and element_end - begin > UNIT_BYTES:
                yield _unit(file, start, rows, begin, last)
                begin, start, rows = element_begin, start + rows, 0
            rows, last = rows + 1, element_end
    except ValueError as error:
        raise ValueError(f"{printable(file)}: {error}; row {start + rows} is the last one begun") from error
    if rows:
        yield _unit(file, start, rows, begin, last)


def _unit(file: str, start: int, rows: int, begin: int, end: int) -> Unit:
    return Unit(file=file, format="json", start=start, rows=rows, bytes=end - begin, place=(begin, end))


def elements(handle: int, begin: int, end: int, *, whole: bool = True) -> Iterator[tuple[int, int]]:
    """Where the elements of a list lie, what is between its commas.

    Args:
        handle: The open file.
        begin: Behind the list's bracket, or behind a comma of it.
        end: Where to stop.
        whole: Whether the list has to end before ``end``, and nothing may follow it.

    Raises:
        ValueError: If it does not.
    """
    buffer, base, at = b"", begin, 0
    depth, element, found_any = 1, begin, False
    while True:
        matched = (_TO_BRACKET_OR_COMMA if depth == 1 else _TO_BRACKET).match(buffer, at)
        at = len(buffer) if matched is None else matched.end()
        if at == len(buffer) or buffer[at] == ord('"'):  # the end, or a string that goes on behind it
            rest = buffer[at:]
            more = os.pread(handle, min(max(CHUNK, len(rest)), end - base - len(buffer)), base + len(buffer))
            if not more:
                break
            buffer, base, at = rest + more, base + at, 0
            continue
        token, place = buffer[at], base + at
        at += 1
        if token in b"{[":
            depth += 1
        elif token == ord(","):
            yield element, place
            element, found_any = place + 1, True
        else:
            depth -= 1
            if depth == 0:
                if found_any or os.pread(handle, place - element, element).strip():
                    yield element, place
                if os.pread(handle, max(end - place - 1, 0), place + 1).strip():
                    raise ValueError(f"text behind the end of the list (byte {place + 1})")
                return
    if whole:
        raise ValueError("the list does not end, the file is damaged or cut off")
    yield element, end


class ElementRows(ByteRows):
    """Rows of a range of a JSON list, or the one row of a file."""

    def __getitem__(self, number: int) -> Row:
        """Read an element."""
        begin, end = self._elements[number]
        return lines.json_row(self.read(int(begin), int(end)))

    @cached_property
    def _elements(self) -> np.ndarray:
        """Begin and end of each row, ``[rows, 2]``."""
        begin, end = self.unit.place
        if len(self) == 1:
            return np.array([(begin, end)])
        found = elements(self._open(), begin, end, whole=False)
        try:
            return np.fromiter(found, np.dtype((np.int64, 2)), count=len(self))
        except ValueError as error:
            raise RejectedError("unreadable_row", "the file was changed since it was opened") from error
