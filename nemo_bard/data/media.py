"""Where the images and videos of a record come from."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from nemo_bard.base.errors import short
from nemo_bard.data.images import SizeOnly, clipped, image_size, read_bytes, read_image
from nemo_bard.data.sample import RejectedError

SOURCE_KEYS = {"image": ("image", "path", "url", "bytes", "base64"), "video": ("video", "path", "url")}
"""Keys of a typed part that hold its source."""
_NO_SOURCE = {"image": "null_image", "video": "missing_video"}
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # JPEG, PNG, GIF, WebP
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")


@dataclass(frozen=True)
class MediaSource:
    """Where an image or a video comes from; nothing is opened before ``open_image``."""

    kind: str
    """``image`` or ``video``."""
    path: Path | None = None
    """File, or None if the bytes are in the line."""
    encoded: str | None = None
    """Base64 text of the bytes, or None."""
    data: bytes | None = None
    """The bytes themselves, or None."""
    size: tuple[int, int] | None = None
    """Width and height, where they are known and nothing else is."""

    def open_image(self, *, header_only: bool = False) -> Image.Image:
        """Read the image as RGB, turned upright (``images.read_image``).

        Args:
            header_only: Only see that it exists and is an image; the result knows its size alone.

        Raises:
            RejectedError: If it is missing or cannot be read.
        """
        if header_only:
            return SizeOnly(self.size or image_size(self._image()))
        return read_image(self._image())

    def image_bytes(self) -> bytes:
        """The image file as it is.

        Raises:
            RejectedError: If it is missing or its text is not base64.
        """
        source = self._image()
        return source if isinstance(source, bytes) else read_bytes(source)

    def _image(self) -> bytes | Path:
        if self.path is not None:
            return self.path
        if self.data is not None:
            return self.data
        try:
            return base64.b64decode("".join((self.encoded or "").split()), validate=True)
        except binascii.Error as error:
            raise RejectedError("corrupt_image", f"image bytes are not base64 ({error})") from error

    def check(self) -> None:
        """Raise ``RejectedError`` unless the file exists and, for an image, its header can be read."""
        if self.kind == "image":
            self.open_image(header_only=True)
            return
        name = clipped(str(self.path))
        try:
            found = self.path is not None and self.path.is_file()
        except OSError as error:
            raise RejectedError("unreadable_video", f"video file {name} cannot be read ({error.strerror})") from error
        if not found:
            raise RejectedError("missing_video", f"video file {name} does not exist")


def media_source(kind: str, entry: object, root_dir: Path) -> MediaSource:
    """What an entry of a record stands for.

    Args:
        kind: ``image`` or ``video``.
        entry: A path, and of images also a data URI, base64 text or bytes, or an object that holds one of them; where it
            holds bytes beside a path, they count.
        root_dir: Folder that relative paths start from.

    Raises:
        RejectedError: If it is none of these, or no file of this machine.
    """
    if isinstance(entry, MediaSource):
        return entry
    if isinstance(entry, bytes) and kind == "image":
        return MediaSource(kind, data=entry)
    if isinstance(entry, Mapping):
        given = {key: entry[key] for key in SOURCE_KEYS[kind] if entry.get(key) is not None}
        for key in ("bytes", "base64"):
            if isinstance(given.get(key), str) and not given[key].startswith("data:"):
                return MediaSource(kind, encoded=given[key])
        if isinstance(given.get("bytes"), bytes):  # they count, a path beside them is but a name
            return MediaSource(kind, data=given["bytes"])
        entry = next(iter(given.values()), None)
        if isinstance(entry, (Mapping, bytes)):
            return media_source(kind, entry, root_dir)
    if not isinstance(entry, str) or not entry:
        reject = _NO_SOURCE[kind] if entry is None or entry == "" else "layout"
        wanted = f"a path{', a data: URI or base64 bytes' * (kind == 'image')}"
        raise RejectedError(reject, f"{kind} must be {wanted}, got {short(entry)}")
    if entry.startswith("data:") and kind == "image":
        header, comma, payload = entry.partition(",")
        if not comma or not header.endswith(";base64"):
            reason = f"image data: URI must be 'data:<type>;base64,<bytes>', got {short(entry)}"
            raise RejectedError("corrupt_image", reason)
        return MediaSource(kind, encoded=payload)
    if re.match(r"(?i)(https?|ftp|s3|gs)://", entry):
        raise RejectedError(f"missing_{kind}", f"{kind} must be a local file, got the address {short(entry)}")
    if kind == "image" and entry.startswith(_BASE64_STARTS) and len(entry) >= 64 and _BASE64_TEXT.fullmatch(entry):
        return MediaSource(kind, encoded=entry)
    path = Path(entry.removeprefix("file://"))
    return MediaSource(kind, path=path if path.is_absolute() else root_dir / path)
