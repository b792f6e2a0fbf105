"""Conversations: records as turns with typed parts, and media that are opened when they are needed.

A data set is sized and map-style. An item is ``{"conversation": [{"role", "content"}, ...], "sample_index": int, ...}``
with content parts ``{"type": "text", "text"}``, ``{"type": "image", "image": PIL image}`` and ``{"type": "video",
"video": path}``: what AutoModel's own VLM collate functions read as well.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.base.names import MASK_TOKEN
from nemo_bard.data.media import SOURCE_KEYS, MediaSource, media_source
from nemo_bard.data.sample import RejectedError

ROLES = ("system", "user", "assistant")
RESERVED_TOKENS = (
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    MASK_TOKEN,
)
"""Tokens that structure a conversation, and the mask token; inside a text they would move its turns or images, or hide a
token."""

_PLACEHOLDER = re.compile(r"<(image|video)>")


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
        pools[kind] = [media_source(kind, entry, root_dir) for entry in entries]
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
        why = "the name of the mask token" if found == MASK_TOKEN else "which the chat template reserves"
        raise RejectedError("reserved_token", f"{where}: the text holds {found}, {why}")
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
        return {"type": "image", "image": media_source("image", url, root_dir)}
    if not isinstance(kind, str) or kind not in SOURCE_KEYS:
        reason = f"{where}: type must be one of text, image, image_url, video, got {short(kind)}"
        raise RejectedError("messages", reason)
    if any(part.get(key) is not None for key in SOURCE_KEYS[kind]):
        return {"type": kind, kind: media_source(kind, part, root_dir)}
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
