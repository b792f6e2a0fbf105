"""Lengths in tokens of the samples of prepared sources, measured by the workers and written where training looks for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.base.errors import one_line
from nemo_bard.data.prepare.folder import OutFolder, save_arrays
from nemo_bard.data.prepare.progress import Progress
from nemo_bard.data.prepare.unit import Stopped
from nemo_bard.data.prepare.workers import Workers
from nemo_bard.data.prepared.layout import Manifest, SourceEntry
from nemo_bard.data.prepared.source import PreparedSource

CHUNK = 2048
"""Samples that are measured together."""


@dataclass(frozen=True, kw_only=True)
class _Task:
    out: Path
    entry: SourceEntry
    start: int
    stop: int
    model: str
    target: Path


@lru_cache(maxsize=1)
def make_collator(model: str) -> Any:
    """The collator whose processor measures.

    Args:
        model: Checkpoint folder or hub name.

    Raises:
        ValueError: If its processor or configuration cannot be read.
    """
    from nemo_bard.data.survey.processor import load_collator

    try:
        return load_collator(model)
    except ValueError as error:
        raise ValueError(f"model: {one_line(error)}") from error


class _Headers:
    """A source whose items are what ``peek`` returns."""

    def __init__(self, source: PreparedSource) -> None:
        self.source = source

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.source.peek(index), "sample_index": index}


def measure_all(
    folder: OutFolder, manifest: Manifest, model: str, workers: Workers, say: Callable[[str], None]
) -> None:
    """Write the lengths of all sources that have none yet for this processor.

    Args:
        folder: The prepared folder, whose sources are whole.
        manifest: What it holds.
        model: See ``make_collator``.
        workers: Who measures.
        say: Gets lines for the user.

    Raises:
        ValueError: If a sample cannot be measured.
    """
    from nemo_bard.data.lengths import SampleSizes, lengths_name

    collator, tasks = make_collator(model), []
    wanted: dict[str, tuple[Path, list[Path]]] = {}
    for entry in manifest.sources:
        name = lengths_name(PreparedSource(folder.path, entry).fingerprint(), collator)
        target = folder.path / entry.name / name
        if target.is_file():
            continue
        chunks = folder.state / "lengths" / entry.name / Path(name).stem
        files = [chunks / f"{start:012d}.npz" for start in range(0, entry.rows, CHUNK)]
        wanted[entry.name] = target, files
        for start, file in zip(range(0, entry.rows, CHUNK), files, strict=True):
            stop = min(start + CHUNK, entry.rows)
            tasks.append(_Task(out=folder.path, entry=entry, start=start, stop=stop, model=model, target=file))
    if not tasks:
        return
    with Progress("measuring lengths", sum(t.stop - t.start for t in tasks), "sample", say) as progress:
        _do_all(tasks, workers, progress)
    for target, files in wanted.values():
        SampleSizes.join([SampleSizes.load(file) for file in files]).save(target)


def _do_all(tasks: list[_Task], workers: Workers, progress: Progress) -> None:
    waiting = []
    for task in tasks:
        if task.target.is_file():
            progress.skip(task.stop - task.start)
        else:
            waiting.append(task)
    waiting.reverse()
    while waiting or workers.busy:
        while waiting and workers.busy < workers.capacity:
            workers.submit(_measure, waiting.pop())
        for task, _ in workers.next():
            progress.update(task.stop - task.start)
        progress.tell("")


def _measure(task: _Task, stopped: Callable[[], bool]) -> None:
    from nemo_bard.data.lengths import Outliner, SampleSizes

    outline = Outliner(_Headers(PreparedSource(task.out, task.entry)), make_collator(task.model), drop_bad=False)
    outlines = []
    for index in range(task.start, task.stop):
        if stopped():
            raise Stopped
        outlines.append(outline(index))
    sizes = SampleSizes.from_outlines(outlines)
    save_arrays(task.target, **{name: np.asarray(value) for name, value in vars(sizes).items()})
