"""Conversations: the JSONL reader, and helpers that every conversation data set shares.

A data set is sized and map-style. An item is ``{"conversation": [{"role", "content"}, ...], "sample_index": int, ...}``
with content parts ``{"type": "text", "text"}``, ``{"type": "image", "image": PIL image}`` and ``{"type": "video",
"video": path}``: what AutoModel's own VLM collate functions read as well.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from tqdm import tqdm

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
RESERVED_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
"""Tokens that structure a conversation; inside a text they would move its turns or images."""

_PLACEHOLDER = re.compile(r"<(image|video)>")
_SOURCE_KEYS = {"image": ("image", "path", "url", "bytes", "base64"), "video": ("video", "path", "url")}
_BASE64_STARTS = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")  # JPEG, PNG, GIF, WebP
_BASE64_TEXT = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_PROGRESS_BYTES = 256 * 1024 * 1024
_CHUNK_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class MediaSource:
    """Where an image or a video comes from; nothing is opened before ``open_image``."""

    kind: str
    """``image`` or ``video``."""
    path: Path | None = None
    """File, or None if the bytes are in the line."""
    encoded: str | None = None
    """Base64 text of the bytes, or None."""

    def open_image(self, *, header_only: bool = False) -> Image.Image:
        """Read the image as RGB, turned upright by its EXIF tag.

        Args:
            header_only: Only see that it exists and is an image; pixels stay unread.

        Raises:
            ValueError: If it is missing or not readable as an image.
        """
        name = str(self.path) if self.path is not None else "given as bytes"
        if self.path is not None and not self.path.is_file():
            raise ValueError(f"image file {name} does not exist")
        try:
            if self.path is not None:
                stream: Any = self.path
            else:
                stream = io.BytesIO(base64.b64decode("".join((self.encoded or "").split()), validate=True))
            with Image.open(stream) as image:
                return image if header_only else ImageOps.exif_transpose(image).convert("RGB")
        except binascii.Error as error:
            raise ValueError(f"image bytes are not base64 ({error})") from error
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise ValueError(f"image {name} cannot be read ({_one_line(error)})") from error

    def check(self) -> None:
        """Raise ValueError unless the file exists and, for an image, its header can be read."""
        if self.kind == "image":
            self.open_image(header_only=True)
        elif self.path is None or not self.path.is_file():
            raise ValueError(f"video file {self.path} does not exist")


def parse_record(record: object, root_dir: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Turn one JSON object into a conversation whose images are still closed (``MediaSource``).

    Args:
        record: ``{"messages": [...], "images": [...], "videos": [...], <metadata>}``. A content is a text, in which each
            ``<image>`` or ``<video>`` stands for the next entry of ``images`` or ``videos``, or a list of typed parts; an
            image part without a source takes the next entry of ``images`` too.
        root_dir: Folder that relative paths start from.

    Returns:
        The conversation, and all other keys of the record.

    Raises:
        ValueError: If the structure is wrong, there is no assistant turn, an answer is empty, or placeholders and
            entries do not match.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, got {type(record).__name__}")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"'messages' must be a non-empty list, got {_short(messages)}")
    pools: dict[str, list[MediaSource]] = {}
    for kind in ("image", "video"):
        entries = record.get(f"{kind}s")
        entries = [] if entries is None else entries
        if not isinstance(entries, list):
            raise ValueError(f"'{kind}s' must be a list, got {_short(entries)}")
        pools[kind] = [_media_source(kind, entry, root_dir) for entry in entries]
    feeds = {kind: iter(pool) for kind, pool in pools.items()}
    wanted = {"image": 0, "video": 0}
    conversation = [_parse_message(message, i, feeds, wanted, root_dir) for i, message in enumerate(messages)]
    for kind, pool in pools.items():
        if wanted[kind] != len(pool):
            raise ValueError(f"{wanted[kind]} {kind} placeholders in 'messages' but {len(pool)} entries in '{kind}s'")
    if not any(message["role"] == "assistant" for message in conversation):
        raise ValueError("no assistant turn in 'messages', there is nothing to learn from")
    meta = {key: value for key, value in record.items() if key not in ("messages", "images", "videos")}
    return conversation, meta


def _parse_message(
    message: object, index: int, feeds: dict[str, Iterator[MediaSource]], wanted: dict[str, int], root_dir: Path
) -> dict[str, Any]:
    where = f"messages[{index}]"
    if not isinstance(message, dict):
        raise ValueError(f"{where} must be an object with 'role' and 'content', got {_short(message)}")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"{where}: role must be one of {', '.join(ROLES)}, got {_short(role)}")
    if isinstance(content, str):
        parts = _split_placeholders(content, feeds, wanted)
    elif isinstance(content, list):
        parts = [_parse_part(part, f"{where}.content[{i}]", feeds, wanted, root_dir) for i, part in enumerate(content)]
    else:
        raise ValueError(f"{where}: content must be a text or a list of parts, got {_short(content)}")
    for part in parts:
        if part["type"] == "text" and (found := next((t for t in RESERVED_TOKENS if t in part["text"]), None)):
            raise ValueError(f"{where}: the text holds {found}, which the chat template reserves")
    if role == "assistant":
        if any(part["type"] != "text" for part in parts):
            raise ValueError(f"{where}: an assistant turn must be text only")
        if not "".join(part["text"] for part in parts).strip():
            raise ValueError(f"{where}: the answer of the assistant is empty")
    return {"role": role, "content": parts}


def _parse_part(
    part: object, where: str, feeds: dict[str, Iterator[MediaSource]], wanted: dict[str, int], root_dir: Path
) -> dict[str, Any]:
    if not isinstance(part, dict):
        raise ValueError(f"{where} must be an object with 'type', got {_short(part)}")
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"{where}: 'text' must be a text, got {_short(part.get('text'))}")
        return {"type": "text", "text": part["text"]}
    if kind == "image_url":
        url = part.get("image_url")
        return {"type": "image", "image": _media_source("image", url, root_dir)}
    if kind not in _SOURCE_KEYS:
        raise ValueError(f"{where}: type must be one of text, image, image_url, video, got {_short(kind)}")
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
    """Read a path, a data URI, base64 text, or an object that holds one of them."""
    if isinstance(entry, dict):
        given = {key: entry[key] for key in _SOURCE_KEYS[kind] if entry.get(key) is not None}
        for key in ("bytes", "base64"):
            if isinstance(given.get(key), str) and not given[key].startswith("data:"):
                return MediaSource(kind, encoded=given[key])
        entry = next(iter(given.values()), None)
        if isinstance(entry, dict):
            return _media_source(kind, entry, root_dir)
    if not isinstance(entry, str) or not entry:
        raise ValueError(
            f"{kind} must be a path{', a data: URI or base64 bytes' * (kind == 'image')}, got {_short(entry)}"
        )
    if entry.startswith("data:") and kind == "image":
        header, comma, payload = entry.partition(",")
        if not comma or not header.endswith(";base64"):
            raise ValueError(f"image data: URI must be 'data:<type>;base64,<bytes>', got {_short(entry)}")
        return MediaSource(kind, encoded=payload)
    if re.match(r"(?i)(https?|ftp|s3|gs)://", entry):
        raise ValueError(f"{kind} must be a local file, got the address {_short(entry)}")
    if kind == "image" and entry.startswith(_BASE64_STARTS) and len(entry) >= 64 and _BASE64_TEXT.fullmatch(entry):
        return MediaSource(kind, encoded=entry)
    path = Path(entry.removeprefix("file://"))
    return MediaSource(kind, path=path if path.is_absolute() else root_dir / path)


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


class JsonlDataset:
    """Conversations of a JSONL file, read by byte offset; images are opened when an item is asked for.

    Args:
        path: File of one JSON object a line, see ``parse_record``.
        root_dir: Folder that relative image paths start from; the file's folder if None.
        validate: Check every line at start: JSON, structure, and that each image exists and has a readable header.
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
            self._validate()

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

    def fingerprint(self) -> str:
        """A text that changes with the file (name, size, time and lines), the folder of its images, and ``limit``."""
        state = self.path.stat()
        lines = hashlib.sha256(self._bounds.tobytes()).hexdigest()
        return f"jsonl {self.path.name} {state.st_size} {state.st_mtime_ns} {lines} {self.root_dir.resolve()}"

    def _read(self, index: int, *, header_only: bool) -> dict[str, Any]:
        conversation, meta = self._parse(index)
        for message in conversation:
            for part in message["content"]:
                if part["type"] == "image":
                    try:
                        part["image"] = part["image"].open_image(header_only=header_only)
                    except ValueError as error:
                        raise ValueError(f"{self._where(index)}: {error}") from error
                elif part["type"] == "video":
                    part["video"] = str(part["video"].path)
        return {"conversation": conversation, "sample_index": int(index), "meta": meta}

    def _where(self, index: int) -> str:
        return f"{self.path}:{index + 1}"

    def _parse(self, index: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside a data set of {len(self)} samples")
        with self.path.open("rb") as file:
            file.seek(int(self._bounds[index]))
            line = file.read(int(self._bounds[index + 1] - self._bounds[index]))
        try:
            return parse_record(_load_json(line), self.root_dir)
        except ValueError as error:
            raise ValueError(f"{self._where(index)}: {error}") from error

    def _validate(self) -> None:
        for index in tqdm(range(len(self)), desc=f"checking {self.path.name}", unit="line", disable=None, delay=2):
            conversation, _ = self._parse(index)
            for message in conversation:
                for part in message["content"]:
                    if part["type"] != "text":
                        try:
                            part[part["type"]].check()
                        except ValueError as error:
                            raise ValueError(f"{self._where(index)}: {error}") from error
        logger.info("%s: %d conversations, all checked", self.path, len(self))


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


def _load_json(line: bytes) -> object:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
        return record

    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 ({_one_line(error)})") from error
    if not text:
        raise ValueError("the line is empty, a JSON object is needed")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg} at column {error.colno}): {_short(text)}") from error


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


def _short(value: object, width: int = 60) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
