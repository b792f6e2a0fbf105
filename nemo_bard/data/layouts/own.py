"""Layouts of own data: our JSONL, archives, tables and folders of images with captions."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.data.layouts.row import facts, images, layout, name, one_of, turn, turns, videos
from nemo_bard.data.sample import Record, RejectedError

CAPTION_PROMPT = "Describe the image."
"""What the user asks where a set has captions alone."""
IMAGES = ("image", "image_path", "file_name", "filename", "filepath", "img", "jpg")
CAPTIONS = ("caption", "text", "description", "answer", "response")
PROMPTS = ("prompt", "question")
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff")
"""Ends of an archive's members that are images."""


@layout("messages")
def messages(row: Mapping[str, Any]) -> Record:
    """Our JSONL: ``messages`` [{role, content}], ``images`` and ``videos`` in the order of their placeholders."""
    media = ("images", "image", "videos", "video")
    return Record(
        messages=turns(row["messages"], "messages"),
        images=images(one_of(row, media[:2])),
        videos=videos(one_of(row, media[2:])),
        id=name(row.get("id")),
        facts=facts(row, ("messages", "id", *media)),
    )


@layout(IMAGES, CAPTIONS)
def captions(row: Mapping[str, Any]) -> Record:
    """A table of images and captions, also with a ``prompt`` or ``question``; a null image stays null."""
    image = one_of(row, IMAGES)
    return Record(
        messages=_captioned(one_of(row, PROMPTS), one_of(row, CAPTIONS), "the row"),
        images=images([None] if image is None else image),
        id=name(row.get("id")),
        facts=facts(row, ("id", *IMAGES, *CAPTIONS, *PROMPTS)),
    )


@layout("__key__")
def webdataset(row: Mapping[str, Any]) -> Record:
    """A sample of an archive: images with a JSON of any of these layouts, of ``prompts`` and ``captions``, or a text."""
    key, body, text = row["__key__"], row.get("json"), one_of(row, ("txt", "caption", "text"))
    ends = [end for end in row if end.rpartition(".")[2].lower() in PICTURES]
    pictures = {end: row[end] for end in _by_number(ends)}
    if body is None:
        return Record(messages=_captioned(None, text, f"{key}.txt"), images=list(pictures.values()), id=name(key))
    if not isinstance(body, Mapping):
        raise RejectedError("layout", f"{key}.json must hold an object, got {short(body)}")
    if isinstance(body.get("captions"), list):
        return _packed(key, body, pictures)
    return _with_json(key, body, pictures, text)


def _with_json(key: str, body: Mapping[str, Any], pictures: Mapping[str, Any], text: str | None) -> Record:
    """A sample whose JSON is a row of another layout; images and a text are the archive's, where it has some."""
    from nemo_bard.data.layouts.registry import detect, lay_out

    inner = {column: value for column, value in body.items() if column != "__key__"}
    if text is not None:
        inner = {"text": text, **inner}
    if pictures:
        inner = {column: value for column, value in inner.items() if column not in ("image", "images")}
        column = "images" if "texts" in inner or "messages" in inner else "image"
        inner[column] = _as_listed(key, body.get("images"), pictures)
    try:
        layout_name = detect(inner)
    except ValueError as error:
        raise RejectedError("layout", f"{key}.json: {error}") from error
    record = lay_out(layout_name, inner)
    return record if record.id is not None else dataclasses.replace(record, id=name(key))


def _packed(key: str, body: Mapping[str, Any], pictures: Mapping[str, Any]) -> Record:
    """Several images with a prompt and a caption each, or a list of each, by number."""
    texts, prompts = body["captions"], body.get("prompts")
    prompts = [CAPTION_PROMPT] * len(texts) if prompts is None else prompts
    found_images = _as_listed(key, body.get("images"), pictures)
    if not isinstance(prompts, list) or len(prompts) != len(texts):
        raise RejectedError("layout", f"{key}.json: prompts and captions must be lists of the same length")
    if len(found_images) != len(texts):
        raise RejectedError("placeholders", f"{key}.json: {len(found_images)} images but {len(texts)} captions")
    found: list[dict[str, Any]] = []
    for number, pair in enumerate(zip(prompts, texts, strict=True)):
        asked, said = (value if isinstance(value, list) else [value] for value in pair)
        if len(asked) != len(said) or not said:
            raise RejectedError("layout", f"{key}.json[{number}]: {len(asked)} prompts but {len(said)} captions")
        exchanges = [
            message
            for prompt, caption in zip(asked, said, strict=True)
            for message in _captioned(prompt, caption, f"{key}.json[{number}]")
        ]
        if "<image>" not in exchanges[0]["content"]:
            exchanges[0]["content"] = f"<image>\n{exchanges[0]['content']}"
        found += exchanges
    return Record(
        messages=found,
        images=found_images,
        id=name(key if body.get("id") is None else body["id"]),
        facts=facts(body, ("captions", "prompts", "images", "id")),
    )


def _by_number(ends: list[str]) -> list[str]:
    """Ends that differ in one number, such as ``img2.jpg`` and ``img10.jpg``, by that number; others as they are."""
    found = [re.fullmatch(r"(\D*)(\d+)(\D*)", end) for end in ends]
    if not all(found) or len({(match[1], match[3]) for match in found if match}) != 1:
        return ends
    return sorted(ends, key=lambda end: int(re.sub(r"\D", "", end)))


def _as_listed(key: str, listed: object, pictures: Mapping[str, Any]) -> list[Any]:
    """The archive's images in the order of a JSON's list: by name where it names members, otherwise by number.

    A list may also hold the names that the images had before they were packed.
    """
    if not isinstance(listed, list):
        return list(pictures.values())
    ends = [_end_of(key, image, pictures) for image in listed]
    if set(ends) == set(pictures):
        return [pictures[str(end)] for end in ends]
    shapes = {re.sub(r"\d", "", end) for end in pictures}
    if any(ends) or len(listed) != len(pictures) or any(re.sub(r"\d", "", str(one)) in shapes for one in listed):
        have = ", ".join(pictures) or "none"
        raise RejectedError("bad_member", f"{key}.json names the images {short(listed)}, the archive has {have}")
    return list(pictures.values())


def _end_of(key: str, image: object, pictures: Mapping[str, Any]) -> str | None:
    """The member that a name means: its end with or without the last part, or its whole name."""
    for end in pictures:
        if image in (end, end.rpartition(".")[0], f"{key}.{end}", f"{key.rpartition('/')[2]}.{end}"):
            return end
    return None


def _captioned(prompt: object, caption: object, where: str) -> list[dict[str, Any]]:
    prompt = CAPTION_PROMPT if prompt is None else prompt
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(caption, list):
        raise RejectedError("layout", f"{where}: one caption is needed, got {len(caption)}")
    return [turn("user", prompt, where), turn("assistant", caption, where)]
