"""Conversations: records as turns with typed parts, and media that are opened when they are needed.

A data set is sized and map-style. An item is ``{"conversation": [{"role", "content"}, ...], "sample_index": int, ...}``
with content parts ``{"type": "text", "text"}``, ``{"type": "image", "image": PIL image}`` and ``{"type": "video",
"video": path}``: what AutoModel's own VLM collate functions read as well.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from nemo_bard.base.errors import short
from nemo_bard.data.images import SizeOnly, image_size, read_bytes, read_image
from nemo_bard.data.sample import RejectedError

ROLES = ("system", "user", "assistant")
RESERVED_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that structure a conversation; inside a text they would move its turns or images."""

_PLACEHOLDER = re.compile(r"<(image|video)>")
_SOURCE_KEYS = {"image": ("image", "path", "url", "bytes", "base64"), "video": ("video", "path", "url")}
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
        elif self.path is None or not self.path.is_file():
            raise RejectedError("missing_video", f"video file {self.path} does not exist")


def parse_record(
    record: object, root_dir: Path, *, needs_answer: bool = True
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Turn one JSON object into a conversation whose images are still closed (``MediaSource``).

    Args:
        record: ``{"messages": [...], "images": [...], "videos": [...], <metadata>}``. A content is a text, in which each
            ``<image>`` or ``<video>`` stands for the next entry of ``images`` or ``videos``, or a list of typed parts; an
            image part without a source takes the next entry of ``images`` too.
        root_dir: Folder that relative paths start from.
        needs_answer: Whether there must be an assistant turn, as in training and evaluation; a prompt has none.

    Returns:
        The conversation, and all other keys of the record.

    Raises:
        ValueError: If the structure is wrong, there is no assistant turn, an answer is empty, or placeholders and
            entries do not match.
    """
    if not isinstance(record, dict):
        raise RejectedError("messages", f"a line must be a JSON object, got {type(record).__name__}")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RejectedError("messages", f"'messages' must be a non-empty list, got {short(messages)}")
    pools: dict[str, list[MediaSource]] = {}
    for kind in ("image", "video"):
        entries = record.get(f"{kind}s")
        entries = [] if entries is None else entries
        if not isinstance(entries, list):
            raise RejectedError("layout", f"'{kind}s' must be a list, got {short(entries)}")
        pools[kind] = [_media_source(kind, entry, root_dir) for entry in entries]
    feeds = {kind: iter(pool) for kind, pool in pools.items()}
    wanted = {"image": 0, "video": 0}
    conversation = [_parse_message(message, i, feeds, wanted, root_dir) for i, message in enumerate(messages)]
    for kind, pool in pools.items():
        if wanted[kind] != len(pool):
            reason = f"{wanted[kind]} {kind} placeholders in 'messages' but {len(pool)} entries in '{kind}s'"
            raise RejectedError("placeholders", reason)
    if needs_answer and not any(message["role"] == "assistant" for message in conversation):
        raise RejectedError("no_answer", "no assistant turn in 'messages', there is nothing to learn from")
    meta = {key: value for key, value in record.items() if key not in ("messages", "images", "videos")}
    return conversation, meta


def _parse_message(
    message: object, index: int, feeds: dict[str, Iterator[MediaSource]], wanted: dict[str, int], root_dir: Path
) -> dict[str, Any]:
    where = f"messages[{index}]"
    role, content = check_turn(message, where)
    if isinstance(content, str):
        parts = _split_placeholders(content, feeds, wanted)
    elif isinstance(content, list):
        parts = [_parse_part(part, f"{where}.content[{i}]", feeds, wanted, root_dir) for i, part in enumerate(content)]
    else:
        kind = "missing_text" if content is None else "messages"
        raise RejectedError(kind, f"{where}: content must be a text or a list of parts, got {short(content)}")
    for part in parts:
        if part["type"] == "text":
            check_text(part["text"], where)
    if role == "assistant":
        if any(part["type"] != "text" for part in parts):
            raise RejectedError("messages", f"{where}: an assistant turn must be text only")
        if not "".join(part["text"] for part in parts).strip():
            raise RejectedError("empty_answer", f"{where}: the answer of the assistant is empty")
    return {"role": role, "content": parts}


def check_turn(message: object, where: str) -> tuple[str, object]:
    """Role and content of a turn.

    Raises:
        RejectedError: If it is no object or of somebody unknown.
    """
    if not isinstance(message, Mapping):
        reason = f"{where} must be an object with 'role' and 'content', got {short(message)}"
        raise RejectedError("messages", reason)
    role = message.get("role")
    if role not in ROLES:
        raise RejectedError("unknown_role", f"{where}: role must be one of {', '.join(ROLES)}, got {short(role)}")
    return role, message.get("content")


def check_text(text: str, where: str) -> None:
    """Check that a text can be encoded and leaves the turns as they are.

    Raises:
        RejectedError: If not.
    """
    if found := next((token for token in RESERVED_TOKENS if token in text), None):
        raise RejectedError("reserved_token", f"{where}: the text holds {found}, which the chat template reserves")
    check_encodable(text, where)


def check_encodable(text: str, where: str) -> None:
    """Check that a text can be written and tokenised.

    Raises:
        RejectedError: If not.
    """
    if "\0" in text:
        raise RejectedError("bad_text", f"{where}: the text holds a NUL character at place {text.index(chr(0))}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        reason = f"half of a surrogate pair ({text[error.start]!a}) at place {error.start}"
        raise RejectedError("bad_text", f"{where}: the text holds {reason}") from error


def _parse_part(
    part: object, where: str, feeds: dict[str, Iterator[MediaSource]], wanted: dict[str, int], root_dir: Path
) -> dict[str, Any]:
    if not isinstance(part, Mapping):
        raise RejectedError("messages", f"{where} must be an object with 'type', got {short(part)}")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            kind = "missing_text" if part.get("text") is None else "messages"
            raise RejectedError(kind, f"{where}: 'text' must be a text, got {short(part.get('text'))}")
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": _media_source("image", url, root_dir)}
    if kind not in _SOURCE_KEYS:
        reason = f"{where}: type must be one of text, image, image_url, video, got {short(kind)}"
        raise RejectedError("messages", reason)
    if any(part.get(key) is not None for key in _SOURCE_KEYS[kind]):
        return {"type": kind, kind: _media_source(kind, part, root_dir)}
    wanted[kind] += 1
    return {"type": kind, kind: next(feeds[kind], None)}


def _split_placeholders(
    text: str, feeds: dict[str, Iterator[MediaSource]], wanted: dict[str, int]
) -> list[dict[str, Any]]:
    parts: list[dict[str, Any]] = []
    cursor = 0
    for match in _PLACEHOLDER.finditer(text):
        if match.start() > cursor:
            parts.append({"type": "text", "text": text[cursor : match.start()]})
        kind = match.group(1)
        wanted[kind] += 1
        parts.append({"type": kind, kind: next(feeds[kind], None)})
        cursor = match.end()
    if cursor < len(text) or not parts:
        parts.append({"type": "text", "text": text[cursor:]})
    return parts


def _media_source(kind: str, entry: object, root_dir: Path) -> MediaSource:
    """Read a path, a data URI, base64 text, bytes, or an object that holds one of them."""
    if isinstance(entry, MediaSource):
        return entry
    if isinstance(entry, bytes) and kind == "image":
        return MediaSource(kind, data=entry)
    if isinstance(entry, Mapping):
        given = {key: entry[key] for key in _SOURCE_KEYS[kind] if entry.get(key) is not None}
        for key in ("bytes", "base64"):
            if isinstance(given.get(key), str) and not given[key].startswith("data:"):
                return MediaSource(kind, encoded=given[key])
        if isinstance(given.get("bytes"), bytes):  # they count, a path beside them is but a name
            return MediaSource(kind, data=given["bytes"])
        entry = next(iter(given.values()), None)
        if isinstance(entry, Mapping):
            return _media_source(kind, entry, root_dir)
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


def media_of(conversation: list[dict[str, Any]]) -> Iterator[MediaSource]:
    """Yield the closed media of a conversation, in order."""
    for message in conversation:
        for part in message["content"]:
            if part["type"] != "text":
                yield part[part["type"]]


def open_media(conversation: list[dict[str, Any]], *, header_only: bool = False) -> list[dict[str, Any]]:
    """Return a parsed conversation with its images read and its videos as paths.

    Args:
        conversation: From ``parse_record``; not modified.
        header_only: Of images, read the headers alone: they know their ``size``.

    Raises:
        ValueError: If an image cannot be read.
    """

    def opened(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            return {**part, "image": part["image"].open_image(header_only=header_only)}
        return {**part, "video": str(part["video"].path)} if part["type"] == "video" else part

    return [{**message, "content": [opened(part) for part in message["content"]]} for message in conversation]


def split_last_response(conversation: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """Split a conversation before its last assistant turn.

    Args:
        conversation: Turns with typed parts or text; not modified.

    Returns:
        The turns before the last assistant turn, and that turn's text.

    Raises:
        ValueError: If there is no assistant turn.
    """
    for index in range(len(conversation) - 1, -1, -1):
        if conversation[index]["role"] == "assistant":
            content = conversation[index]["content"]
            text = content if isinstance(content, str) else "".join(part["text"] for part in content)
            return conversation[:index], text
    raise ValueError("no assistant turn in the conversation")
