"""Layouts of published training sets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.data.layouts.row import facts, images, layout, listed, name, one_of, turn, turns, videos
from nemo_bard.data.sample import Record, RejectedError

RESPONSES = ("qwen3vl_235b_thinking_response", "thinking_response")
"""Columns of MMFineReason's answers."""
SPELLINGS = {
    "original_question": ("original_question", "ori_question"),
    "caption": ("caption", "qwen3vl_235b_instruct_caption"),
    "pass_rate": ("pass_rate", "qwen3vl_4b_pass_rate"),
}
"""Facts of MMFineReason whose columns have other names in some of its sets."""


def _names_sources(row: Mapping[str, Any]) -> bool:
    texts = row["texts"]
    return isinstance(texts, list) and bool(texts) and isinstance(texts[0], Mapping) and "source" in texts[0]


def _is_onevision(row: Mapping[str, Any]) -> bool:
    conversations = row["conversations"]
    first = conversations[0] if isinstance(conversations, Sequence) and conversations else None
    return "data_source" in row or (isinstance(first, Mapping) and "role" in first)


@layout("texts")
def finevision(row: Mapping[str, Any]) -> Record:
    """FineVision: ``images``, ``texts`` [{user, assistant}], ``source`` and ratings, of which the least is a fact too."""
    found = facts(row, ("images", "texts"))
    for column, ratings in list(found.items()):
        given = [rating for rating in ratings if rating is not None] if isinstance(ratings, list) else []
        least = column.removesuffix("_ratings") + "_min"
        if column.endswith("_ratings") and given and found.get(least) is None:
            found[least] = min(given)
    return Record(
        messages=_exchanges(row["texts"]),
        images=images(row.get("images")),
        id=name(row.get("id")),
        facts=found,
    )


@layout("texts", tells=_names_sources)
def cauldron(row: Mapping[str, Any]) -> Record:
    """The Cauldron: as FineVision, and each exchange names its ``source``."""
    record = finevision(row)
    source = one_of(listed(row["texts"], "texts")[0], ("source",))
    return Record(
        messages=record.messages, images=record.images, id=record.id, facts={"source": source, **record.facts}
    )


def _exchanges(texts: object) -> list[dict[str, Any]]:
    found = []
    for number, exchange in enumerate(listed(texts, "texts")):
        where = f"texts[{number}]"
        if not isinstance(exchange, Mapping):
            raise RejectedError("messages", f"{where} must be an object with user and assistant, got {short(exchange)}")
        if exchange.get("system") is not None:
            found.append(turn("system", exchange["system"], where))
        found += [turn(speaker, exchange.get(speaker), where) for speaker in ("user", "assistant")]
    return found


@layout("conversations")
def llava(row: Mapping[str, Any]) -> Record:
    """LLaVA and its kin: ``id``, ``image`` and ``video`` (one, a list, or none), ``conversations`` [{from, value}]."""
    pictures, films = images(one_of(row, ("image", "images"))), videos(one_of(row, ("video", "videos")))
    messages = turns(row["conversations"], "conversations")
    if films and not pictures:  # sets of videos have <image> where the video goes
        messages = [
            {**message, "content": message["content"].replace("<image>", "<video>")}
            if isinstance(message["content"], str)
            else message
            for message in messages
        ]
    return Record(
        messages=messages,
        images=pictures,
        videos=films,
        id=name(row.get("id")),
        facts=facts(row, ("image", "images", "video", "videos", "conversations", "id")),
    )


@layout("conversations", tells=_is_onevision)
def onevision(row: Mapping[str, Any]) -> Record:
    """LLaVA-OneVision-1.5: as LLaVA; turns have {role, content}, {from, value} or all four; ``data_source``."""
    return llava(row)


@layout("question", RESPONSES)
def mmfinereason(row: Mapping[str, Any]) -> Record:
    """MMFineReason: ``question`` with ``<image>``, ``image``, a thinking response; ``id`` counts within ``source``."""
    found = facts(row, ("question", "image", "id", *RESPONSES))
    for fact, columns in SPELLINGS.items():
        if any(column in row for column in columns):
            found[fact] = one_of(row, columns)
    source, number = name(row.get("source")), name(row.get("id"))
    return Record(
        messages=[
            turn("user", row["question"], "question"),
            turn("assistant", one_of(row, RESPONSES), next(column for column in RESPONSES if column in row)),
        ],
        images=images(row.get("image")),
        id=number if source is None or number is None else f"{source}/{number}",
        facts=found,
    )
