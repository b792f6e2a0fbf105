"""What ``serve.py`` asks: samples as messages of OpenAI, as a file of prompts, and answers of ``nemo-bard generate`` to it."""

from __future__ import annotations

import argparse
import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.base.files import write_text


def png_url(image: Any) -> str:
    """``data:`` URL of an image, a ``PIL.Image`` or a source that opens as one: upright, RGB, lossless."""
    opened = image.open_image() if hasattr(image, "open_image") else image
    stream = io.BytesIO()
    opened.convert("RGB").save(stream, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()


def openai_messages(turns: list[dict[str, Any]], where: str) -> list[dict[str, Any]]:
    """Turns as OpenAI has them.

    Args:
        turns: With texts or typed parts.
        where: What an error begins with.

    Raises:
        ValueError: For an image that cannot be read, and for a video, which OpenAI's interface has no place for.
    """
    try:
        return [{"role": turn["role"], "content": openai_content(turn["content"])} for turn in turns]
    except ValueError as error:
        raise ValueError(f"{where}: {one_line(error)}") from error


def openai_content(content: str | list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """A turn's text or typed parts."""
    return content if isinstance(content, str) else [openai_part(part) for part in content]


def openai_part(part: dict[str, Any]) -> dict[str, Any]:
    """A typed part of a turn."""
    if part["type"] == "text":
        return {"type": "text", "text": part["text"]}
    if part["type"] == "image":
        return {"type": "image_url", "image_url": {"url": png_url(part["image"])}}
    raise ValueError(f"only texts and images are sent, got a {part['type']}")


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """What is asked."""

    ids: list[Any]
    messages: list[list[dict[str, Any]]]
    """OpenAI's, images in them."""


def read_prompts(args: argparse.Namespace) -> Prompts:
    """The prompts of ``--prompts`` or ``--data``, images read.

    Raises:
        ValueError: If they cannot be had.
    """
    if args.prompts is not None:
        from nemo_bard.evaluation.batch import read_prompts as read_lines

        lines = read_lines(args.prompts, "")[: args.samples]
        asked = [openai_messages(line.conversation, f"{args.prompts}:{line.line}") for line in lines]
        return Prompts(ids=[line.id for line in lines], messages=asked)
    from nemo_bard.data.conversation import split_last_response
    from nemo_bard.data.readers import open_dataset

    dataset = open_dataset(args.data, limit=args.samples)
    count = min(args.samples, len(dataset))
    asked = [
        openai_messages(split_last_response(dataset[index]["conversation"])[0], f"{args.data}, sample {index}")
        for index in range(count)
    ]
    return Prompts(ids=list(range(count)), messages=asked)


def write_prompts(path: Path, prompts: Prompts) -> None:
    """Write prompts as a file for ``nemo-bard generate --batch``, images in it."""

    def own(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [{"type": "image", "image": one["image_url"]["url"]} if "image_url" in one else one for one in content]

    records = [
        {"id": id_, "messages": [{**turn, "content": own(turn["content"])} for turn in messages]}
        for id_, messages in zip(prompts.ids, prompts.messages, strict=True)
    ]
    write_text(path, "".join(json.dumps(record) + "\n" for record in records))


def read_reference(path: Path, prompts: Prompts) -> dict[int, str]:
    """Texts by the place of their prompt.

    Raises:
        ValueError: If a line is no answer or a prompt has none.
    """
    texts: dict[Any, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            record = json.loads(line)
            texts[record["id"]] = record["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}:{number} is no answer of nemo-bard generate ({one_line(error)})") from error
    for id_ in prompts.ids:
        if id_ not in texts:
            raise ValueError(f"{path} has no answer to the prompt with id {id_!r}")
    return {index: texts[id_] for index, id_ in enumerate(prompts.ids)}


def make_bodies(args: argparse.Namespace, prompts: Prompts, model: str, xargs: dict[str, Any]) -> list[bytes]:
    """A request for each prompt, encoded."""
    shared = {
        "model": model,
        "max_tokens": args.max_tokens,
        "temperature": args.temperature,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"vllm_xargs": xargs} if xargs else {}),
    }
    seeds = [{"seed": args.seed + index} if args.temperature > 0 else {} for index in range(len(prompts.messages))]
    pairs = zip(prompts.messages, seeds, strict=True)
    return [json.dumps({**shared, **seed, "messages": messages}).encode() for messages, seed in pairs]
