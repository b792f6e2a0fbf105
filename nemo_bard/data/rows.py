"""Raw data of any layout as a data set, without preparing it: for evaluation, and for training on what is small."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.data.checks import check_samples
from nemo_bard.data.conversation import MediaSource, media_of, open_media, parse_record
from nemo_bard.data.placement import place_media
from nemo_bard.data.raw.files import find_files
from nemo_bard.data.raw.hub import is_hub_name
from nemo_bard.data.raw.source import RawSource
from nemo_bard.data.raw.unit import Unit
from nemo_bard.data.sample import ImageEntry, Record, RejectedError

_TOLD_APART, _TAIL_BYTES = 256, 4096
"""Files whose last bytes are part of an identity, and how many."""


class RowsDataset:
    """Conversations of files of any layout; images are opened when an item is asked for.

    A row of a Parquet file costs its whole row group (``RawSource``): for training on much data, prepare it.

    Args:
        path: A file, a folder with files of one kind, a pattern, or a name on the Hugging Face hub, as ``raw.find_units``.
        layout: One of ``layouts.LAYOUTS`` or the dotted name of a function; found by the columns if None.
        split: Which of a folder's files; needed where their names tell several splits.
        root_dir: Folder that relative image paths start from; the folder of a row's file if None.
        validate: Check every row at start: that it can be read, its turns, and that each image exists and has a readable
            header. Recipes put that off, deal it out over their ranks and do it once (``data.checks``).
        limit: Use the first ``limit`` rows only; all if None.

    Raises:
        ValueError: If there is nothing to read, the layout does not fit or, with ``validate``, a row is not as it must be.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        layout: str | None = None,
        split: str | None = None,
        root_dir: str | Path | None = None,
        validate: bool = True,
        limit: int | None = None,
    ) -> None:
        self.root_dir = Path(root_dir) if root_dir is not None else None
        if self.root_dir is not None and not self.root_dir.is_dir():
            raise ValueError(f"root_dir {self.root_dir} is not a folder")
        if not isinstance(validate, bool):
            raise ValueError(f"validate must be true or false, got {validate!r}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit must be an integer >= 1 or null, got {limit!r}")
        self.path, self.source = Path(path), RawSource(path, layout, split)
        self._length = len(self.source) if limit is None else min(limit, len(self.source))
        if validate:
            check_samples(self, self.path.name)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read a row: ``conversation`` with RGB images, ``sample_index`` and ``meta`` (``id`` and what else a row tells).

        Raises:
            IndexError: If ``index`` is outside the data set.
            ValueError: If the row or one of its images is not as it must be; the message names ``file:row``, from 0.
        """
        return self._read(index, header_only=False)

    def peek(self, index: int) -> dict[str, Any]:
        """Read a row as ``__getitem__`` does, but of its images the headers alone: they know their ``size``."""
        return self._read(index, header_only=True)

    def check(self, index: int) -> None:
        """Check a row, and that its images exist and have a readable header.

        Raises:
            ValueError: If they do not; the message names ``file:row``.
        """
        conversation, _ = self._parse(index)
        with self._naming(index):
            for media in media_of(conversation):
                media.check()

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample comes from, for lists of rejected ones: ``source`` (``file:row``) and its ``id``, if any."""
        try:
            name = self.source.record(index).id
        except ValueError:
            name = None
        return {"source": self.source.where(index), "id": name}

    def fingerprint(self) -> str:
        """A text that changes with the files (names, sizes, times), the layout, the folder of images and ``limit``."""
        digest = hashlib.sha256()
        for unit in self.source.units:
            digest.update(repr((unit.file, unit.start, unit.rows, unit.bytes, unit.place, _times(unit))).encode())
        root = "" if self.root_dir is None else self.root_dir.resolve()
        return f"rows {self.source.layout} {len(self)} {digest.hexdigest()} {root}"

    def identity(self) -> dict[str, str]:
        """What the samples depend on: the rows of the files, wherever they lie and whenever they were written.

        Files are told apart by where their rows begin and end, and by the last bytes of some; they are not read.
        """
        digest = hashlib.sha256()
        for unit in self.source.units:
            digest.update(repr((os.path.basename(unit.file), unit.start, unit.rows, unit.bytes, unit.place)).encode())
        files = [file for file in dict.fromkeys(unit.file for unit in self.source.units) if os.path.isfile(file)]
        for file in files[:: -(-len(files) // _TOLD_APART) or 1]:
            with open(file, "rb") as stream:
                stream.seek(max(os.fstat(stream.fileno()).st_size - _TAIL_BYTES, 0))
                digest.update(stream.read())
        return {"content": f"{len(self)} rows, layout {self.source.layout}, {digest.hexdigest()[:16]}"}

    @staticmethod
    def input_files(path: str, split: str | None = None, **_: Any) -> dict[str, Path]:
        """The files that it reads, without the images of a folder."""
        if is_hub_name(path):
            return {}
        found = find_files(path, split)
        files = found.files or found.metadata
        return {"path" if number == 0 else f"path.{number}": Path(file) for number, file in enumerate(files)}

    def _read(self, index: int, *, header_only: bool) -> dict[str, Any]:
        conversation, meta = self._parse(index)
        with self._naming(index):
            conversation = open_media(conversation, header_only=header_only)
        return {"conversation": conversation, "sample_index": int(index), "meta": meta}

    def _parse(self, index: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        with self._naming(index):
            record = self.source.record(index)
            root = self.root_dir or self.source.folder(index)
            conversation, _ = parse_record(as_line(record, root), root)
        return conversation, {**record.facts, "id": record.id}

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Put ``file:row`` before the error of a row."""
        try:
            yield
        except (ValueError, OSError) as error:
            raise ValueError(f"{self.source.where(index)}: {one_line(error)}") from error


def as_line(record: Record, root_dir: Path) -> dict[str, Any]:
    """A record as ``parse_record`` takes it, a placeholder for each of its images and videos.

    Args:
        record: From a layout.
        root_dir: Folder that relative paths start from.

    Raises:
        RejectedError: If media and placeholders do not match, or an image is null.
    """
    images = [_closed(entry, root_dir, number) for number, entry in enumerate(record.images)]
    return {"messages": place_media(record), "images": images, "videos": list(record.videos)}


def _closed(entry: ImageEntry, root_dir: Path, number: int) -> Any:
    """An image that is opened later; bytes count before a path, which sets often keep as a name only."""
    if isinstance(entry, Mapping):
        data, path = entry.get("bytes"), entry.get("path")
        if isinstance(data, bytes):
            return MediaSource("image", data=data)
        if data is None and isinstance(path, str):
            return MediaSource("image", path=root_dir / path)
        entry = None if data is None and path is None and not set(entry) - {"bytes", "path"} else entry
    if entry is None:
        raise RejectedError("null_image", f"image {number} is null")
    return entry


def _times(unit: Unit) -> list[int]:
    """When the files of a unit were written."""
    files = [unit.file]
    if unit.format == "images":
        images = [Path(unit.file, name) for name in unit.place]
        files = [str(path) for image in images for path in (image, image.with_suffix(".txt"))]
    return [os.stat(file).st_mtime_ns if os.path.exists(file) else 0 for file in files]
