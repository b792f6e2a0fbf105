"""Checking raw files: every row as ``nemo-bard data prepare`` would take it, without writing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_bard.base.errors import one_line
from nemo_bard.data.audit.findings import Defect, Findings
from nemo_bard.data.layouts import lay_out
from nemo_bard.data.raw import Unit, choose_layout, find_units, read_unit
from nemo_bard.data.raw.unit import printable
from nemo_bard.data.sample import RejectedError
from nemo_bard.data.vetting import VetSettings, vet


@dataclass(frozen=True, kw_only=True)
class UnitTask:
    """Rows that are to be checked together; travels to other processes."""

    unit: Unit
    layout: str
    root_dir: Path
    """Where relative paths of images start."""
    settings: VetSettings

    @property
    def name(self) -> str:
        """For messages."""
        return printable(self.unit.file)


def unit_tasks(
    path: str, *, layout: str | None, split: str | None, root_dir: Path | None, settings: VetSettings
) -> list[UnitTask]:
    """What is to be checked of raw data.

    Args:
        path: What ``raw.find_units`` takes.
        layout: Name of its layout; found by the columns of the first row that can be read if None.
        split: Part of it, where files have parts.
        root_dir: Folder that relative paths of images start from; that of the file if None.
        settings: What rows are vetted with.

    Returns:
        Tasks that together are all rows, in order.

    Raises:
        ValueError: If there is nothing to read, a file is damaged as a whole, or no layout fits.
    """
    if root_dir is not None and not root_dir.is_dir():
        raise ValueError(f"root_dir {root_dir} is not a folder")
    units = find_units(path, split=split)
    name = choose_layout(units, layout)
    return [
        UnitTask(unit=unit, layout=name, root_dir=root_dir or _folder(Path(unit.file)), settings=settings)
        for unit in units
    ]


def _folder(file: Path) -> Path:
    return file if file.is_dir() else file.parent


def check_unit(task: UnitTask) -> Findings:
    """Vet the rows of a unit."""
    found = Findings()
    for defect in _look_at_rows(task):
        found.checked += 1
        if defect is not None:
            found.add(defect)
    return found


def _look_at_rows(task: UnitTask) -> Iterator[Defect | None]:
    """What is wrong with each row, None if nothing is."""
    for number, row in read_unit(task.unit):
        own: str | None = None
        try:
            if isinstance(row, RejectedError):
                raise row
            own = None if row.get("id") is None else str(row["id"])
            record = lay_out(task.layout, row)
            own = record.id if record.id is not None else own
            vet(record, root_dir=task.root_dir, name=str(number), settings=task.settings)
        except RejectedError as error:
            yield Defect(error.kind, one_line(error), task.name, number, own)
        else:
            yield None
