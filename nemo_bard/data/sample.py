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


class RejectedError(ValueError):
    """A row that cannot be trained on.

    Args:
        kind: A word that rejects are counted by, such as ``corrupt_image``.
        reason: One line for a person.
    """

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason

    def __reduce__(self) -> tuple[Any, ...]:
        """Errors travel between processes."""
        return type(self), (self.kind, self.reason)
