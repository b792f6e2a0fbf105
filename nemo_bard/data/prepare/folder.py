"""What lies where in a folder that is being prepared.

Beside the files of a prepared folder there is ``.prepare``, which is ours alone: ``plan.json`` (what the folder is made of),
and, until the manifest is written, ``units/SOURCE/00000.json`` and ``.npz`` for every finished unit. The JSON file, the
record, is written last: a unit is done when it is there.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.base.files import LOCK, read_json, sync_file, sync_folder, write_json
from nemo_bard.data.prepared.layout import KEPT, MANIFEST, REJECTS, File

STATE = ".prepare"
WORKERS_LOCK = "workers.lock"
_OURS = re.compile(r"part-\d{5,}\.arrow|kept\.npy|lengths-[0-9a-f]+\.npz")
_LEFT = re.compile(r"\.part-\d{5,}\.arrow\.unfinished|\.kept\.npy\..*|lengths-[0-9a-f]+\.\d+\.unfinished\.npz")
_LEFT_ABOVE = re.compile(rf"\.({re.escape(MANIFEST)}|{re.escape(REJECTS)})\..*")

SAMPLE, REJECTED, FILTERED = 0, 1, 2
"""Fates of a row; ``FILTERED + i`` is left out by the ``i``-th filter."""


@dataclass(frozen=True, kw_only=True)
class UnitRecord:
    """What became of a unit."""

    part: File | None
    """Its samples; None if there are none."""
    read: int
    """Rows."""
    rejects: list[dict[str, Any]]
    """``row``, ``id``, ``kind`` and ``reason`` of rows that cannot be used, in order; ``file`` if it is not the unit's."""


@dataclass(frozen=True, kw_only=True)
class UnitRows:
    """The rows of a unit, in order."""

    rows: np.ndarray
    """Their numbers in the file, ``[read]`` int64."""
    fates: np.ndarray
    """``[read]`` int16."""
    keys: np.ndarray
    """Of the samples, to know duplicates by, ``[samples]`` of 16 bytes; of none if they are not asked for."""


class OutFolder:
    """Names in the folder that is prepared.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.state = path, path / STATE

    def part(self, source: str, number: int) -> Path:
        """The samples of a unit."""
        return self.path / source / f"part-{number:05d}.arrow"

    def record_file(self, source: str, number: int) -> Path:
        """The record of a unit."""
        return self.state / "units" / source / f"{number:05d}.json"

    @property
    def plan_file(self) -> Path:
        """What the folder is made of."""
        return self.state / "plan.json"

    # ------------------ units ------------------
    def write_unit(self, source: str, number: int, record: UnitRecord, rows: UnitRows) -> None:
        """Note that a unit, whose part is there, is done."""
        file = self.record_file(source, number)
        file.parent.mkdir(parents=True, exist_ok=True)
        save_arrays(file.with_suffix(".npz"), rows=rows.rows, fates=rows.fates, keys=rows.keys)
        if record.part is not None:
            sync_file(self.part(source, number))
            sync_folder(self.path / source)
        write_json(file, asdict(record))

    def read_record(self, source: str, number: int) -> UnitRecord | None:
        """The record of a unit, None if it is not done or its part is not as it was."""
        raw = read_json(self.record_file(source, number))
        if raw is None:
            return None
        part = None if raw["part"] is None else File(**raw["part"])
        if part is not None and not _has_size(self.part(source, number), part.bytes):
            return None
        return UnitRecord(part=part, read=raw["read"], rejects=raw["rejects"])

    def read_rows(self, source: str, number: int) -> UnitRows:
        """The rows of a unit that is done."""
        with np.load(self.record_file(source, number).with_suffix(".npz"), allow_pickle=False) as file:
            return UnitRows(rows=file["rows"], fates=file["fates"], keys=file["keys"])

    def forget_unit(self, source: str, number: int) -> None:
        """Let a unit be done again."""
        record = self.record_file(source, number)
        for file in (record, record.with_suffix(".npz"), self.part(source, number)):
            file.unlink(missing_ok=True)

    # ------------------ the whole ------------------
    def check_own(self) -> None:
        """See that there is nothing in the folder that ``prepare`` has not written.

        Raises:
            ValueError: If there is; names it.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise ValueError(f"OUT {self.path} is a file, a folder is needed")
        names = {entry.name for entry in self.path.iterdir()}
        plan = read_json(self.plan_file)
        sources = [] if plan is None else list(plan["sources"])
        known = {LOCK, STATE, *((MANIFEST, REJECTS, *sources) if plan else ())}
        foreign = [name for name in sorted(names - known) if not (plan and _LEFT_ABOVE.fullmatch(name))]
        for source in sources:
            found = (self.path / source).iterdir() if (self.path / source).is_dir() else ()
            others = sorted(f.name for f in found if not _OURS.fullmatch(f.name) and not _LEFT.fullmatch(f.name))
            foreign += [f"{source}/{name}" for name in others]
        if foreign:
            more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
            raise ValueError(
                f"OUT {self.path} holds what `nemo-bard data prepare` of this mixture did not write:"
                f" {', '.join(foreign[:3])}{more}; name a new or empty folder"
            )

    def sweep(self, sources: Iterable[str]) -> None:
        """Take away what a killed run left half-written."""
        for file in self.path.iterdir():
            if _LEFT_ABOVE.fullmatch(file.name):
                file.unlink()
        for source in sources:
            for file in (self.path / source).glob("*") if (self.path / source).is_dir() else ():
                if _LEFT.fullmatch(file.name):
                    file.unlink()
            for file in (self.state / "units" / source).glob(".*"):
                file.unlink()

    def keep_parts(self, source: str, names: Iterable[str]) -> None:
        """Take away the parts of a source that are not among ``names``."""
        kept = set(names)
        for file in (self.path / source).glob("part-*.arrow"):
            if file.name not in kept:
                file.unlink()

    def forget_units(self) -> None:
        """Take away the records of all units; the manifest holds what matters of them."""
        shutil.rmtree(self.state / "units", ignore_errors=True)
        shutil.rmtree(self.state / "lengths", ignore_errors=True)
        (self.state / WORKERS_LOCK).unlink(missing_ok=True)


def _has_size(file: Path, size: int) -> bool:
    try:
        return file.stat().st_size == size
    except FileNotFoundError:
        return False


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write an ``.npz`` file, or an ``.npy`` file of one array, at once or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with unfinished.open("wb") as file:
            if path.name == KEPT:
                np.save(file, arrays["kept"])
            else:
                np.savez(file, **arrays)  # type: ignore[arg-type]
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
