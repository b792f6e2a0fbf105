"""Where the media of a row belong among its turns, as published sets leave it open."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from nemo_bard.data.sample import Record, RejectedError

_PLACEHOLDER = {"image": re.compile("<image>"), "video": re.compile("<video>")}


def place_media(record: Record) -> list[dict[str, Any]]:
    """The turns of a row, with a placeholder for each of its images and videos.

    As many placeholders as media keep their places; without any, the media go before the first text of the user.

    Args:
        record: What a layout made of a row; not modified.

    Returns:
        Turns ``{"role", "content"}``, the content as it was, or with placeholders before it.

    Raises:
        RejectedError: If there are some placeholders, but not as many as media, or no turn of the user to put media in.
    """
    messages = [dict(message) for message in record.messages]
    missing = ""
    for kind, media in (("image", record.images), ("video", record.videos)):
        found = sum(_count(message.get("content"), kind) for message in messages)
        if found and found != len(media):
            raise RejectedError("placeholders", f"{found} {kind} placeholder(s) but {len(media)} {kind}(s)")
        if not found:
            missing += f"<{kind}>" * len(media)
    if not missing:
        return messages
    user = next((message for message in messages if message.get("role") == "user"), None)
    if user is None:
        raise RejectedError("placeholders", "no turn of the user that images or videos without placeholder can go to")
    content = user.get("content")
    if isinstance(content, list):
        user["content"] = [*({"type": kind} for kind in re.findall(r"<(\w+)>", missing)), *content]
    elif isinstance(content, str):
        user["content"] = f"{missing}\n{content}"
    return messages


def _count(content: object, kind: str) -> int:
    """Placeholders of a turn that stand for the next entry."""
    if isinstance(content, str):
        return len(_PLACEHOLDER[kind].findall(content))
    if not isinstance(content, list):
        return 0
    return sum(isinstance(part, Mapping) and part.get("type") == kind and not _has_source(part) for part in content)


def _has_source(part: Mapping[str, Any]) -> bool:
    return any(value is not None for key, value in part.items() if key != "type")
