"""Samples that cannot be used: what becomes of them (``on_bad_sample``), and the list of those that were dropped.

A file that is truncated, deleted or turned into something else while a run goes on makes a sample bad. It travels as a
``BadSample`` from the process that reads to the recipe, which ends the run or drops it; no other sample takes its place.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.base.files import write_text
from nemo_bard.base.settings import check_settings, choice, fraction, from_mapping, integer, setting

logger = logging.getLogger(__name__)

KEY = "on_bad_sample"
FILE = "rejects.jsonl"
ACTIONS = ("error", "drop")
ERRORS = (ValueError, OSError, EOFError)
"""What reading a damaged sample raises; anything else is a mistake in a program and ends the run as such."""
FREE, FREE_SHARE = 10, 0.01
"""Bad samples that a data set may have if nothing is said: so many, or this part of it, but never more than half."""


@dataclass(frozen=True, kw_only=True)
class BadSamplePolicy:
    """The key ``on_bad_sample`` of a recipe: a word, or a section.

    Raises:
        ValueError: For a value that is not allowed, or a limit without ``action: drop``.
    """

    action: str = setting("error", choice(ACTIONS), "End the run, or drop the sample, count it and list it.")
    max_samples: int | None = setting(None, integer(0, optional=True), "Most samples that may be dropped.")
    max_ratio: float | None = setting(None, fraction(optional=True), "Largest part of the data set that may be.")

    def __post_init__(self) -> None:
        check_settings(self, KEY)
        for name in ("max_samples", "max_ratio"):
            if self.action == "error" and getattr(self, name) is not None:
                raise ValueError(f"{KEY}.{name}={getattr(self, name)} needs {KEY}.action: drop")

    @property
    def drops(self) -> bool:
        """Whether bad samples are dropped."""
        return self.action == "drop"

    def most(self, total: int) -> int:
        """How many samples of a data set of ``total`` may be dropped."""
        limits = [] if self.max_samples is None else [self.max_samples]
        if self.max_ratio is not None:
            limits.append(int(self.max_ratio * total))
        return min(limits) if limits else min(max(FREE, int(FREE_SHARE * total)), total // 2)


def check_on_bad_sample(value: object) -> BadSamplePolicy:
    """Read ``on_bad_sample``: ``error``, ``drop``, or ``{action, max_samples, max_ratio}``; None means ``error``.

    Raises:
        ValueError: One line that names the key, its value and what is allowed.
    """
    if value is None or isinstance(value, Mapping):
        return from_mapping(BadSamplePolicy, value, KEY)
    if not isinstance(value, str):
        raise ValueError(f"{KEY} must be error, drop or a section {{action, max_samples, max_ratio}}, got {value!r}")
    try:
        return BadSamplePolicy(action=value)
    except ValueError as error:
        raise ValueError(str(error).replace(f"{KEY}.action", KEY)) from error


@dataclass(frozen=True, kw_only=True)
class BadSample:
    """What stands in a batch for a sample that cannot be used."""

    index: int
    """Its place in the data set."""
    reason: str
    """One line."""
    sample_index: int
    slot: int = 0
    """Place of its example in the microbatch, as in the batch's ``slots``."""


class GuardedDataset:
    """A map-style data set whose bad items are ``BadSample``; items know their place as ``index``.

    Args:
        dataset: Sized and map-style.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any] | BadSample:
        """Return an item, or why there is none.

        Raises:
            IndexError: If ``index`` is outside the data set.
        """
        try:
            return {**self.dataset[index], "index": int(index)}
        except ERRORS as error:
            return BadSample(index=int(index), reason=one_line(error), sample_index=int(index))


def describe(dataset: Any, bad: BadSample) -> dict[str, Any]:
    """What a list of rejected samples says of one: the data set's own ``describe(index)``, or its class's name."""
    own = dataset.describe(bad.index) if hasattr(dataset, "describe") else {}
    return {"source": type(dataset).__name__, "id": None, **own, "sample_index": bad.sample_index, "reason": bad.reason}


class RejectsFile:
    """The list of dropped samples of a run, a JSON object a line; each sample once per split and epoch.

    Args:
        path: The file; it need not exist.
        records: What is in it, for processes that must not read it; read here if None.
    """

    def __init__(self, path: Path, records: Iterable[Mapping[str, Any]] | None = None) -> None:
        self.path = path
        self.records = self._read() if records is None else list(records)
        self._known = {_identity(record) for record in self.records}

    def _read(self) -> list[Mapping[str, Any]]:
        """Read the file, and take away a line that was cut while it was written."""
        if not self.path.is_file():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        records = []
        for line in lines:
            try:
                records.append(json.loads(line))
            except ValueError:
                logger.warning("%s: a line that was cut while it was written is taken away", self.path)
        if len(records) < len(lines):
            write_text(self.path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        return records

    def add(self, records: Iterable[Mapping[str, Any]], *, write: bool) -> list[Mapping[str, Any]]:
        """Add those records that are new.

        Args:
            records: With ``split``, ``epoch`` and ``sample_index``.
            write: Whether this process writes the file.

        Returns:
            The new ones.
        """
        new = []
        for record in records:
            if _identity(record) not in self._known:
                self._known.add(_identity(record))
                new.append(record)
        self.records += new
        if write and new:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new))
                file.flush()
                os.fsync(file.fileno())
        return new

    def samples(self, split: str) -> int:
        """How many different samples of a split are in the list."""
        return len({record["sample_index"] for record in self.records if record["split"] == split})


def _identity(record: Mapping[str, Any]) -> tuple[str, int, int]:
    return record["split"], record["epoch"], record["sample_index"]
