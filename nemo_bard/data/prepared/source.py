"""Reading a source of a prepared folder: map-style, by memory-mapped Arrow files that are opened when they are needed."""

from __future__ import annotations

import json
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.data.conversation import MediaSource, open_media, parse_record
from nemo_bard.data.prepared.layout import SourceEntry
from nemo_bard.data.prepared.part import Part

OPEN_PARTS = 128
"""Files of a source that are kept open by a process."""


class PreparedSource:
    """The samples of a source.

    Args:
        folder: The prepared folder.
        entry: The source in its manifest.
    """

    def __init__(self, folder: Path, entry: SourceEntry) -> None:
        self.folder, self.entry = folder / entry.name, entry
        self._edges = np.cumsum([0, *(part.rows for part in entry.parts)])
        self._kept = None if entry.kept is None else np.load(self.folder / entry.kept.name, mmap_mode="r")
        self._parts: OrderedDict[int, Part] = OrderedDict()

    def __len__(self) -> int:
        return self.entry.rows

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens the files itself."""
        return {**self.__dict__, "_parts": OrderedDict()}

    def fingerprint(self) -> str:
        """A text that changes with the samples."""
        return f"prepared {self.entry.digest}"

    def read(self, index: int) -> dict[str, Any]:
        """A sample: ``conversation`` with RGB images, and ``meta`` (``id``, ``source``).

        Raises:
            IndexError: If ``index`` is outside.
            ValueError: If the sample cannot be read; names file and row.
        """
        part, row = self._place(index)
        found = part.row(row)
        images = [MediaSource("image", data=image["bytes"]) for image in found["images"]]
        return self._item(found, images, header_only=False)

    def peek(self, index: int) -> dict[str, Any]:
        """The same, with images that know their ``size`` only; their bytes are not read."""
        part, row = self._place(index)
        found = part.header(row)
        images = [MediaSource("image", size=(width, height)) for width, height in found["size"]]
        return self._item(found, images, header_only=True)

    def raw(self, index: int) -> dict[str, Any]:
        """The columns of a sample as they are."""
        part, row = self._place(index)
        return part.row(row)

    def describe(self, index: int) -> dict[str, Any]:
        """Where a sample is: ``source`` (file and row) and its ``id``."""
        part, row = self._place(index)
        return {"source": self._where(index), "id": part.header(row)["id"]}

    def _item(self, found: dict[str, Any], images: list[MediaSource], *, header_only: bool) -> dict[str, Any]:
        record = {"messages": json.loads(found["messages"]), "images": images, "videos": found["videos"]}
        conversation, _ = parse_record(record, self.folder)
        conversation = open_media(conversation, header_only=header_only)
        return {"conversation": conversation, "meta": {"id": found["id"], "source": found["source"]}}

    def _row(self, index: int) -> tuple[int, int]:
        """Part of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside the source {self.entry.name} of {len(self)} samples")
        row = index if self._kept is None else int(self._kept[index])
        part = int(np.searchsorted(self._edges, row, side="right")) - 1
        return part, row - int(self._edges[part])

    def _where(self, index: int) -> str:
        part, row = self._row(index)
        return f"{self.folder / self.entry.parts[part].name}:{row}"

    def _place(self, index: int) -> tuple[Part, int]:
        part, row = self._row(index)
        if part in self._parts:
            self._parts.move_to_end(part)
        else:
            try:
                self._parts[part] = Part(self.folder / self.entry.parts[part].name)
            except (OSError, ValueError) as error:
                raise ValueError(f"{self._where(index)}: the file cannot be read ({error})") from error
            if len(self._parts) > OPEN_PARTS:
                self._parts.popitem(last=False)
        return self._parts[part], row
