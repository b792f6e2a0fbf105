"""JSON lines: units are ranges of bytes between line ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from typing import Any

import numpy as np

from nemo_bard.base.errors import one_line, short
from nemo_bard.data.json_text import load_json
from nemo_bard.data.raw.unit import UNIT_BYTES, ByteRows, Row, Unit
from nemo_bard.data.sample import RejectedError

CHUNK = 8 * 1024 * 1024


def units(file: str) -> Iterator[Unit]:
    """Cut a file of JSON lines; blank lines at its end are no rows."""
    with open(file, "rb") as stream:
        end = text_end(stream.fileno())
        begin = start = rows = 0
        for stop, number in _chunks(stream.fileno(), end):
            rows += number
            if stop - begin >= UNIT_BYTES or stop == end:
                yield Unit(file=file, format="jsonl", start=start, rows=rows, bytes=stop - begin, place=(begin, stop))
                begin, start, rows = stop, start + rows, 0


def _chunks(handle: int, end: int) -> Iterator[tuple[int, int]]:
    """Ends of pieces of a file, each behind a line end or at ``end``, and how many lines end in each."""
    at = pending = 0
    while at < end:
        chunk = os.pread(handle, min(CHUNK, end - at), at)
        if not chunk:
            raise ValueError("the file became shorter while it was read")
        at += len(chunk)
        pending += int(np.count_nonzero(np.frombuffer(chunk, np.uint8) == ord("\n")))
        if at == end:
            yield end, pending + (chunk[-1:] != b"\n")
        elif (last := chunk.rfind(b"\n")) >= 0:
            yield at - len(chunk) + last + 1, pending
            pending = 0


def text_end(handle: int, blank: bytes | None = None) -> int:
    """Where the last byte ends that is none of ``blank``, or no white space."""
    at = os.fstat(handle).st_size
    while at > 0:
        begin = max(at - CHUNK, 0)
        if text := os.pread(handle, at - begin, begin).rstrip(blank):
            return begin + len(text)
        at = begin
    return 0


class LineRows(ByteRows):
    """Rows of a range of JSON lines."""

    def __getitem__(self, number: int) -> Row:
        """Read a line."""
        edges = self._edges
        return json_row(self.read(int(edges[number]), int(edges[number + 1])))

    @cached_property
    def _edges(self) -> np.ndarray:
        """Where lines begin, and the end, ``[rows + 1]``."""
        begin, end = self.unit.place
        found = [np.array([begin])]
        for at in range(begin, end, CHUNK):
            chunk = np.frombuffer(self.read(at, min(at + CHUNK, end)), np.uint8)
            found.append(np.flatnonzero(chunk == ord("\n")) + at + 1)
        edges = np.concatenate(found)
        edges = np.append(edges[edges < end], end)
        if len(edges) != len(self) + 1:
            raise RejectedError("unreadable_row", "the file was changed since it was opened")
        return edges


def json_row(text: bytes) -> Row:
    """A row from its JSON.

    Raises:
        RejectedError: If it is none, or no object.
    """
    row = json_value(text)
    if not isinstance(row, dict):
        raise RejectedError("layout", f"a row must be a JSON object, got {short(row)}")
    return row


def json_value(text: bytes) -> Any:
    """What a JSON text holds.

    Raises:
        RejectedError: If it is none.
    """
    try:
        return load_json(text)
    except RecursionError as error:
        raise RejectedError("bad_json", "the row is nested too deeply") from error
    except ValueError as error:
        kind = "not_utf8" if isinstance(error.__cause__, UnicodeDecodeError) else "bad_json"
        raise RejectedError(kind, one_line(error)) from error
