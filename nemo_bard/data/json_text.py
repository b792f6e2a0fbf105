"""One JSON text of a file of many: what is not as it must be is said in one line."""

from __future__ import annotations

import json
from typing import Any

from nemo_bard.base.errors import one_line, short


def load_json(line: bytes) -> object:
    """Read one line.

    Raises:
        ValueError: If it is empty, not UTF-8 or not JSON, or a key is given twice.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) != len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} is given twice")
        return record

    try:
        text = line.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise ValueError(f"the line is not UTF-8 ({one_line(error)})") from error
    if not text:
        raise ValueError("the line is empty, a JSON object is needed")
    try:
        return json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise ValueError(f"the line is not JSON ({error.msg} at column {error.colno}): {short(text)}") from error
