"""Finished units of a source put together in order: which rows are kept, and the list of those that are not.

The result is a function of the units alone, whenever and wherever they were done.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.data.prepare.duplicates import Seen, first_of_each, pack_place, unpack_place
from nemo_bard.data.prepare.folder import FILTERED, REJECTED, SAMPLE, OutFolder, UnitRecord, UnitRows, save_arrays
from nemo_bard.data.prepare.mix import Source
from nemo_bard.data.prepared.layout import KEPT, REJECTS, File, SourceEntry

DUPLICATE = "duplicate"
HOPELESS = 1000
"""Unusable rows from which on a source is not read to its end, if they are too many for all of its rows."""


class RejectsFile:
    """``rejects.jsonl``, written beside its place and renamed; use as a context.

    Args:
        folder: The prepared folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / REJECTS
        self._unfinished = folder / f".{REJECTS}.{os.getpid()}"

    def __enter__(self) -> RejectsFile:
        self._file = self._unfinished.open("w", encoding="utf-8", errors="backslashreplace")
        return self

    def write(self, **line: Any) -> None:
        """Add a rejected row."""
        self._file.write(json.dumps(line, ensure_ascii=False) + "\n")

    def publish(self) -> None:
        """Put the file into its place; nothing is added after that."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unfinished.replace(self.path)

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self._unfinished.unlink(missing_ok=True)


@dataclass(frozen=True, kw_only=True)
class SourceWork:
    """What is to be put together."""

    index: int
    source: Source
    layout: str
    files: Sequence[str]
    """File of each unit."""
    rows: int
    """Rows of all units."""


class Fold:
    """Puts sources together, one after the other.

    Args:
        folder: Where the units are.
        works: All sources, in order.
        rejects: The open list.
    """

    def __init__(self, folder: OutFolder, works: Sequence[SourceWork], rejects: RejectsFile) -> None:
        self.folder, self.works, self.rejects = folder, works, rejects
        self.entries: list[SourceEntry] = []
        later = [work.index for work in works if work.source.dedup == "all"]
        self._last_of_all = max(later, default=-1)
        self._everything = Seen()
        self._begin()

    def _begin(self) -> None:
        self._own = Seen()
        self._parts: list[File] = []
        self._kept: list[np.ndarray] = []
        self._written = self._samples = self._read = 0
        self._filtered: Counter[str] = Counter()
        self._rejected: Counter[str] = Counter()
        self._first = ""

    @property
    def current(self) -> SourceWork | None:
        """The source whose units are wanted; None when all are finished."""
        return self.works[len(self.entries)] if len(self.entries) < len(self.works) else None

    @property
    def counts(self) -> str:
        """Samples and rejected rows so far, for the progress."""
        samples = self._samples + sum(entry.rows for entry in self.entries)
        rejected = sum(self._rejected.values()) + sum(sum(entry.rejected.values()) for entry in self.entries)
        return f"{samples:,} kept, {rejected:,} rejected"

    def needs_keys(self, work: SourceWork) -> bool:
        """Whether duplicates of the rows of a source matter."""
        return work.source.dedup != "none" or work.index <= self._last_of_all

    # ------------------ a unit ------------------
    def add(self, number: int, record: UnitRecord) -> bool:
        """Add the next unit of the current source.

        Args:
            number: Its number, one above the last one's.
            record: Its record.

        Returns:
            Whether the source has all the samples that it may have.

        Raises:
            ValueError: If it is certain that too many of the source's rows cannot be used.
        """
        work = self.current
        assert work is not None
        rows = self.folder.read_rows(work.source.name, number)
        samples = np.flatnonzero(rows.fates == SAMPLE)
        origin = self._origins(work, number, rows, samples)
        kept = origin < 0
        limit, end = work.source.options.limit, len(rows.fates)
        if limit is not None and self._samples + int(kept.sum()) >= limit:
            last = int(np.flatnonzero(kept)[limit - self._samples - 1])
            kept[last + 1 :] = False
            end = int(samples[last]) + 1
        self._remember(work, number, rows, samples, kept)
        self._list_rejects(work, number, rows, record, samples, origin, end)
        self._count(work, rows.fates[:end])
        if record.part is not None:
            self._parts.append(record.part)
            self._kept.append(self._written + np.flatnonzero(kept))
            self._written += record.part.rows
        self._samples += int(kept.sum())
        self._check_hope(work)
        return limit is not None and self._samples >= limit

    def _check_hope(self, work: SourceWork) -> None:
        unusable = self._unusable()
        if unusable >= HOPELESS and unusable > work.source.max_reject_ratio * work.rows:
            self.rejects.publish()
            raise ValueError(self._too_many(work.source, unusable))

    def _unusable(self) -> int:
        return sum(count for kind, count in self._rejected.items() if kind != DUPLICATE)

    def _origins(self, work: SourceWork, number: int, rows: UnitRows, samples: np.ndarray) -> np.ndarray:
        """For each sample the place of the row that it repeats, or -1."""
        if work.source.dedup == "none" or not len(samples):
            return np.full(len(samples), -1, dtype=np.int64)
        seen = self._everything if work.source.dedup == "all" else self._own
        origin = seen.find(rows.keys)
        first = first_of_each(rows.keys)
        again = (origin < 0) & (first != np.arange(len(first)))
        origin[again] = pack_place(work.index, number, rows.rows[samples[first[again]]])
        return origin

    def _remember(self, work: SourceWork, number: int, rows: UnitRows, samples: np.ndarray, kept: np.ndarray) -> None:
        """Note the keys of rows that are kept."""
        if not self.needs_keys(work):
            return
        keys, places = rows.keys[kept], pack_place(work.index, number, rows.rows[samples[kept]])
        if work.source.dedup == "source":
            self._own.add(keys, places)
        if work.index <= self._last_of_all:
            first = first_of_each(keys) == np.arange(len(keys))
            keys, places = keys[first], places[first]
            new = self._everything.find(keys) < 0
            self._everything.add(keys[new], places[new])

    def _list_rejects(
        self,
        work: SourceWork,
        number: int,
        rows: UnitRows,
        record: UnitRecord,
        samples: np.ndarray,
        origin: np.ndarray,
        end: int,
    ) -> None:
        """Write the rejected rows of a unit, duplicates among them, in the order of the file."""
        places = np.flatnonzero(rows.fates == REJECTED)
        lines = [(int(at), line) for at, line in zip(places, record.rejects, strict=True)]
        repeats = np.flatnonzero(origin >= 0)
        ids = self._ids(work, number, repeats)
        for at, which in zip(samples[repeats], repeats, strict=True):
            reason = f"the same images and text as {self._tell(work, int(origin[which]))}"
            line = {"row": int(rows.rows[at]), "id": ids[int(which)], "kind": DUPLICATE, "reason": reason}
            lines.append((int(at), line))
        for at, line in sorted(lines, key=lambda pair: pair[0]):
            if at >= end:
                break
            file = line.pop("file", work.files[number])
            self.rejects.write(source=work.source.name, file=file, **line)
            self._rejected[line["kind"]] += 1
            if not self._first and line["kind"] != DUPLICATE:
                self._first = f"{file}:{line['row']}: {line['reason']}"

    def _ids(self, work: SourceWork, number: int, which: np.ndarray) -> dict[int, str]:
        """Ids of samples of a unit's part."""
        if not len(which):
            return {}
        from datasets import Dataset

        table = Dataset.from_file(str(self.folder.part(work.source.name, number))).select_columns(["id"])
        return dict(zip(which.tolist(), table[which.tolist()]["id"], strict=True))

    def _tell(self, work: SourceWork, place: int) -> str:
        """Where a row is."""
        index, unit, row = unpack_place(place)
        other = self.works[index]
        return f"{other.files[unit]}:{row}{'' if other is work else f' of source {other.source.name}'}"

    def _count(self, work: SourceWork, fates: np.ndarray) -> None:
        self._read += len(fates)
        for number, one in enumerate(work.source.filters):
            self._filtered[f"filter.{one.column}"] += int((fates == FILTERED + number).sum())

    # ------------------ a source ------------------
    def finish_source(self) -> SourceEntry:
        """Finish the current source.

        Returns:
            Its entry for the manifest.

        Raises:
            ValueError: If too many of its rows cannot be used, or none is kept.
        """
        work = self.current
        assert work is not None
        source = work.source
        unusable = self._unusable()
        if unusable > source.max_reject_ratio * self._read:
            self.rejects.publish()
            raise ValueError(self._too_many(source, unusable))
        if not self._samples:
            self.rejects.publish()
            left = {**+self._filtered, **self._rejected}
            raise ValueError(f"source {source.name}: none of its {self._read:,} rows is kept ({_listed(left)})")
        entry = SourceEntry(
            name=source.name,
            layout=work.layout,
            parts=self._parts,
            kept=self._write_kept(source.name),
            read=self._read,
            filtered=dict(sorted((+self._filtered).items())),
            rejected=dict(sorted(self._rejected.items())),
            settings=dict(source.section),
        )
        self.entries.append(entry)
        self._begin()
        return entry

    def _too_many(self, source: Source, unusable: int) -> str:
        kinds = {kind: count for kind, count in self._rejected.items() if kind != DUPLICATE}
        return (
            f"source {source.name}: {unusable:,} of {self._read:,} rows cannot be used ({_listed(kinds)}), more than"
            f" max_reject_ratio {source.max_reject_ratio:g} allows; the first is {self._first}; all are in"
            f" {self.rejects.path}. Mend the source and use another OUT, or raise sources.{source.name}.max_reject_ratio"
            " and run the same command again"
        )

    def _write_kept(self, source: str) -> File | None:
        """Write which rows of the parts are samples, unless all are."""
        path = self.folder.path / source / KEPT
        if self._samples == self._written:
            path.unlink(missing_ok=True)
            return None
        save_arrays(path, kept=np.concatenate(self._kept).astype(np.int64))
        return File.of(path, self._samples)


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in sorted(counts.items(), key=lambda pair: -pair[1]))
