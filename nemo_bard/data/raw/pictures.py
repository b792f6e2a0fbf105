"""Folders of images: captions are in a metadata table of the folder, or in a text file beside each image."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_bard.base.errors import one_line
from nemo_bard.data.raw.unit import UNIT_BYTES, Row, Rows, Unit, printable
from nemo_bard.data.sample import RejectedError

METADATA = ("metadata.csv", "metadata.jsonl", "metadata.parquet")
"""Tables whose column ``file_name`` names images, relative to their folder."""
UNIT_ROWS = 4096


def units(folder: str, names: Sequence[str]) -> Iterator[Unit]:
    """Cut the images of a folder.

    Args:
        folder: Their folder.
        names: Relative to it, in order.
    """
    start = size = 0
    for number, name in enumerate(names):
        size += os.stat(os.path.join(folder, name)).st_size
        rows = number + 1 - start
        if size >= UNIT_BYTES or rows == UNIT_ROWS or number + 1 == len(names):
            place = tuple(names[start : number + 1])
            yield Unit(file=folder, format="images", start=start, rows=rows, bytes=size, place=place)
            start, size = number + 1, 0


class PictureRows(Rows):
    """Rows ``{id, file_name, image, text}`` of the images of a folder: its path, and the text of the file beside it."""

    def __getitem__(self, number: int) -> Row:
        """Read the text beside an image; null without one."""
        name = self.unit.place[number]
        image = Path(self.unit.file, name)
        try:
            text = image.with_suffix(".txt").read_bytes().decode("utf-8-sig").strip()
        except FileNotFoundError:
            text = None
        except UnicodeDecodeError as error:
            raise RejectedError("not_utf8", f"the text beside {printable(name)} is not UTF-8") from error
        except OSError as error:
            raise RejectedError("unreadable_row", f"the text of {printable(name)}: {one_line(error)}") from error
        return {"id": printable(name), "file_name": name, "image": os.path.abspath(image), "text": text}

    def names(self, number: int) -> str:
        """The image."""
        return printable(os.path.join(self.unit.file, self.unit.place[number]))


def described(row: Row, file: str) -> Row:
    """A row of a metadata table, with the path of its image as ``image``."""
    name = row.get("file_name")
    if not isinstance(name, str) or row.get("image") is not None:
        return row
    return {**row, "image": os.path.join(os.path.abspath(os.path.dirname(file)), name)}
