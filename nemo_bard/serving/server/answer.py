"""What goes to the client: OpenAI's objects, and our own events of the denoising."""

from __future__ import annotations

import json
import math
import time
import uuid
from typing import Any

from nemo_bard.generation.decode import StepRecord
from nemo_bard.generation.resolve import DecodeSettings
from nemo_bard.serving.server.worker import JobResult

DONE = b"data: [DONE]\n\n"
EXTENSION = "bard"
"""Key of what plain clients do not know, in chunks without choices."""


def sse(value: dict[str, Any]) -> bytes:
    """An event of a stream."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


class AnswerForm:
    """Objects of one answer.

    Args:
        model: Name of the model.
    """

    def __init__(self, model: str) -> None:
        self.id, self.created, self.model = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), model

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **more,
        }

    def whole(self, text: str, finish: str, usage: dict[str, Any]) -> dict[str, Any]:
        """An answer that is not streamed."""
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion", [choice], usage=usage)

    def chunk(self, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
        """A piece of a streamed answer."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return self._object("chat.completion.chunk", [choice])

    def usage(self, usage: dict[str, Any]) -> dict[str, Any]:
        """The last piece, where it was asked for."""
        return self._object("chat.completion.chunk", [], usage=usage)

    def extension(self, value: dict[str, Any]) -> dict[str, Any]:
        """A piece of our own."""
        return self._object("chat.completion.chunk", [], **{EXTENSION: value})


def usage_of(prompt_tokens: int, response_tokens: int) -> dict[str, Any]:
    """OpenAI's counts: ``completion_tokens`` are those of the response, up to its end token or its stop string."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": response_tokens,
        "total_tokens": prompt_tokens + response_tokens,
    }


def step_of(record: StepRecord, before: list[bool], tokenizer: Any, settings: DecodeSettings) -> dict[str, Any]:
    """A denoising step as the page draws it.

    Args:
        record: The step, of one row.
        before: Which tokens of the block were visible before; changed to which are now.
        tokenizer: The model's.
        settings: Those of the call.

    Returns:
        ``block``, ``step``, ``end`` (place of the first end token in the block, null if it has none) and ``cells``, one per
        token: text, state (``draft``, ``fixed`` in this step, ``revised`` in this step, ``kept``) and the probability
        (null where the model was not asked).
    """
    assert record.draft is not None
    end = next((i for i, token in enumerate(record.ids[0].tolist()) if token in settings.end_ids), None)
    cells = []
    columns = zip(
        record.ids[0].tolist(),
        record.draft[0].tolist(),
        record.confidence[0].tolist(),
        record.fixed[0].tolist(),
        strict=True,
    )
    for place, (token, draft, confidence, fixed) in enumerate(columns):
        if fixed:
            state = "revised" if before[place] else "fixed"
            before[place] = True
        else:
            state = "kept" if before[place] else "draft"
        shown = draft if token == settings.mask_token_id else token
        text = tokenizer.decode([shown], skip_special_tokens=False)
        cells.append([text, state, round(confidence, 4) if math.isfinite(confidence) else None])
    return {"block": record.block, "step": record.step, "end": end, "cells": cells}


def numbers_of(result: JobResult) -> dict[str, Any]:
    """Numbers of a decoding, for the page."""
    answer, seconds = result.answer, sum(result.seconds.values())
    return {
        "tokens": answer.num_tokens,
        "forwards": result.forwards,
        "denoising_forwards": answer.denoising_forwards,
        "commit_forwards": answer.commit_forwards,
        "tokens_per_forward": round(answer.tpf, 4),
        "tokens_per_second": round(answer.num_tokens / seconds, 2),
        "seconds": {name: round(value, 4) for name, value in result.seconds.items()},
    }
