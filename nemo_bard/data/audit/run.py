"""Checking a data set, with as many processes as are given."""

from __future__ import annotations

import glob
import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, Protocol, TypeVar

from tqdm import tqdm

from nemo_bard.base.errors import RunError
from nemo_bard.data.audit.findings import Defect, Findings, Report, kind_of
from nemo_bard.data.audit.prepared import check_files, check_part, check_rejects, kept_rows, manifest_defect, part_tasks
from nemo_bard.data.prepared.layout import is_prepared, read_manifest
from nemo_bard.data.ranks import deal_out
from nemo_bard.data.raw.hub import is_hub_name
from nemo_bard.data.readers import open_dataset
from nemo_bard.data.rejects import ERRORS
from nemo_bard.data.survey.sources import refuse_parts


class Task(Protocol):
    """What is to be checked in one piece."""

    @property
    def name(self) -> str:
        """Of its file."""
        ...


T = TypeVar("T", bound=Task)


def check(
    data: str,
    *,
    whole: bool = False,
    rows: int = 200,
    seed: int = 0,
    jobs: int = 1,
    layout: str | None = None,
    split: str | None = None,
    root_dir: Path | None = None,
) -> Report:
    """Find what is wrong with a data set.

    Args:
        data: A prepared folder, raw data as ``raw.find_units`` takes it, or ``NAME:...`` of a reader.
        whole: Of a prepared folder, read every byte and decode every sample; others are read whole in any case.
        rows: Samples of each source of a prepared folder to decode otherwise.
        seed: Which.
        jobs: Processes.
        layout: Of raw data; found by its columns if None.
        split: Of raw data.
        root_dir: Of raw data, where relative paths of images start; the folder of the file if None.

    Returns:
        What was found.

    Raises:
        ValueError: If there is no such data set.
        RunError: If a process is gone.
    """
    path = Path(data)
    refuse_parts(path)
    if is_prepared(path):
        return check_prepared(path, whole=whole, rows=rows, seed=seed, jobs=jobs)
    if path.exists() or glob.has_magic(data) or is_hub_name(data):
        return check_raw(data, layout=layout, split=split, root_dir=root_dir, jobs=jobs)
    return check_reader(data, jobs=jobs)


def check_prepared(folder: Path, *, whole: bool, rows: int, seed: int, jobs: int) -> Report:
    """Check a prepared folder; arguments as ``check``."""
    try:
        manifest = read_manifest(folder)
    except ValueError as error:
        found = Findings()
        found.add(manifest_defect(folder, error))
        return Report(path=str(folder), form="prepared", whole=whole, rows=None, findings=found)
    found = check_files(folder, manifest)
    check_rejects(folder, manifest, found)
    tasks = []
    for number, entry in enumerate(manifest.sources):
        kept = kept_rows(folder, entry, found, whole=whole)
        most = None if whole else rows
        tasks += part_tasks(folder, entry, kept, most=most, seed=seed + number, whole=whole)
    sizes = [task.part.bytes if whole else len(task.rows) for task in tasks]
    _work(check_part, tasks, sizes, found, jobs=jobs, unit="B" if whole else "row")
    total = sum(entry.rows for entry in manifest.sources)
    return Report(path=str(folder), form="prepared", whole=whole, rows=total, findings=found)


def check_raw(path: str, *, layout: str | None, split: str | None, root_dir: Path | None, jobs: int) -> Report:
    """Check every row of raw data; arguments as ``check``."""
    from nemo_bard.data.audit.raw import check_unit, unit_tasks
    from nemo_bard.data.vetting import VetSettings

    tasks = unit_tasks(path, layout=layout, split=split, root_dir=root_dir, settings=VetSettings())
    found = Findings()
    _work(check_unit, tasks, [task.unit.bytes for task in tasks], found, jobs=jobs)
    return Report(path=path, form="raw", whole=True, rows=found.checked, findings=found)


def check_reader(data: str, *, jobs: int) -> Report:
    """Read every sample of what a reader opens; arguments as ``check``."""
    dataset = open_dataset(data, validate=False)
    found = Findings(checked=len(dataset))
    workers = jobs if jobs > 1 else 0
    for part in deal_out(_Read(dataset, data), len(dataset), join=list, num_workers=workers, doing="checking"):
        for defect in part:
            if defect is not None:
                found.add(defect)
    return Report(path=data, form="reader", whole=True, rows=len(dataset), findings=found)


class _Read:
    """From the number of a sample to what is wrong with it; travels to other processes."""

    def __init__(self, dataset: Any, name: str) -> None:
        self.dataset, self.name = dataset, name

    def __call__(self, index: int) -> Defect | None:
        try:
            self.dataset[index]
        except ERRORS as error:
            kind, reason = kind_of(error, "unreadable_row")
            return Defect(kind, reason, self.name, index)
        return None


def _work(
    function: Callable[[T], Findings],
    tasks: Sequence[T],
    sizes: Sequence[int],
    found: Findings,
    *,
    jobs: int,
    unit: str = "B",
) -> None:
    """Do tasks and join what they find, in order, with a progress bar of their sizes on a terminal."""
    with tqdm(total=sum(sizes), desc="checking", unit=unit, unit_scale=unit == "B", disable=None, delay=2) as bar:

        def take(number: int, result: Findings) -> None:
            found.join(result)
            bar.update(sizes[number])
            bar.set_postfix_str(f"{found.total:,} defects")

        if jobs == 1 or len(tasks) < 2:
            for number, task in enumerate(tasks):
                take(number, function(task))
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(min(jobs, len(tasks)), mp_context=context) as pool:
            done = 0
            try:
                for result in pool.map(function, tasks):
                    take(done, result)
                    done += 1
            except BrokenProcessPool as error:
                raise RunError(
                    f"a process ended while it was checking {tasks[done].name} or a file behind it"
                ) from error
