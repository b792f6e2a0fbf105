"""Many prompts from a JSONL file to a JSONL file, resumable: ``nemo-bard generate --batch IN --output OUT``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.data.conversation import media_of, parse_record
from nemo_bard.data.json_text import load_json

logger = logging.getLogger(__name__)

_KEYS = ("id", "prompt", "system", "messages", "images", "videos")


@dataclass(frozen=True, kw_only=True)
class PromptLine:
    """One line of a prompt file; media are still closed."""

    line: int
    """Line number, from 1."""
    id: str | int
    """The line's ``id``, or its number."""
    conversation: list[dict[str, Any]]
    key: str
    """Digest of the line and of the run's settings: a finished line is reused only if it is the same."""


def make_conversation(
    prompt: str, *, images: list[str], videos: list[str], system: str | None = None, root_dir: Path = Path()
) -> list[dict[str, Any]]:
    """Build the turns of one prompt; media are still closed.

    Args:
        prompt: The user's text. ``<image>`` and ``<video>`` in it stand for the next file; without any, all images and
            then all videos come before the text.
        images: Image files.
        videos: Video files.
        system: Text of a system turn.
        root_dir: Folder that relative paths start from.

    Returns:
        A system turn, if there is one, and the user's.

    Raises:
        ValueError: If placeholders and files do not match, the prompt is empty or holds chat markup.
    """
    if not (prompt.strip() or images or videos):
        raise ValueError("the prompt is empty")
    if "<image>" not in prompt and "<video>" not in prompt:
        prompt = "<image>" * len(images) + "<video>" * len(videos) + prompt
    messages = [{"role": "system", "content": system}] if system is not None else []
    messages.append({"role": "user", "content": prompt})
    return parse_prompt({"messages": messages, "images": images, "videos": videos}, root_dir)


def parse_prompt(record: Any, root_dir: Path) -> list[dict[str, Any]]:
    """Turn one JSON object into the turns to answer.

    Args:
        record: ``{"prompt": text, "system": text, "images": [...], "videos": [...]}``, or ``messages`` as
            ``nemo_bard.data.parse_record`` says, where a last assistant turn (a reference) is left out; with an optional
            ``id``.
        root_dir: Folder that relative paths start from.

    Returns:
        The turns up to and including the user's, media as ``MediaSource``.

    Raises:
        ValueError: If the structure is wrong.
    """
    if not isinstance(record, dict):
        raise ValueError(f"a line must be a JSON object, got {type(record).__name__}")
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(f"a line needs either 'prompt' or 'messages'; known keys are {', '.join(_KEYS)}")
    if "prompt" in record:
        for name in ("prompt", "system"):
            if name in record and not isinstance(record[name], str):
                raise ValueError(f"'{name}' must be a text, got {record[name]!r}")
        pools = {name: record.get(name) or [] for name in ("images", "videos")}
        for name, pool in pools.items():
            if not isinstance(pool, list):
                raise ValueError(f"'{name}' must be a list, got {pool!r}")
        return make_conversation(record["prompt"], system=record.get("system"), root_dir=root_dir, **pools)
    conversation, _ = parse_record(record, root_dir, needs_answer=False)
    if conversation[-1]["role"] == "assistant":
        conversation = conversation[:-1]
    if not conversation or conversation[-1]["role"] != "user":
        raise ValueError("the turn to answer must be a user's")
    return conversation


def read_prompts(path: Path, run_key: str, *, root_dir: Path | None = None) -> list[PromptLine]:
    """Read and check a prompt file: every line and every image header.

    Args:
        path: JSONL file, see ``parse_prompt``; blank lines at its end are no lines.
        run_key: What the answers depend on beside the line: model and settings.
        root_dir: Folder that relative paths start from; the file's folder if None.

    Returns:
        The lines in order.

    Raises:
        ValueError: Names ``file:line`` of what is wrong: no JSON, wrong structure, missing media, an ``id`` given twice.
    """
    if not path.is_file():
        raise ValueError(f"prompt file {path} does not exist")
    raw_lines = path.read_bytes().rstrip().split(b"\n")
    if raw_lines == [b""]:
        raise ValueError(f"prompt file {path} holds no line")
    lines: list[PromptLine] = []
    seen: dict[str | int, int] = {}
    for number, raw in enumerate(raw_lines, start=1):
        try:
            record: Any = load_json(raw)
            conversation = parse_prompt(record, root_dir if root_dir is not None else path.parent)
            for media in media_of(conversation):
                media.check()
            own_id = record.get("id", number)
            if isinstance(own_id, bool) or not isinstance(own_id, (str, int)):
                raise ValueError(f"'id' must be a text or an integer, got {own_id!r}")
            if own_id in seen:
                raise ValueError(f"id {own_id!r} is also that of line {seen[own_id]}")
        except ValueError as error:
            raise ValueError(f"{path}:{number}: {error}") from error
        seen[own_id] = number
        digest = hashlib.sha256(run_key.encode() + b"\0" + raw.strip()).hexdigest()[:16]
        lines.append(PromptLine(line=number, id=own_id, conversation=conversation, key=digest))
    return lines


def finished_lines(output: Path, prompts: list[PromptLine]) -> tuple[int, int]:
    """Find how far an earlier run came.

    Answers are written in the order of the prompts, so that a cut run leaves a prefix; only its last line can be half
    written.

    Args:
        output: File of the earlier run; need not exist.
        prompts: The prompts.

    Returns:
        Number of finished lines, and their length in bytes; what follows is to be cut off.

    Raises:
        ValueError: If the file is not the output of these prompts with these settings.
    """
    if not output.exists():
        return 0, 0
    hint = "give another --output, or --overwrite to replace it"
    content = output.read_bytes()
    whole = content.splitlines(keepends=True)
    size = 0
    for index, raw in enumerate(whole):
        where = f"{output}:{index + 1}"
        record = _written_record(raw)
        if record is None and index + 1 == len(whole) and not raw.endswith(b"\n"):
            logger.warning("%s was cut while it was written; it is done again", where)
            return index, size
        if record is None or not {"id", "text", "key"} <= record.keys():
            raise ValueError(f"{where} is no line that this command wrote; {hint}")
        if index >= len(prompts):
            raise ValueError(f"{output} holds more lines than there are prompts ({len(prompts)}); {hint}")
        if record["key"] != prompts[index].key:
            raise ValueError(f"{where} (id {record['id']!r}) was made from another prompt, model or setting; {hint}")
        size += len(raw)
    return len(whole), size


def _written_record(raw: bytes) -> dict[str, Any] | None:
    """The answer in a line that ends, None where there is none."""
    record = None
    with contextlib.suppress(ValueError):
        record = json.loads(raw)
    return record if raw.endswith(b"\n") and isinstance(record, dict) else None


def append_lines(output: Path, records: list[dict[str, Any]]) -> None:
    """Append answers in one write."""
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    with output.open("ab") as file:
        file.write(text.encode("utf-8"))
