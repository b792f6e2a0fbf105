"""Turns of lmms-eval as conversations of this package."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from nemo_bard.base.errors import short
from nemo_bard.data.encode import Conversation
from nemo_bard.data.images import as_rgb
from nemo_bard.data.media import media_source

ROLES = ("system", "user", "assistant")
_CUTS = ("video_start", "video_end", "start_time", "end_time")


def read_messages(messages: Iterable[Mapping[str, Any]], system_prompt: str | None = None) -> Conversation:
    """Turn a task's messages into a conversation, with its images read.

    Args:
        messages: Turns with ``role`` and ``content``: a text, or parts ``{"type": "text" | "image" | "video", ...}`` whose
            media are under ``url``, images as Pillow has them, or files.
        system_prompt: Takes the place of a system turn, or is put first.

    Raises:
        ValueError: For audio, a part of a video, an address in place of a file, or media that cannot be read.
    """
    conversation = [_read_turn(message) for message in messages]
    if system_prompt is not None:
        conversation = [turn for turn in conversation if turn["role"] != "system"]
        conversation.insert(0, {"role": "system", "content": [{"type": "text", "text": system_prompt}]})
    return conversation


def user_turn(visuals: Iterable[Any] | None, text: str) -> list[dict[str, Any]]:
    """Messages of one question: media as a task's ``doc_to_visual`` gives them, then the text."""
    parts = [
        {"type": "image" if _is_image(visual) else "video", "url": visual}
        for visual in visuals or ()
        if visual is not None
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def _is_image(visual: Any) -> bool:
    if isinstance(visual, str):
        return Path(visual).suffix.lower() in Image.registered_extensions()
    return not isinstance(visual, Mapping)


def _read_turn(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        raise ValueError(f"role must be one of {', '.join(ROLES)}, got {role!r}")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    return {"role": role, "content": [_read_part(part) for part in parts or ()]}


def _read_part(part: Mapping[str, Any]) -> dict[str, Any]:
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": part["text"]}
    if kind == "image":
        return {"type": "image", "image": _read_image(part.get("url", part.get("image")))}
    if kind == "video":
        return {"type": "video", "video": _video_file(part)}
    raise ValueError(f"a part must be a text, an image or a video, got {short(kind)}")


def _read_image(image: Any) -> Image.Image:
    if isinstance(image, Image.Image):
        return as_rgb(image)
    return media_source("image", image, Path()).open_image()


def _video_file(part: Mapping[str, Any]) -> str:
    video = part.get("url", part.get("video"))
    fields = {**part, **video} if isinstance(video, Mapping) else part
    for name in _CUTS:
        if fields.get(name) is not None:
            raise ValueError(f"{name} is set: parts of a video are not supported, cut the file")
    if isinstance(video, Mapping):
        video = next((video[key] for key in ("url", "path", "video") if video.get(key) is not None), None)
    source = media_source("video", video, Path())
    source.check()
    return str(source.path)
