"""A sample on its way from somebody's file into a prepared folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

ImageEntry = bytes | str | Mapping[str, Any] | None
"""Bytes of an image file, its path, or a mapping with ``bytes`` or ``path`` as published sets have it; None is no image."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What a layout makes of a row of a file; nothing of it has been checked."""

    messages: Sequence[Mapping[str, Any]]
    """Turns ``{"role", "content"}``; the content is a text, in which ``<image>`` and ``<video>`` may stand for media, or a list of
    typed parts as ``conversation.parse_record`` takes them."""
    images: Sequence[ImageEntry] = ()
    """In the order of their placeholders."""
    videos: Sequence[str] = ()
    """Paths, likewise."""
    id: str | None = None
    """What the set calls the row."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Columns that rows may be filtered by, such as ratings."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """What goes into a prepared folder: complete, every image decoded once."""

    id: str
    messages: list[dict[str, Any]]
    """Turns with typed parts: texts, and ``{"type": "image"}`` or ``{"type": "video"}`` for the next entry."""
    images: list[bytes]
    """Image files."""
    sizes: list[tuple[int, int]]
    """Width and height of each image in pixels, upright."""
    videos: list[str] = field(default_factory=list)
    """Absolute paths."""


KINDS = {
    "unreadable_file": "the rest of a file cannot be read",
    "unreadable_row": "a row cannot be read",
    "bad_json": "a line or member is not JSON",
    "not_utf8": "a line or member is not UTF-8",
    "bad_member": "a member of an archive is missing or out of place",
    "layout": "the row does not fit the layout",
    "messages": "turns that are not as they must be",
    "unknown_role": "a turn of somebody who is not system, user or assistant",
    "missing_text": "a turn without text",
    "empty_answer": "an answer of the assistant is empty",
    "thinking": "an answer opens or ends its thinking only",
    "no_answer": "no turn of the assistant",
    "reserved_token": "a text holds a token that the chat template reserves, or the name of the mask token",
    "bad_text": "a text that cannot be encoded",
    "placeholders": "placeholders and media do not match",
    "null_image": "an image is null",
    "missing_image": "an image file does not exist",
    "unreadable_image": "the system does not let an image file be read",
    "empty_image": "an image of zero bytes",
    "corrupt_image": "an image cannot be decoded to its end",
    "animated_image": "an image of several frames",
    "pixel_format": "an image whose pixels have no eight-bit meaning",
    "too_many_pixels": "an image beyond the limit of pixels",
    "too_narrow": "an image more than 200 times as long as wide",
    "missing_video": "a video file does not exist",
    "unreadable_video": "a video cannot be read",
    "duplicate": "the same images and text as an earlier row",
}
"""Why rows are left out: kind -> meaning."""


class RejectedError(ValueError):
    """A row that cannot be trained on.

    Args:
        kind: One of ``KINDS``, by which rejects are counted.
        reason: One line for a person.
    """

    def __init__(self, kind: str, reason: str) -> None:
        assert kind in KINDS, kind
        super().__init__(reason)
        self.kind, self.reason = kind, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes."""
        return type(self), (self.kind, self.reason)
