"""Checking raw files: every row as ``nemo-bard data prepare`` would take it, without writing anything."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nemo_bard.data.audit.findings import Defect, Findings
from nemo_bard.data.layouts import detect, lay_out
from nemo_bard.data.raw import Unit, find_units, read_unit
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


def unit_tasks(path: Path, *, layout: str | None, split: str | None, settings: VetSettings) -> list[UnitTask]:
    """What is to be checked of raw data.

    Args:
        path: A file or a folder.
        layout: Name of its layout; found by the columns of the first row that can be read if None.
        split: Part of it, where files have parts.
        settings: What rows are vetted with.

    Returns:
        Tasks that together are all rows, in order.

    Raises:
        ValueError: If there is nothing to read, a file is damaged as a whole, or no layout fits.
    """
    units = find_units(path, split=split)
    name = layout or detect(_first_row(path, units))
    return [UnitTask(unit=unit, layout=name, root_dir=Path(unit.file).parent, settings=settings) for unit in units]


def _first_row(path: Path, units: list[Unit]) -> dict[str, object]:
    for unit in units:
        for _, row in read_unit(unit):
            if not isinstance(row, RejectedError):
                return dict(row)
    raise ValueError(f"{path}: no row can be read, so that its layout is not known; name it with --layout")


def check_unit(task: UnitTask) -> Findings:
    """Vet the rows of a unit."""
    found = Findings()
    for defect in _defects(task):
        found.checked += 1
        if defect is not None:
            found.add(defect)
    return found


def _defects(task: UnitTask) -> Iterator[Defect | None]:
    file = str(task.unit.file)
    for number, row in read_unit(task.unit):
        name, error = None, row
        if not isinstance(row, RejectedError):
            try:
                record = lay_out(task.layout, row)
                name = record.id
                vet(record, root_dir=task.root_dir, name=str(number), settings=task.settings)
                error = None
            except RejectedError as rejected:
                error = rejected
        yield Defect(error.kind, error.reason, file, number, name) if isinstance(error, RejectedError) else None
