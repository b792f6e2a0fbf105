"""Rows on their way into a prepared folder: checked by the parser that training uses, every image decoded once."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.base.settings import check_settings, choice, integer, setting, text
from nemo_bard.data.conversation import check_encodable, check_text, check_turn, parse_record
from nemo_bard.data.images import PATCH, Size, shrink
from nemo_bard.data.media import MediaSource
from nemo_bard.data.placement import place_media
from nemo_bard.data.sample import Record, RejectedError, Sample
from nemo_bard.data.video import find_decoder, read_video

_THINKING = re.compile(r"(?:\A(?:(?!<think>).)*?|<think>.*?)</think>\s*", re.DOTALL)
_CHECKED_FRAMES = 8
"""Frames of a video that are kept while it is read; all up to the last one are decoded."""


@dataclass(frozen=True, kw_only=True)
class VetSettings:
    """What is done to the rows of a source.

    Raises:
        ValueError: For a value that is not allowed.
    """

    max_pixels: int | None = setting(
        None, integer(PATCH * PATCH, optional=True), "Most pixels of an image; larger ones are re-encoded."
    )
    think: str = setting("keep", choice(("keep", "strip")), "What becomes of <think>...</think> in answers.")
    system: str | None = setting(None, text(optional=True), "System prompt of rows that have none.")

    def __post_init__(self) -> None:
        check_settings(self)
        try:
            check_text(self.system or "", "system")
        except RejectedError as error:
            raise ValueError(error.reason) from error


def vet(record: Record, *, root_dir: Path, name: str, settings: VetSettings) -> Sample:
    """Check a row to its last pixel, and make of it what goes into a prepared folder.

    Args:
        record: What a layout made of the row; not modified.
        root_dir: Folder that relative paths start from.
        name: What the sample is called if the row has no id.
        settings: What is done to it.

    Returns:
        The sample. Images that ``max_pixels`` allows are the original files, byte by byte.

    Raises:
        RejectedError: If it cannot be trained on.
        ValueError: If it has a video and no decoder is installed.
    """
    identity = record.id or name
    check_encodable(identity, "id")
    turns = _turns(record, settings)
    placed = place_media(Record(messages=turns, images=record.images, videos=record.videos))
    given = {"messages": placed, "images": list(record.images), "videos": list(record.videos)}
    conversation, _ = parse_record(given, root_dir)

    images: list[bytes] = []
    sizes: list[Size] = []
    videos: list[str] = []
    known: dict[MediaSource, tuple[bytes, Size]] = {}

    def kept(part: dict[str, Any]) -> dict[str, Any]:
        if part["type"] == "image":
            source = part["image"]
            if source not in known:
                known[source] = shrink(source.image_bytes(), settings.max_pixels, name=_name_of(source, len(images)))
            images.append(known[source][0])
            sizes.append(known[source][1])
        elif part["type"] == "video":
            videos.append(_checked_video(part["video"]))
        return part if part["type"] == "text" else {"type": part["type"]}

    messages = [{**turn, "content": [kept(part) for part in turn["content"]]} for turn in conversation]
    return Sample(id=identity, messages=messages, images=images, sizes=sizes, videos=videos)


def content_key(sample: Sample) -> bytes:
    """A digest of what a sample teaches: roles, texts, image files and paths of videos; not its id.

    Returns:
        16 bytes, the same for duplicates.
    """
    digest = hashlib.blake2b(digest_size=16)

    def add(kind: str, data: bytes) -> None:
        digest.update(f"{kind} {len(data)} ".encode())
        digest.update(data)

    images, videos = iter(sample.images), iter(sample.videos)
    for turn in sample.messages:
        add("turn", turn["role"].encode())
        for part in turn["content"]:
            if part["type"] == "text":
                add("text", part["text"].encode())
            else:
                add(part["type"], next(images) if part["type"] == "image" else os.fsencode(next(videos)))
    return digest.digest()


def _turns(record: Record, settings: VetSettings) -> list[Mapping[str, Any]]:
    """The turns of a row after the settings, their roles checked: where media go depends on them."""
    if not isinstance(record.messages, (list, tuple)):
        raise RejectedError("messages", f"the turns must be a list, got {type(record.messages).__name__}")
    turns: list[Mapping[str, Any]] = []
    for index, turn in enumerate(record.messages):
        role, content = check_turn(turn, f"messages[{index}]")
        if role == "assistant" and settings.think == "strip":
            content = _without_thinking(content, f"messages[{index}]")
        turns.append({**turn, "content": content})
    if settings.system is not None and turns and all(turn["role"] != "system" for turn in turns):
        turns.insert(0, {"role": "system", "content": [{"type": "text", "text": settings.system}]})
    return turns


def _without_thinking(content: Any, where: str) -> Any:
    """An answer without its thinking; one that begins inside it, as such models' answers do, loses it up to its end."""
    if isinstance(content, list):
        return [
            {**part, "text": _without_thinking(part.get("text"), where)} if isinstance(part, Mapping) else part
            for part in content
        ]
    if not isinstance(content, str):
        return content
    answer = _THINKING.sub("", content)
    for token in ("<think>", "</think>"):
        if token in answer:
            raise RejectedError("thinking", f"{where}: the answer holds {token} without its counterpart")
    return answer


def _name_of(source: MediaSource, index: int) -> str:
    return f"{index + 1} of the row" if source.path is None else str(source.path)


def _checked_video(source: MediaSource) -> str:
    """The absolute path of a video that can be read to its last frame."""
    source.check()
    find_decoder()  # without one no row is to blame
    path = os.path.abspath(str(source.path))
    check_encodable(path, "video")
    try:
        read_video(path, _video_processor())
    except ValueError as error:
        raise RejectedError("unreadable_video", one_line(error)) from error
    return path


@functools.cache
def _video_processor() -> Any:
    """Picks frames as Qwen3-VL's does, the first and the last among them, but few: they are held in memory."""
    from transformers import Qwen3VLVideoProcessor

    return Qwen3VLVideoProcessor(max_frames=_CHECKED_FRAMES)
