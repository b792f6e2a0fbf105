"""From a path to units, and from a unit to rows."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

from nemo_bard.base.errors import one_line
from nemo_bard.data.raw import archives, delimited, elements, hub, lines, pictures, tables
from nemo_bard.data.raw.files import FORMATS, IMAGES, Found, find_files
from nemo_bard.data.raw.unit import Row, Rows, Unit, printable
from nemo_bard.data.sample import RejectedError

CUTTERS: dict[str, Callable[[str], Iterator[Unit]]] = {
    "jsonl": lines.units,
    "json": elements.units,
    "csv": delimited.units,
    "parquet": tables.parquet_units,
    "arrow": tables.arrow_units,
    "tar": archives.units,
}
READERS: dict[str, Callable[[Unit], Rows]] = {
    "jsonl": lines.LineRows,
    "json": elements.ElementRows,
    "csv": delimited.TableRows,
    "parquet": tables.ParquetRows,
    "arrow": tables.ArrowRows,
    "tar": archives.ArchiveRows,
    "images": pictures.PictureRows,
}
CUT_AT_ONCE = 8
"""Files that are looked through at a time: most of it is waiting for a disk."""


def find_units(path: str | os.PathLike[str], *, split: str | None = None) -> list[Unit]:
    """Cut the data of a path into units.

    Args:
        path: A file, a folder with files of one kind, a pattern such as ``dir/*.parquet``, or, if there is no such path, a
            data set of the Hugging Face hub as ``owner/name`` or ``owner/name:config``.
        split: Which of a folder's files, where their names tell splits; ``all`` for every file.

    Returns:
        Units whose rows together are all rows, in an order that depends on names and contents alone.

    Raises:
        ValueError: If there is nothing to read, or a file is damaged; names it.
    """
    found = hub.fetch(str(path), split) if hub.is_hub_name(path) else find_files(path, split)
    units = _image_units(found) if found.images else _cut_all(found.files)
    if not units:
        raise ValueError(f"{printable(path)} holds no row")
    return units


def _cut_all(files: Sequence[str]) -> list[Unit]:
    with ThreadPoolExecutor(min(CUT_AT_ONCE, len(files))) as pool:
        return list(chain.from_iterable(pool.map(_cut, files)))


def _cut(file: str) -> list[Unit]:
    end = os.path.splitext(file)[1].lower()
    try:
        return list(CUTTERS[FORMATS[end]](file))
    except OSError as error:
        raise ValueError(f"{printable(file)} cannot be read ({one_line(error)})") from error


def _image_units(found: Found) -> list[Unit]:
    """Rows of metadata tables, then the images that none of these names."""
    units = [dataclasses.replace(unit, images=True) for file in found.metadata for unit in _cut(file)]
    named = {os.path.normpath(name) for unit in units for name in _named(unit)}
    left = [name for name in found.images if os.path.abspath(os.path.join(found.root, name)) not in named]
    return units + list(pictures.units(str(found.root), left))


def _named(unit: Unit) -> Iterator[str]:
    """Images that the rows of a metadata table name."""
    folder = os.path.dirname(os.path.abspath(unit.file))
    for _, row in read_unit(unit):
        if isinstance(row, RejectedError):
            continue
        for value in row.values():
            for name in value if isinstance(value, list) else [value]:
                if isinstance(name, str) and name.lower().endswith(IMAGES):
                    yield os.path.join(folder, name)


def open_unit(unit: Unit) -> Rows:
    """The rows of a unit by their number in it."""
    rows = READERS[unit.format](unit)
    return _Described(rows) if unit.images else rows


def read_unit(unit: Unit) -> Iterator[tuple[int, Row | RejectedError]]:
    """Read a unit from its start to its end.

    Args:
        unit: From ``find_units``, also of another process.

    Yields:
        The number of each row in its file, and the row, or why it cannot be read.

    Raises:
        ValueError: If the file is not there any more.
    """
    rows = open_unit(unit)
    try:
        yield from enumerate(rows, unit.start)
    except FileNotFoundError as error:
        raise ValueError(f"{printable(unit.file)} is not there any more") from error
    finally:
        rows.close()


class _Described(Rows):
    """Rows of a table that describes images."""

    def __init__(self, rows: Rows) -> None:
        super().__init__(rows.unit)
        self.rows = rows

    def __getitem__(self, number: int) -> Row:
        """A row, with the path of its image."""
        return pictures.described(self.rows[number], self.unit.file)

    def __iter__(self) -> Iterator[Row | RejectedError]:
        """All rows."""
        for row in self.rows:
            yield row if isinstance(row, RejectedError) else pictures.described(row, self.unit.file)

    def close(self) -> None:
        """Close the table."""
        self.rows.close()
