"""A part of a source, read in place."""

from __future__ import annotations

import mmap
from functools import cached_property
from pathlib import Path
from typing import Any

HEADER_COLUMNS = ["id", "source", "messages", "size", "videos"]
"""All but the images."""


class Part:
    """An Arrow file of samples, of which this process holds no more than the row that it reads.

    Pages of a mapped file count as memory of the process until they are dropped: a worker that reads rows at random would
    soon have all of the file. The system keeps them cached all the same.

    Args:
        path: The file.

    Raises:
        OSError: If it cannot be opened.
        ValueError: If it is not as it must be.
    """

    def __init__(self, path: Path) -> None:
        import pyarrow as pa
        from datasets import Dataset
        from datasets.table import InMemoryTable

        with path.open("rb") as file:
            self._mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        table = pa.ipc.open_stream(pa.py_buffer(self._mapped)).read_all()
        # with a fingerprint of its own, datasets does not read all of it to find one
        self._table = Dataset(InMemoryTable(table), fingerprint="part")

    @cached_property
    def _headers(self) -> Any:
        return self._table.select_columns(HEADER_COLUMNS)

    def row(self, number: int) -> dict[str, Any]:
        """The columns of a row."""
        return self._read(self._table, number)

    def header(self, number: int) -> dict[str, Any]:
        """The same without images."""
        return self._read(self._headers, number)

    def _read(self, table: Any, number: int) -> dict[str, Any]:
        found = table[number]
        self._mapped.madvise(mmap.MADV_DONTNEED)
        return found
