"""A source of raw data by row number, in any layout."""

from __future__ import annotations

import itertools
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.layouts import LAYOUTS, check_columns, detect, lay_out
from nemo_bard.data.raw import tables
from nemo_bard.data.raw.find import find_units, open_unit, read_unit
from nemo_bard.data.raw.unit import Row, Rows, Unit, printable
from nemo_bard.data.sample import Record, RejectedError

OPEN_UNITS, OPEN_TABLES = 8, 2
"""Units that a process keeps open, and those of Parquet files, each of which keeps a row group in memory."""
_LOOK_AT = 100
"""Rows of a unit that are looked at for one that tells the layout."""


def choose_layout(units: Sequence[Unit], layout: str | None = None) -> str:
    """The layout of a source.

    Args:
        units: Of the source.
        layout: What the user says it is; if None, that of the first row whose columns tell one, of the first hundred.

    Returns:
        A name of ``LAYOUTS``, or a dotted name.

    Raises:
        ValueError: If there is no such layout, the columns of a table do not fit it, or fit none.
    """
    if layout is not None:
        LAYOUTS.get(layout)
        for unit in {unit.file: unit for unit in units}.values():
            try:
                check_columns(layout, _columns(unit) or ())
            except ValueError as error:
                raise ValueError(f"{printable(unit.file)}: {one_line(error)}") from error
        return layout
    reason = ""
    for unit in units:
        for _, row in itertools.islice(read_unit(unit), _LOOK_AT):
            try:
                if not isinstance(row, RejectedError):
                    return detect(row)
            except ValueError as error:
                reason = reason or f"{printable(unit.file)}: {one_line(error)}"
        if reason:
            break
    raise ValueError(reason or f"{printable(units[0].file)}: no row of the data can be read")


def _columns(unit: Unit) -> list[str] | None:
    """Columns of a table; None of a file whose rows may have different ones."""
    if unit.format == "csv":
        return [*unit.place[2], *(["image"] if unit.images else [])]
    if unit.format == "parquet":
        return [*tables.parquet_columns(unit.file), *(["image"] if unit.images else [])]
    return tables.arrow_columns(unit.file) if unit.format == "arrow" else None


class RawSource:
    """Rows of raw data by their number, counted through the files.

    A row of a Parquet file costs its whole row group, some 100 ms, unless it is in the one read last: for reading in random
    order, prepare the data. Files are opened when they are needed, by each process itself.

    Args:
        path: As ``find_units``.
        layout: One of ``LAYOUTS`` or a dotted name; found by the columns if None.
        split: As ``find_units``.

    Raises:
        ValueError: As ``find_units`` and ``choose_layout``.
    """

    def __init__(self, path: str | os.PathLike[str], layout: str | None = None, split: str | None = None) -> None:
        self.units = find_units(path, split=split)
        self.layout = choose_layout(self.units, layout)
        self._edges = np.cumsum([0, *(unit.rows for unit in self.units)])
        self._open: OrderedDict[int, Rows] = OrderedDict()
        self._process = os.getpid()

    def __len__(self) -> int:
        return int(self._edges[-1])

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the files itself."""
        return {**self.__dict__, "_open": OrderedDict()}

    @property
    def files(self) -> list[str]:
        """The files, in order; of a folder of images, the folder."""
        return list(dict.fromkeys(unit.file for unit in self.units))

    def row(self, index: int) -> Row:
        """The columns of a row as they are.

        Raises:
            IndexError: If ``index`` is outside.
            RejectedError: If the row cannot be read.
        """
        rows, number = self._place(index)
        return rows[number]

    def record(self, index: int) -> Record:
        """What the layout makes of a row.

        Raises:
            IndexError: If ``index`` is outside.
            RejectedError: If the row cannot be read, or does not fit the layout.
        """
        return lay_out(self.layout, self.row(index))

    def where(self, index: int) -> str:
        """File and number of a row in it, from 0; of a folder of images the image."""
        rows, number = self._place(index)
        return rows.names(number)

    def folder(self, index: int) -> Path:
        """The folder that relative paths of a row start from, that of its file."""
        rows, _ = self._place(index)
        file = Path(rows.unit.file)
        return file if rows.unit.format == "images" else file.parent

    def _place(self, index: int) -> tuple[Rows, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a source of {len(self)} rows")
        unit = int(np.searchsorted(self._edges, index, side="right")) - 1
        if self._process != os.getpid():
            self._open, self._process = OrderedDict(), os.getpid()
        if unit in self._open:
            self._open.move_to_end(unit)
        else:
            self._open[unit] = open_unit(self.units[unit])
            if len(self._open) > (OPEN_TABLES if self.units[unit].format == "parquet" else OPEN_UNITS):
                self._open.popitem(last=False)[1].close()
        return self._open[unit], index - int(self._edges[unit])
