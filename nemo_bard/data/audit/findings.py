"""What is wrong with a data set."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nemo_bard.base.errors import one_line
from nemo_bard.data.sample import KINDS, RejectedError

FOLDER_KINDS = {
    "manifest": "the manifest is damaged, or was changed after it was written",
    "missing_file": "a file of the manifest is not there",
    "file_size": "a file has another size than the manifest says",
    "sha256": "a file has other bytes than were written",
    "arrow": "a file is no whole Arrow file",
    "columns": "a file has other columns than a prepared folder",
    "row_count": "a file has another number of rows than the manifest says",
    "kept_rows": "the list of kept rows does not fit the parts",
    "rejects_list": "the list of rejected rows does not fit the manifest",
    "row": "a row does not fit its columns: no id, another source, or another number of images than sizes",
    "image_size": "an image has another size than its row says",
}
"""Defects of a prepared folder, besides those of its samples."""
ALL_KINDS = {**FOLDER_KINDS, **KINDS}
"""Kind -> meaning."""
MOST_LISTED = 100_000
"""Defects that are kept with their reason; further ones are only counted."""


class Defect(NamedTuple):
    """Something that is wrong."""

    kind: str
    """One of ``ALL_KINDS``."""
    reason: str
    """One line."""
    file: str
    row: int | None = None
    """In the file, from 0; None if it is the file as a whole."""
    id: str | None = None
    source: str | None = None

    @property
    def line(self) -> str:
        """``FILE:ROW kind: reason``."""
        where = self.file if self.row is None else f"{self.file}:{self.row}"
        return f"{where} {self.kind}: {self.reason}"


@dataclass
class Findings:
    """What a check found."""

    checked: int = 0
    """Rows that were read and decoded."""
    counts: Counter[str] = field(default_factory=Counter)
    """Defects by kind."""
    listed: list[Defect] = field(default_factory=list)
    """In the order of the files; at most ``MOST_LISTED``."""

    def add(self, defect: Defect) -> None:
        """Note a defect."""
        assert defect.kind in ALL_KINDS, defect.kind
        self.counts[defect.kind] += 1
        if len(self.listed) < MOST_LISTED:
            self.listed.append(defect)

    def join(self, other: Findings) -> None:
        """Take over what was found elsewhere."""
        self.checked += other.checked
        self.counts += other.counts
        self.listed += other.listed[: max(MOST_LISTED - len(self.listed), 0)]

    @property
    def total(self) -> int:
        """Defects."""
        return sum(self.counts.values())


def kind_of(error: Exception, otherwise: str) -> tuple[str, str]:
    """Kind and reason of an error of a row.

    Args:
        error: What reading it raised.
        otherwise: Its kind, if the error does not say one.
    """
    return error.kind if isinstance(error, RejectedError) else otherwise, one_line(error)


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a check."""

    path: str
    form: str
    """``prepared``, ``raw`` or ``reader``."""
    whole: bool
    """Whether every row was read."""
    rows: int | None
    """Rows there are; None if the manifest is damaged."""
    findings: Findings

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        found = self.findings
        return {
            "path": self.path,
            "form": self.form,
            "all": self.whole,
            "rows": self.rows,
            "checked": found.checked,
            "defects": found.total,
            "kinds": dict(sorted(found.counts.items())),
            "listed": len(found.listed),
            "found": [defect._asdict() for defect in found.listed],
        }
