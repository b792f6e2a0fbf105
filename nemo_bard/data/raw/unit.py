"""A part of a file that is read at a time, and its rows when it is opened."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.data.sample import RejectedError

UNIT_BYTES = 64 * 1024 * 1024
"""About how much of a file a unit is."""

Row = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Rows of a file that are read together; the units of a source are all its rows, in order."""

    file: str
    """Its path; of a folder of images, the folder."""
    format: str
    start: int
    """Number of the first row in the file, from 0."""
    rows: int
    bytes: int
    """About how much of the file it is."""
    place: tuple[Any, ...] = ()
    """Where it is, as the format needs it."""
    images: bool = False
    """Whether the rows describe images of the file's folder by ``file_name``."""


class Rows(ABC):
    """The rows of a unit, by their number in it; nothing is opened before the first is asked for.

    Args:
        unit: Of the format that the class reads.
    """

    def __init__(self, unit: Unit) -> None:
        self.unit = unit

    def __len__(self) -> int:
        return self.unit.rows

    @abstractmethod
    def __getitem__(self, number: int) -> Row:
        """Read a row.

        Raises:
            RejectedError: If it cannot be read.
        """

    def __iter__(self) -> Iterator[Row | RejectedError]:
        """All rows in order; what cannot be read is an error in its place."""
        for number in range(len(self)):
            try:
                yield self[number]
            except RejectedError as error:
                yield error

    def names(self, number: int) -> str:
        """The file that a row is in, and its number there, for a person."""
        return f"{printable(self.unit.file)}:{self.unit.start + number}"

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Give back what is open."""


class ByteRows(Rows):
    """Rows that are ranges of bytes; read by position, so that processes may share an open file."""

    def __init__(self, unit: Unit) -> None:
        super().__init__(unit)
        self._handle: int | None = None

    def read(self, begin: int, end: int) -> bytes:
        """Read bytes of the file.

        Raises:
            RejectedError: If they cannot be read, or are not there any more.
        """
        parts = []
        try:
            while begin < end:
                part = os.pread(self._open(), end - begin, begin)
                if not part:
                    raise RejectedError("unreadable_row", f"the file ends {end - begin} bytes before the row does")
                parts.append(part)
                begin += len(part)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise RejectedError("unreadable_row", f"the file cannot be read ({one_line(error)})") from error
        return b"".join(parts)

    def _open(self) -> int:
        if self._handle is None:
            self._handle = os.open(self.unit.file, os.O_RDONLY)
        return self._handle

    def close(self) -> None:
        """Close the file."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __del__(self) -> None:
        self.close()


def printable(path: str | os.PathLike[str]) -> str:
    """A path as a text that can be written anywhere; bytes that are no text are replaced."""
    return os.fsencode(path).decode("utf-8", "replace")
