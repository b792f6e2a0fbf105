"""Shapes of a request's body over which vLLM 0.32 stumbles: what it would make a 500 of is refused in one line before it looks."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.serving.body import NOT_SUPPORTED
from nemo_bard.serving.requests import BadRequest, short_key, shown

SOUNDS = ("audio_url", "input_audio", "audio_embeds")
MEDIA = ("image_url", "input_image", "image_embeds", "image_pil", "video_url", "video_embeds")
TRUNCATE, STRUCTURED = "truncate_prompt_tokens", "structured_outputs"
CHECKED_LATER = ("messages", "input", "prompt")
"""Their texts are vLLM's matter, which refuses those that no UTF-8 can hold."""


def check_shapes(body: Any) -> None:
    """Check the body of a request to any route of vLLM's server.

    Args:
        body: As JSON gives it; what is no object is left to vLLM.

    Raises:
        BadRequest: For the first part of a message, key or text that vLLM would fail on.
    """
    if not isinstance(body, Mapping):
        return
    media = [_part(part, where) for part, where in _parts(body.get("messages"))]
    if body.get(TRUNCATE) is not None and any(media):
        got = shown(body[TRUNCATE])
        raise BadRequest(f"{TRUNCATE} must be left out where there are pictures, got {got}", TRUNCATE)
    if body.get(STRUCTURED) is not None:
        why = NOT_SUPPORTED[STRUCTURED][1]
        raise BadRequest(f"{STRUCTURED} is not supported, got {shown(body[STRUCTURED])}: {why}", STRUCTURED)
    for key, value in body.items():
        if key not in CHECKED_LATER:
            _encodable(key, value)


def _parts(messages: Any) -> Iterator[tuple[Any, str]]:
    """Every part of every message, and where it is."""
    for i, message in enumerate(messages if isinstance(messages, list) else ()):
        content = message.get("content") if isinstance(message, Mapping) else None
        for j, part in enumerate(content if isinstance(content, list) else ()):
            yield part, f"messages[{i}].content[{j}]"


def _part(part: Any, where: str) -> bool:
    """Check a part; returns whether it is a picture or a video."""
    if isinstance(part, str):
        return False
    if not isinstance(part, Mapping):
        raise BadRequest(f"{where} must be an object with 'type', got {short(part)}", "messages")
    kind = part.get("type")
    if "type" in part and not isinstance(kind, str):
        raise BadRequest(f"{where}: type must be a text, as 'text' or 'image_url', got {shown(kind)}", "messages")
    sound = next((name for name in SOUNDS if name == kind or name in part), None)
    if sound:
        raise BadRequest(f"{where}: {sound} is not supported, the model hears nothing", "messages")
    return kind in MEDIA or any(name in part for name in MEDIA)


def _encodable(key: str, value: Any) -> None:
    """Refuse half of a surrogate pair, which JSON can hold and the way to the engine cannot."""
    try:
        json.dumps([key, value], ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        name = short_key(key).encode("ascii", "backslashreplace").decode()
        raise BadRequest(f"{name} holds {error.object[error.start]!a}, which is no character", name) from error
