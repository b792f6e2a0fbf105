"""The JSONL reader: one conversation per line, read by byte offset."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from nemo_bard.base.errors import one_line
from nemo_bard.data.conversation import media_of, open_media, parse_record
from nemo_bard.data.json_text import load_json

_PROGRESS_BYTES = 256 * 1024 * 1024
_CHUNK_BYTES = 8 * 1024 * 1024
_TOLD_APART = 256
"""Lines whose text is part of a file's identity."""


class JsonlDataset:
    """Conversations of a JSONL file, read by byte offset; images are opened when an item is asked for.

    Args:
        path: File of one JSON object a line, see ``parse_record``.
        root_dir: Folder that relative image paths start from; the file's folder if None.
        validate: Check every line at start: JSON, structure, and that each image exists and has a readable header.
            Recipes put that off, deal it out over their ranks and do it once (``data.checks``).
        limit: Use the first ``limit`` lines only; all if None.

    Raises:
        ValueError: If the file, the folder or, with ``validate``, a line is not as it must be.
    """

    def __init__(
        self, path: str | Path, *, root_dir: str | Path | None = None, validate: bool = True, limit: int | None = None
    ) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"data set file {self.path} does not exist")
        self.root_dir = Path(root_dir) if root_dir is not None else self.path.parent
        if not self.root_dir.is_dir():
            raise ValueError(f"root_dir {self.root_dir} is not a folder")
        if not isinstance(validate, bool):
            raise ValueError(f"validate must be true or false, got {validate!r}")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit must be an integer >= 1 or null, got {limit!r}")
        self._bounds = _line_bounds(self.path, limit)
        if len(self) == 0:
            raise ValueError(f"data set file {self.path} holds no line")
        if validate:
            from nemo_bard.data.checks import check_samples  # workers of `data prepare` read JSON without torch

            check_samples(self, self.path.name)

    def __len__(self) -> int:
        return len(self._bounds) - 1

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Read one line: ``conversation`` with RGB images, ``sample_index`` (line number - 1) and ``meta``.

        Raises:
            IndexError: If ``index`` is outside the data set.
            ValueError: If the line or one of its images is not as it must be; the message names ``file:line``.
        """
        return self._read(index, header_only=False)

    def peek(self, index: int) -> dict[str, Any]:
        """Read one line as ``__getitem__`` does, but of its images the headers alone: they know their ``size``."""
        return self._read(index, header_only=True)

    def check(self, index: int) -> None:
        """Check the structure of a line, and that its images exist and have a readable header.

        Raises:
            ValueError: If they do not; the message names ``file:line``.
        """
        conversation, _ = self._parse(index)
        with self._naming(index):
            for media in media_of(conversation):
                media.check()

    def fingerprint(self) -> str:
        """A text that changes with the file (name, size, time and lines), the folder of its images, and ``limit``."""
        state = self.path.stat()
        lines = hashlib.sha256(self._bounds.tobytes()).hexdigest()
        return f"jsonl {self.path.name} {state.st_size} {state.st_mtime_ns} {lines} {self.root_dir.resolve()}"

    def identity(self) -> dict[str, str]:
        """What the samples depend on: the file's lines, wherever it lies and whenever it was written.

        Lines are told apart by where they begin and end, and by the text of some; the whole file is not read.
        """
        digest = hashlib.sha256(self._bounds.tobytes())
        with self.path.open("rb") as file:
            for index in np.linspace(0, len(self) - 1, min(len(self), _TOLD_APART), dtype=np.int64):
                file.seek(int(self._bounds[index]))
                digest.update(file.read(int(self._bounds[index + 1] - self._bounds[index])))
        return {"content": f"{len(self)} lines, {self._bounds[-1]} bytes, {digest.hexdigest()[:16]}"}

    def line_bytes(self) -> np.ndarray:
        """Size of every line, ``[n]`` int64: what can be known of lengths without reading samples."""
        return np.diff(self._bounds)

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample comes from, for lists of rejected ones: ``source`` (``file:line``) and its ``id``, if any.

        The line itself may be what is wrong with the sample.
        """
        try:
            _, meta = self._parse(index)
        except ValueError:
            meta = {}
        return {"source": self._where(index), "id": meta.get("id")}

    def _read(self, index: int, *, header_only: bool) -> dict[str, Any]:
        conversation, meta = self._parse(index)
        with self._naming(index):
            conversation = open_media(conversation, header_only=header_only)
        return {"conversation": conversation, "sample_index": int(index), "meta": meta}

    @contextlib.contextmanager
    def _naming(self, index: int) -> Iterator[None]:
        """Put ``file:line`` before the error of a line."""
        try:
            yield
        except ValueError as error:
            raise ValueError(f"{self._where(index)}: {error}") from error

    def _where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def _parse(self, index: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        try:
            with self.path.open("rb") as file:
                file.seek(int(self._bounds[index]))
                line = file.read(int(self._bounds[index + 1] - self._bounds[index]))
        except OSError as error:
            raise ValueError(f"{self._where(index)}: the file cannot be read ({one_line(error)})") from error
        with self._naming(index):
            return parse_record(load_json(line), self.root_dir)


def make_jsonl(
    path: str, root_dir: str | None = None, *, validate: bool = True, limit: int | None = None
) -> JsonlDataset:
    """Build a JSONL data set; what an AutoModel recipe names as ``dataset: {_target_: ...}``.

    Args:
        path: The file; its lines are as ``parse_record`` says.
        root_dir: Folder that relative image paths start from; the file's folder if None.
        validate: Check every line and every image header at start.
        limit: Use the first ``limit`` lines only.

    Returns:
        A sized, map-style data set.

    Raises:
        ValueError: As ``JsonlDataset``.
    """
    return JsonlDataset(path, root_dir=root_dir, validate=validate, limit=limit)


def _line_bounds(path: Path, limit: int | None) -> np.ndarray:
    """Byte offsets of the lines' starts and of the end, ``[lines + 1]`` int64; blank lines at the end are no lines."""
    size = path.stat().st_size
    ends: list[np.ndarray] = []
    found = offset = 0
    last_text = 0  # end of the last byte that is no white space
    quiet = None if size > _PROGRESS_BYTES else True  # None: only on a terminal
    progress = tqdm(total=size, desc=f"indexing {path.name}", unit="B", unit_scale=True, disable=quiet)
    with path.open("rb") as file, progress:
        while chunk := file.read(_CHUNK_BYTES):
            breaks = np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (offset + 1)
            ends.append(breaks)
            found += len(breaks)
            if stripped := chunk.rstrip():
                last_text = offset + len(stripped)
            offset += len(chunk)
            progress.update(len(chunk))
            if limit is not None and found >= limit:
                break
    starts = np.concatenate([np.zeros(1, dtype=np.int64), *ends])
    starts = starts[starts < last_text]
    if limit is not None and len(starts) > limit:
        return starts[: limit + 1].astype(np.int64)
    return np.append(starts, offset).astype(np.int64)
