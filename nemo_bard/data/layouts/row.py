"""What layouts are made of: the columns that they want, turns, images and facts of a row."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from nemo_bard.base.errors import one_line, short
from nemo_bard.data.sample import ImageEntry, RejectedError

F = TypeVar("F", bound=Callable[..., Any])

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
"""Who speaks a turn, as published sets call it -> role."""
_SCALARS = (str, int, float, bool)


def layout(*wants: str | tuple[str, ...], tells: Callable[[Mapping[str, Any]], bool] | None = None) -> Callable[[F], F]:
    """Say which columns a layout wants.

    Args:
        wants: Names of columns; of a tuple one is enough.
        tells: Whether a row that has them is of this layout, where others want the same columns.

    Returns:
        A decorator that sets ``wants``, and ``tells`` if given, on the function.
    """

    def mark(function: F) -> F:
        vars(function)["wants"] = tuple((want,) if isinstance(want, str) else want for want in wants)
        if tells is not None:
            vars(function)["tells"] = tells
        return function

    return mark


def turn(speaker: object, text: object, where: str) -> dict[str, Any]:
    """A turn of a conversation.

    Args:
        speaker: One of ``SPEAKERS``.
        text: A text, or a list of typed parts.
        where: Its place in the row, for errors.

    Raises:
        RejectedError: For another speaker, or if there is no text.
    """
    role = SPEAKERS.get(speaker) if isinstance(speaker, str) else None
    if role is None:
        raise RejectedError(
            "unknown_role", f"{where}: the speaker must be one of {', '.join(SPEAKERS)}, got {short(speaker)}"
        )
    if text is None:
        raise RejectedError("missing_text", f"{where}: the turn of the {role} has no text")
    if isinstance(text, Sequence) and not isinstance(text, (str, bytes)):
        return {"role": role, "content": [_part(part) for part in text]}
    if not isinstance(text, str):
        raise RejectedError("messages", f"{where}: the text of a turn must be a text, got {short(text)}")
    return {"role": role, "content": text}


def turns(entries: object, column: str) -> list[dict[str, Any]]:
    """The turns of a column of ``{from, value}`` or ``{role, content}``, or of all four keys with nulls.

    Raises:
        RejectedError: If it is no list of such turns.
    """
    found = []
    for number, entry in enumerate(listed(entries, column)):
        where = f"{column}[{number}]"
        if not isinstance(entry, Mapping):
            raise RejectedError("messages", f"{where} must be an object with a speaker and a text, got {short(entry)}")
        speaker = one_of(entry, ("from", "role"))
        found.append(turn(speaker, one_of(entry, ("value", "content")), where))
    return found


def listed(entries: object, column: str) -> Sequence[Any]:
    """The entries of a column: a list, its JSON as a text, or an object of lists as ``datasets`` stores a ``Sequence``.

    Raises:
        RejectedError: If it is none of these, or empty.
    """
    found = entries
    if isinstance(found, str) and found.lstrip().startswith("["):
        try:
            found = json.loads(found)
        except (ValueError, RecursionError) as error:
            raise RejectedError("bad_json", f"{column!r} is a text and no JSON ({one_line(error)})") from error
    elif isinstance(found, Mapping):
        columns = {key: values for key, values in found.items() if isinstance(values, list)}
        sizes = {len(values) for values in columns.values()}
        if len(columns) == len(found) and len(sizes) == 1:
            found = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    if not isinstance(found, Sequence) or isinstance(found, (str, bytes)) or not found:
        raise RejectedError("messages", f"{column!r} must be a list of turns that is not empty, got {short(entries)}")
    return found


def one_of(row: Mapping[str, Any], names: Iterable[str]) -> Any:
    """The first value that is there and not null; None if there is none."""
    return next((row[name] for name in names if row.get(name) is not None), None)


def images(value: object) -> list[ImageEntry]:
    """The images of a column that holds none (null), one, or a list; an entry of a list may be null."""
    if value is None:
        return []
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        return [_image(entry) for entry in value]
    return [_image(value)]


def _image(entry: object) -> ImageEntry:
    if entry is None or isinstance(entry, (bytes, str, Mapping)):
        return entry
    raise RejectedError("layout", f"an image must be bytes, a path or an object with bytes or path, got {short(entry)}")


def videos(value: object) -> list[str]:
    """The videos of a column that holds none (null), a path, or a list of paths.

    Raises:
        RejectedError: For anything else.
    """
    entries: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
    for entry in entries:
        if not isinstance(entry, str):
            raise RejectedError("layout", f"a video must be a path, got {short(entry)}")
    return entries


def facts(row: Mapping[str, Any], besides: Iterable[str]) -> dict[str, Any]:
    """The columns that rows may be filtered by: numbers, texts, and lists of such, but those named ``besides``."""
    left_out = set(besides)
    return {name: value for name, value in row.items() if name not in left_out and _is_fact(value)}


def _is_fact(value: object) -> bool:
    if isinstance(value, list):
        return all(entry is None or isinstance(entry, _SCALARS) for entry in value)
    return value is None or isinstance(value, _SCALARS)


def name(value: object) -> str | None:
    """What a set calls a row, as a text that can be written anywhere; None if it does not."""
    return None if value is None or value == "" else str(value).encode("utf-8", "replace").decode()


def _part(part: object) -> Any:
    """A typed part; tables fill the keys that other parts have with nulls."""
    return {key: value for key, value in part.items() if value is not None} if isinstance(part, Mapping) else part
