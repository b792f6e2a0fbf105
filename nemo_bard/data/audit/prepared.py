"""Checking a prepared folder: its files against the manifest, and samples by decoding them."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from nemo_bard.base.errors import one_line, short
from nemo_bard.data.audit.findings import Defect, Findings, kind_of
from nemo_bard.data.conversation import MediaSource, media_of, parse_record
from nemo_bard.data.prepared.layout import MANIFEST, REJECTS, File, Manifest, SourceEntry, features
from nemo_bard.data.rejects import ERRORS


@dataclass(frozen=True, kw_only=True)
class PartTask:
    """What is to be checked of a part; travels to other processes."""

    folder: Path
    """Of the source."""
    source: str
    part: File
    rows: np.ndarray
    """Rows of the part that are to be decoded, rising."""
    whole: bool
    """Whether every byte is to be read: its digest, and all batches."""

    @property
    def path(self) -> Path:
        """The file."""
        return self.folder / self.part.name

    @property
    def name(self) -> str:
        """For messages."""
        return str(self.path)


def check_files(folder: Path, manifest: Manifest) -> Findings:
    """Look for the files of a manifest, and compare their sizes.

    Args:
        folder: The prepared folder.
        manifest: Its manifest.

    Returns:
        Files that are missing or have another size.
    """
    found = Findings()
    for entry in manifest.sources:
        for file in [*entry.parts, *([] if entry.kept is None else [entry.kept])]:
            path = folder / entry.name / file.name
            size = path.stat().st_size if path.is_file() else None
            if size is None:
                found.add(Defect("missing_file", "the file does not exist", str(path), source=entry.name))
            elif size != file.bytes:
                reason = f"the file has {size} bytes instead of {file.bytes}"
                found.add(Defect("file_size", reason, str(path), source=entry.name))
    return found


def kept_rows(folder: Path, entry: SourceEntry, found: Findings, *, whole: bool) -> np.ndarray:
    """Rows of a source's parts, counted through, that are samples.

    Args:
        folder: The prepared folder.
        entry: The source.
        found: Gets what is wrong with their list.
        whole: Whether to compare the list's digest.

    Returns:
        Row numbers, ``[n]`` int64; all rows if the list cannot be used.
    """
    total = sum(part.rows for part in entry.parts)
    everything = np.arange(total, dtype=np.int64)
    if entry.kept is None:
        return everything
    path = folder / entry.name / entry.kept.name
    if not path.is_file():
        return everything  # named already
    if whole and _sha256(path) != entry.kept.sha256:
        found.add(Defect("sha256", "its digest is not that of the manifest", str(path), source=entry.name))
    try:
        kept = np.load(path, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        found.add(Defect("kept_rows", f"it cannot be read ({one_line(error)})", str(path), source=entry.name))
        return everything
    if kept.ndim != 1 or kept.dtype.kind not in "iu":
        problem = f"it holds {kept.dtype} of shape {kept.shape}, a list of integers is needed"
    elif len(kept) != entry.kept.rows:
        problem = f"it holds {len(kept)} rows instead of {entry.kept.rows}"
    elif len(kept) and (np.any(np.diff(kept) <= 0) or kept[0] < 0 or kept[-1] >= total):
        problem = f"its rows must rise and be 0 to {total - 1}"
    else:
        return kept.astype(np.int64)
    found.add(Defect("kept_rows", problem, str(path), source=entry.name))
    return everything


def part_tasks(
    folder: Path, entry: SourceEntry, rows: np.ndarray, *, most: int | None, seed: int, whole: bool
) -> Iterator[PartTask]:
    """What is to be checked of the parts of a source that are there in their size.

    Args:
        folder: The prepared folder.
        entry: The source.
        rows: Its samples (``kept_rows``).
        most: Samples to decode; all if None.
        seed: Which.
        whole: See ``PartTask``.
    """
    if most is not None and most < len(rows):
        rows = np.sort(np.random.default_rng(seed).choice(rows, size=most, replace=False))
    start = 0
    for part in entry.parts:
        first, last = np.searchsorted(rows, [start, start + part.rows])
        own = rows[first:last] - start
        start += part.rows
        path = folder / entry.name / part.name
        if path.is_file() and (whole or (len(own) and path.stat().st_size == part.bytes)):
            yield PartTask(folder=folder / entry.name, source=entry.name, part=part, rows=own, whole=whole)


def check_part(task: PartTask) -> Findings:
    """Check a part: its digest if every byte is to be read, its batches before anything of them is read, its samples."""
    found = Findings()
    if task.whole and _sha256(task.path) != task.part.sha256:
        reason = "its digest is not that of the manifest"
        found.add(Defect("sha256", reason, str(task.path), source=task.source))
    try:
        _check_batches(task, found)
    except (pa.ArrowException, OSError, ValueError, TypeError) as error:
        reason = f"it cannot be read ({one_line(error)})"
        found.add(Defect("arrow", reason, str(task.path), source=task.source))
    return found


def _check_batches(task: PartTask, found: Findings) -> None:
    seen, wanted = 0, task.rows
    with pa.memory_map(str(task.path)) as file, pa.ipc.open_stream(file) as reader:
        needed = features().arrow_schema.remove_metadata()
        if not reader.schema.remove_metadata().equals(needed):
            reason = f"its columns are {_columns(reader.schema)}, needed are {_columns(needed)}"
            found.add(Defect("columns", reason, str(task.path), source=task.source))
            return
        for batch in reader:
            first, last = np.searchsorted(wanted, [seen, seen + batch.num_rows])
            own = wanted[first:last] - seen
            if task.whole or len(own):
                _check_batch(batch, own, seen, task, found)
            seen += batch.num_rows
    if seen != task.part.rows:
        reason = f"it holds {seen} rows instead of {task.part.rows}"
        found.add(Defect("row_count", reason, str(task.path), source=task.source))


def _columns(schema: Any) -> str:
    return short(", ".join(f"{field.name} {field.type}" for field in schema), 300)


def _check_batch(batch: Any, rows: np.ndarray, start: int, task: PartTask, found: Findings) -> None:
    """Check that offsets and texts are in order, and only then read rows: wrong offsets would end the process."""
    try:
        batch.validate(full=True)
    except pa.ArrowException as error:
        reason = f"the batch of rows {start} to {start + batch.num_rows - 1} is damaged ({one_line(error)})"
        found.add(Defect("arrow", reason, str(task.path), start, source=task.source))
        return
    for row in rows.tolist():
        found.checked += 1
        columns = batch.slice(row, 1).to_pylist()[0]
        for kind, reason in _row_defects(columns, task):
            found.add(Defect(kind, reason, str(task.path), start + row, columns["id"], task.source))


def _row_defects(columns: Mapping[str, Any], task: PartTask) -> Iterator[tuple[str, str]]:
    """Everything that is wrong with a row: kind and reason."""
    if not columns["id"]:
        yield "row", "it has no id"
    if columns["source"] != task.source:
        yield "row", f"its source is {columns['source']!r}"
    images, sizes = columns["images"] or [], columns["size"] or []
    if len(images) != len(sizes):
        yield "row", f"it has {len(images)} images and {len(sizes)} sizes"
    sources = [MediaSource("image", data=(image or {}).get("bytes") or b"") for image in images]
    try:
        messages = json.loads(columns["messages"])
    except (TypeError, ValueError) as error:
        yield "bad_json", f"its messages are not JSON ({one_line(error)})"
    else:
        try:
            record = {"messages": messages, "images": sources, "videos": columns["videos"]}
            conversation, _ = parse_record(record, task.folder)
            for medium in media_of(conversation):
                if medium.kind == "video":
                    medium.check()
        except ERRORS as error:
            yield kind_of(error, "messages")
    for number, source in enumerate(sources):
        try:
            size = source.open_image().size
        except ERRORS as error:
            kind, reason = kind_of(error, "corrupt_image")
            yield kind, f"image {number + 1} of the row: {reason}"
            continue
        if number < len(sizes) and list(size) != list(sizes[number] or ()):
            yield (
                "image_size",
                f"image {number + 1} of the row has {size[0]} x {size[1]} pixels, not {sizes[number]} as its size says",
            )


def manifest_defect(folder: Path, error: ValueError) -> Defect:
    """The defect of a folder whose manifest cannot be used."""
    return Defect("manifest", one_line(error), str(folder / MANIFEST))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_rejects(folder: Path, manifest: Manifest, found: Findings) -> None:
    """Compare the list of rejected rows with the counts of the manifest.

    Args:
        folder: The prepared folder.
        manifest: Its manifest.
        found: Gets what does not fit.
    """
    path = folder / REJECTS
    counts: dict[str, Counter[str]] = {entry.name: Counter() for entry in manifest.sources}
    if path.is_file():
        with path.open("rb") as file:
            for number, line in enumerate(file):
                try:
                    record = json.loads(line)
                    counts[record["source"]][record["kind"]] += 1
                except (ValueError, KeyError, TypeError) as error:
                    reason = f"the line is no reject of one of the sources ({one_line(error)})"
                    found.add(Defect("rejects_list", reason, str(path), number))
    for entry in manifest.sources:
        wanted = {kind: count for kind, count in entry.rejected.items() if count}
        if wanted != dict(counts[entry.name]):
            reason = f"it holds {dict(counts[entry.name])} of {entry.name}, the manifest says {wanted}"
            found.add(Defect("rejects_list", reason, str(path), source=entry.name))
