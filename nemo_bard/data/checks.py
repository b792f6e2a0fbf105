"""Checking all samples of a data set before it is used: once, and dealt out over the ranks of a run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Protocol

from nemo_bard.base.files import write_json
from nemo_bard.data.ranks import Ranks, deal_out

logger = logging.getLogger(__name__)

FORMAT = 1
"""Version of what is checked; part of the name of the file that says it was."""


class Checkable(Protocol):
    """A data set whose samples can be checked without being read."""

    def __len__(self) -> int: ...

    def check(self, index: int) -> None:
        """Raise ValueError unless a sample is as it must be; the message says where it is."""

    def fingerprint(self) -> str:
        """A text that changes with the samples."""
        ...


_PUT_OFF: ContextVar[list[Checkable] | None] = ContextVar("_PUT_OFF", default=None)


@contextlib.contextmanager
def checks_put_off() -> Iterator[list[Checkable]]:
    """Let data sets that are opened inside not check their samples; yields those that would have."""
    found: list[Checkable] = []
    token = _PUT_OFF.set(found)
    try:
        yield found
    finally:
        _PUT_OFF.reset(token)


def check_samples(dataset: Checkable, name: str) -> None:
    """Check all samples of a data set that is being opened, or, inside ``checks_put_off``, leave it to the caller.

    Args:
        dataset: Ready to be read.
        name: For the progress.

    Raises:
        ValueError: What ``check`` says of the first sample that is not as it must be.
    """
    put_off = _PUT_OFF.get()
    if put_off is None:
        deal_out(dataset.check, len(dataset), doing=f"checking {name}")
    else:
        put_off.append(dataset)


def check_once(dataset: Checkable, cache_dir: Path, *, ranks: Ranks | None = None, num_workers: int = 0) -> None:
    """Check all samples of a data set, unless an earlier call noted in ``cache_dir`` that they were as they must be.

    Args:
        dataset: Its ``fingerprint()`` says whether it is the same.
        cache_dir: Folder of the notes; made if needed, read and written by the first rank only.
        ranks: Who takes part; this process alone if None.
        num_workers: Processes of each rank that check.

    Raises:
        ValueError: On every rank the same: as ``check_samples``, or if the note cannot be written.
        RunError: As ``Ranks.exchange``.
    """
    ranks, doing = ranks or Ranks(), "checking samples"
    note = ranks.on_first(lambda: _note(dataset, cache_dir), doing)
    if ranks.on_first(note.is_file, doing):
        return
    deal_out(dataset.check, len(dataset), ranks=ranks, num_workers=num_workers, doing=doing)
    ranks.on_first(lambda: write_json(note, {"samples": len(dataset), "fingerprint": dataset.fingerprint()}), doing)
    logger.info("%d samples checked, noted in %s", len(dataset), note)


def _note(dataset: Checkable, cache_dir: Path) -> Path:
    parts = (FORMAT, type(dataset).__qualname__, dataset.fingerprint())
    key = hashlib.sha256("\0".join(str(part) for part in parts).encode()).hexdigest()[:16]
    return cache_dir / f"checked-{key}.json"
