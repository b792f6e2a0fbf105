"""Writing the Arrow files of a prepared folder."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from nemo_bard.data.prepared.layout import File, features
from nemo_bard.data.sample import Sample

BATCH_ROWS, BATCH_BYTES = 256, 64 * 1024 * 1024
"""Samples are written when there are so many of them, or when their images take so much memory."""


class PartWriter:
    """A part of a source, written beside its place and renamed when it is whole.

    ``with PartWriter(path, "mine") as part: part.add(sample)``; then ``part.file`` describes what was written.

    Args:
        path: The part.
        source: Name of the source.
    """

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path, source
        self.file: File | None = None
        """The part, when it is whole."""
        self._unfinished = path.with_name(f".{path.name}.unfinished")
        self._rows = self._held_bytes = 0

    def __enter__(self) -> PartWriter:
        from datasets.arrow_writer import ArrowWriter

        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._writer: Any = ArrowWriter(path=str(self._unfinished), features=features(), writer_batch_size=BATCH_ROWS)
        return self

    def add(self, sample: Sample) -> None:
        """Write a sample."""
        self._writer.write(
            {
                "id": sample.id,
                "source": self.source,
                "messages": json.dumps(sample.messages, ensure_ascii=False),
                "images": [{"bytes": image, "path": None} for image in sample.images],
                "size": [list(size) for size in sample.sizes],
                "videos": sample.videos,
            }
        )
        self._rows += 1
        self._held_bytes += sum(len(image) for image in sample.images)
        if self._held_bytes >= BATCH_BYTES:
            self._writer.write_examples_on_file()
            self._held_bytes = 0

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._writer.finalize()
                written = File.of(self._unfinished, self._rows)
                self._unfinished.replace(self.path)
                self.file = dataclasses.replace(written, name=self.path.name)
        finally:
            if self.file is None:
                with contextlib.suppress(OSError):  # on a full disk what is held cannot be written either
                    self._writer.close()
                self._unfinished.unlink(missing_ok=True)
