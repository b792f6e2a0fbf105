"""Layouts of own data: our JSONL, archives, tables and folders of images with captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.data.layouts.row import facts, images, layout, name, one_of, turn, turns, videos
from nemo_bard.data.sample import Record, RejectedError

CAPTION_PROMPT = "Describe the image."
"""What the user asks where a set has captions alone."""
IMAGES = ("image", "image_path", "file_name", "filename", "filepath", "img", "jpg")
CAPTIONS = ("caption", "text", "description", "answer")
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
    prompt = one_of(row, PROMPTS)
    image = one_of(row, IMAGES)
    return Record(
        messages=_captioned(CAPTION_PROMPT if prompt is None else prompt, one_of(row, CAPTIONS), "the row"),
        images=images([None] if image is None else image),
        id=name(row.get("id")),
        facts=facts(row, ("id", *IMAGES, *CAPTIONS, *PROMPTS)),
    )


@layout("__key__")
def webdataset(row: Mapping[str, Any]) -> Record:
    """A sample of an archive: images with a JSON of any of these layouts, of ``prompts`` and ``captions``, or a text."""
    key, body = row["__key__"], row.get("json")
    pictures = {end: value for end, value in row.items() if end.rsplit(".", 1)[-1].lower() in PICTURES}
    if body is None:
        text = one_of(row, ("txt", "caption", "text"))
        return Record(messages=_captioned(CAPTION_PROMPT, text, f"{key}.txt"), images=list(pictures.values()), id=key)
    if not isinstance(body, Mapping):
        raise RejectedError("layout", f"{key}.json must hold an object, got {short(body)}")
    if isinstance(body.get("captions"), list):
        return _packed(key, body, pictures)
    return _with_json(key, body, pictures)


def _with_json(key: str, body: Mapping[str, Any], pictures: Mapping[str, Any]) -> Record:
    """A sample whose JSON is a row of another layout; its images are the archive's, where it has some."""
    from nemo_bard.data.layouts.registry import detect, lay_out

    media = ("image", "images")
    inner = {**body, **({"image": list(pictures.values())} if pictures else {})}
    if pictures:
        inner.pop("images", None)
        if "texts" in body:
            inner["images"] = inner.pop("image")
    try:
        layout_name = detect(inner)
    except ValueError as error:
        raise RejectedError("layout", f"{key}.json: {error}") from error
    record = lay_out(layout_name, inner)
    return Record(
        messages=record.messages,
        images=record.images,
        videos=record.videos,
        id=key if record.id is None else record.id,
        facts={fact: value for fact, value in record.facts.items() if fact not in media},
    )


def _packed(key: str, body: Mapping[str, Any], pictures: Mapping[str, Any]) -> Record:
    """Several images with a prompt and a caption each, by number."""
    texts = body["captions"]
    prompts = body.get("prompts")
    prompts = [CAPTION_PROMPT] * len(texts) if prompts is None else prompts
    names = body.get("images")
    names = list(pictures) if names is None else names
    if not isinstance(prompts, Sequence) or not isinstance(names, Sequence) or not len(prompts) == len(texts):
        raise RejectedError("layout", f"{key}.json: prompts and captions must be lists of the same length")
    if len(names) != len(texts):
        raise RejectedError("placeholders", f"{key}.json: {len(names)} images but {len(texts)} captions")
    found = []
    for number, (prompt, caption) in enumerate(zip(prompts, texts, strict=True)):
        exchange = _captioned(CAPTION_PROMPT if prompt is None else prompt, caption, f"{key}.json[{number}]")
        if "<image>" not in exchange[0]["content"]:
            exchange[0]["content"] = f"<image>\n{exchange[0]['content']}"
        found += exchange
    return Record(
        messages=found,
        images=[_member(key, image, pictures) for image in names],
        id=key if body.get("id") is None else str(body["id"]),
        facts=facts(body, ("captions", "prompts", "images", "id")),
    )


def _member(key: str, image: object, pictures: Mapping[str, Any]) -> bytes:
    """The image that a name means: the end of a member, or its whole name."""
    for end, data in pictures.items():
        if image in (end, f"{key}.{end}"):
            return data
    raise RejectedError(
        "bad_member", f"{key}.json names the image {short(image)}, found {', '.join(pictures) or 'none'}"
    )


def _captioned(prompt: object, caption: object, where: str) -> list[dict[str, Any]]:
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(caption, list):
        raise RejectedError("layout", f"{where}: one caption is needed, got {len(caption)}")
    return [turn("user", prompt, where), turn("assistant", caption, where)]
