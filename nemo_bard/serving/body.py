"""The body of ``/v1/chat/completions``: the OpenAI keys that we have or lack, and decode settings among them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import Field, dataclass
from typing import Any

from nemo_bard.base.errors import one_line, short
from nemo_bard.base.settings import flag
from nemo_bard.serving.requests import (
    MAX_INTEGER,
    SEED,
    BadRequest,
    check_seed,
    check_xargs,
    request_settings,
    short_key,
    shown,
    unknown_setting,
)

MAX_CHOICES = 16
"""``n``."""
MAX_STOPS, LONGEST_STOP = 16, 1000


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the body of a request asks, messages left aside."""

    settings: dict[str, Any]
    """Decode settings that were given, temperature, top_p and top_k of the body among them."""
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None
    stop: tuple[str, ...] = ()
    stream: bool = False
    include_usage: bool = False
    """``stream_options.include_usage``."""


def _off(*values: Any) -> Callable[[Any], bool]:
    """Whether a value is None or one of those that ask for nothing."""
    return lambda value: value is None or any(type(value) in (type(one), int) and value == one for one in values)


NOT_SUPPORTED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "logprobs": (_off(False), "a block of tokens is denoised together and has no log-probabilities token by token"),
    "top_logprobs": (_off(0), "a block of tokens is denoised together and has no log-probabilities token by token"),
    "prompt_logprobs": (_off(), "prompts have no log-probabilities"),
    "response_format": (_off({"type": "text"}), 'answers cannot be constrained to a format; allowed: {"type": "text"}'),
    "structured_outputs": (_off(), "answers cannot be constrained to a format"),
    "tools": (_off([]), "the model calls no tools"),
    "tool_choice": (_off("none", "auto"), "the model calls no tools"),
    "functions": (_off([]), "the model calls no functions"),
    "function_call": (_off("none", "auto"), "the model calls no functions"),
    "logit_bias": (_off({}), "logits are not biased"),
    "frequency_penalty": (_off(0.0), "there are no penalties; allowed: 0"),
    "presence_penalty": (_off(0.0), "there are no penalties; allowed: 0"),
    "repetition_penalty": (_off(1.0), "there are no penalties; allowed: 1"),
    "min_p": (_off(0.0), "use top_p or top_k"),
    "min_tokens": (_off(0), "an answer ends where the model ends it"),
    "modalities": (_off(["text"]), "answers are text"),
    "audio": (_off(), "answers are text"),
    "prediction": (_off(), "nothing is predicted in advance"),
    "reasoning_effort": (_off(), "the model does not reason apart from its answer"),
    "web_search_options": (_off(), "nothing is searched"),
}
"""OpenAI's keys that we lack: the values that ask for nothing, and why everything else is refused."""
WITHOUT_EFFECT = (
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
)
"""OpenAI's keys that change no answer; any value is taken."""
OURS = (
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "n",
    SEED,
    "stop",
    "stream",
    "stream_options",
    "vllm_xargs",
)


def check_body(
    body: Any, *, block_size: int, defaults: Mapping[str, Any] | None = None, extensions: tuple[str, ...] = ()
) -> Asked:
    """Check the body of ``/v1/chat/completions``, its messages and its model left aside.

    Args:
        body: As JSON gives it. Decode settings may be top-level keys, as the ``openai`` client sends its ``extra_body``,
            or in ``vllm_xargs``.
        block_size: See ``check_xargs``.
        defaults: See ``check_xargs``.
        extensions: Further keys that the caller reads itself.

    Raises:
        BadRequest: For the first key or value that is not allowed.
    """
    if not isinstance(body, Mapping):
        raise BadRequest(f"the body must be a JSON object, got {short(body)}")
    known = request_settings(defaults)
    for key, value in body.items():
        if key in NOT_SUPPORTED:
            off, why = NOT_SUPPORTED[key]
            if not off(value):
                raise BadRequest(f"{key} is not supported, got {shown(value)}: {why}", key)
        elif key not in (*OURS, *WITHOUT_EFFECT, *extensions, *known):
            raise BadRequest(one_line(unknown_setting(key, key, [*known, *OURS, *extensions])), short_key(key))
    try:
        return _asked(body, known, block_size, defaults)
    except BadRequest:
        raise
    except ValueError as error:
        raise BadRequest(one_line(error), one_line(error).split(" ")[0]) from error


def _asked(
    body: Mapping[str, Any], known: Mapping[str, Field[Any]], block_size: int, defaults: Mapping[str, Any] | None
) -> Asked:
    top = {key: body[key] for key in known if body.get(key) is not None}
    extra = check_xargs(body.get("vllm_xargs"), block_size=block_size, defaults={**(defaults or {}), **_plain(top)})
    twice = [key for key in top if key in extra and extra[key] != top[key]]
    if twice:
        raise ValueError(
            f"{twice[0]} is given twice, {short(top[twice[0]])} and {short(extra[twice[0]])} in vllm_xargs"
        )
    seeds = {check_seed(seed) for seed in (extra.pop(SEED, None), body.get(SEED)) if seed is not None}
    if len(seeds) > 1:
        raise ValueError(f"seed is given twice, {body[SEED]}, and another one in vllm_xargs")
    settings = check_xargs({**top, **extra}, block_size=block_size, defaults=defaults, section="")
    n = _integer(body, "n", MAX_CHOICES) or 1
    if n > 1 and {"temperature": 0.0, **(defaults or {}), **settings}["temperature"] == 0:
        raise ValueError(f"n must be 1 with temperature 0, where all answers are the same, got {n}")
    limits = [_integer(body, name, MAX_INTEGER) for name in ("max_completion_tokens", "max_tokens")]
    options = body.get("stream_options") or {}
    if not isinstance(options, Mapping) or set(options) - {"include_usage", "continuous_usage_stats"}:
        raise ValueError(f"stream_options must be an object with include_usage, got {short(options)}")
    return Asked(
        settings=settings,
        seed=next(iter(seeds), None),
        n=n,
        max_tokens=next((limit for limit in limits if limit is not None), None),
        stop=_stop(body.get("stop")),
        stream=_flag(body, "stream"),
        include_usage=_flag(options, "include_usage", "stream_options."),
    )


def _plain(top: Mapping[str, Any]) -> dict[str, Any]:
    """Of the top-level keys those that another may need: ``max_post_edit_steps`` in ``vllm_xargs`` needs ``edit_threshold``."""
    value = top.get("edit_threshold")
    return {"edit_threshold": value} if isinstance(value, float) and 0 < value <= 1 else {}


def _integer(body: Mapping[str, Any], name: str, most: int) -> int | None:
    value = body.get(name)
    if value is not None and (type(value) is not int or not 1 <= value <= most):
        raise ValueError(f"{name} must be an integer from 1 to {most}, got {shown(value)}")
    return value


def _flag(values: Mapping[str, Any], name: str, section: str = "") -> bool:
    value = values.get(name)
    if value is None:
        return False
    if not isinstance(value, bool):
        raise ValueError(f"{section}{name} must be {flag().allowed}, got {short(value)}")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    texts = [] if value is None else [value] if isinstance(value, str) else value
    good = (
        isinstance(texts, list)
        and len(texts) <= MAX_STOPS
        and all(isinstance(one, str) and 0 < len(one) <= LONGEST_STOP for one in texts)
    )
    if not good:
        raise ValueError(
            f"stop must be a text or up to {MAX_STOPS}, of 1 to {LONGEST_STOP} characters each, got {short(value)}"
        )
    return tuple(texts)
