"""What a request may ask of decoding, in ``vllm_xargs`` or ``extra_body``.

Names and checks of settings come from ``nemo_bard.generation.parameters``; added are bounds that keep a request from
harming a server that others use. Nothing here imports torch, transformers or vLLM.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field
from typing import Any

from nemo_bard.base.errors import nearest, not_one_of, one_line, short
from nemo_bard.base.settings import Check
from nemo_bard.generation.parameters import STRATEGIES, GenerationSettings, build_settings, setting_fields

MAX_TEMPERATURE = 2.0
"""As OpenAI's interface has it."""
LEAST_TEMPERATURE = 1e-6
"""Smaller ones divide logits beyond float32; 0 is argmax."""
MAX_NUMBER = 1e6
MAX_INTEGER = 2**31 - 1
MAX_REVISIONS = 64
"""``max_post_edit_steps``: two tokens that take turns would go on for as long as a request says."""
LONGEST_TEXT = 100
"""Characters of a key or a value that are looked at."""

ELSEWHERE = {
    "max_new_tokens": "use max_tokens (or max_completion_tokens)",
    "eos_token_id": "use stop",
    "adapter": "name a model of /v1/models; of the local server an adapter is one, such as NAME:b32",
}
"""Settings of ``generate`` that a request has another key for."""
REFUSED = (
    "mask_token_id",
    "pad_token_id",
    "bos_token_id",
    "decode_path",
    "cache_implementation",
    "compile_step",
    "return_dict_in_generate",
    "return_step_stats",
    "output_history",
)
"""Settings of ``generate`` that belong to the server."""
SEED = "seed"


class BadRequest(ValueError):
    """What a client asked is not allowed: one line, and the key that it is about."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


def error_body(
    error: Exception, *, kind: str = "invalid_request_error", code: int | str | None = 400
) -> dict[str, Any]:
    """The body of an error as OpenAI's interface has it.

    Args:
        error: Its text becomes the message, its ``param`` the key.
        kind: ``type`` of the error.
        code: ``code`` of the error.
    """
    return {
        "error": {"message": one_line(error), "type": kind, "param": getattr(error, "param", None), "code": code},
    }


def request_settings(defaults: Mapping[str, Any] | None = None) -> dict[str, Field[Any]]:
    """The settings that a request may give, by name.

    Args:
        defaults: Of the server, by name; a strategy with a dotted name among them brings its parameters.
    """
    strategy = (defaults or {}).get("remasking_strategy")
    return {
        name: field for name, field in setting_fields(strategy).items() if name not in REFUSED and name not in ELSEWHERE
    }


def check_xargs(
    given: Mapping[str, Any] | None,
    *,
    block_size: int,
    defaults: Mapping[str, Any] | None = None,
    section: str = "vllm_xargs",
) -> dict[str, Any]:
    """Check the decode settings of a request.

    Args:
        given: Settings by name as JSON gives them; ``seed`` may be among them. vLLM makes 0 and 1 of false and true, so
            that these are taken for flags.
        block_size: Tokens of a block of the served model; a request may repeat it.
        defaults: Of the server, by name, such as ``vars`` of a ``BardGenerationConfig``; what is not there has the
            defaults of ``GenerationSettings`` and of the strategies.
        section: Where the settings were given, for the messages; may be empty.

    Returns:
        What was given, and nothing else, with flags as bool: over ``defaults`` it is valid for ``build_settings`` (without
        ``seed``) and ``BardGenerationConfig.updated``.

    Raises:
        BadRequest: For the first key or value that is not allowed; a ValueError of one line.
    """
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BadRequest(f"{section or 'settings'} must be an object of settings, got {short(given)}", section or None)
    known = request_settings(defaults)
    checked = {}
    for key, value in given.items():
        name = f"{section}.{key}" if section else str(key)
        try:
            checked[key] = _value(key, name, value, known, block_size, defaults or {})
        except BadRequest:
            raise
        except ValueError as error:
            raise BadRequest(one_line(error), short_key(name)) from error
    merged = {**(defaults or {}), **checked}
    try:
        build_settings(
            {name: value for name, value in merged.items() if name in setting_fields(merged.get("remasking_strategy"))}
        )
    except ValueError as error:
        raise BadRequest(one_line(error), section or None) from error
    return checked


def short_key(name: object) -> str:
    """A key as messages show it."""
    return str(name) if len(str(name)) <= LONGEST_TEXT else f"{str(name)[:LONGEST_TEXT]}..."


def _value(
    key: Any, name: str, value: Any, known: Mapping[str, Field[Any]], block_size: int, defaults: Mapping[str, Any]
) -> Any:
    """Check one setting; the value as settings want it."""
    if key == SEED:
        return check_seed(value, name)
    if key not in known:
        raise unknown_setting(key, name, [*known, SEED])
    check: Check = known[key].metadata["check"]
    allowed = f"one of {', '.join(check.choices())}" if check.choices else check.allowed
    if value is None:
        raise ValueError(f"{name} must be {allowed}, got null; leave it out for the server's default")
    if not isinstance(value, (str, int, float)) or not _fits(value):
        raise ValueError(f"{name} must be {allowed}, got {shown(value)}")
    if check.parse is bool and type(value) is int and value in (0, 1):
        value = bool(value)
    if key == "remasking_strategy":  # no dotted name but the server's own: it would import what a client names
        names: list[str] = list(
            dict.fromkeys([*STRATEGIES, defaults.get(key) or GenerationSettings.remasking_strategy])
        )
        if value not in names:
            raise not_one_of(name, value, names)
    check(name, value)
    _bounds(key, name, value, block_size)
    return value


def _fits(value: str | float) -> bool:
    """Whether a text or a number is small enough to be looked at; an integer of 65 bits is not."""
    if isinstance(value, str):
        return len(value) <= LONGEST_TEXT
    return isinstance(value, float) or -(2**63) <= value < 2**63


def shown(value: Any) -> str:
    """A value as messages show it; Python writes out no integer of more than 4300 digits."""
    is_long = isinstance(value, int) and not -(2**63) <= value < 2**63
    return f"an integer of {value.bit_length()} bits" if is_long else short(value)


def unknown_setting(key: Any, name: str, known: Iterable[str]) -> ValueError:
    """The error for a key that a request cannot have.

    Args:
        key: The key itself.
        name: The key as it is shown, with its section.
        known: What is allowed.
    """
    if key in ELSEWHERE:
        return ValueError(f"{name} is not for requests; {ELSEWHERE[key]}")
    allowed = f"allowed: {', '.join(known)}"
    if key in REFUSED:
        return ValueError(f"{name} is the server's, not a request's; {allowed}")
    near = nearest(key, known) if len(str(key)) <= LONGEST_TEXT else None
    return ValueError(f"unknown setting {short_key(name)}; {f'did you mean {near}?' if near else allowed}")


def _bounds(key: str, name: str, value: Any, block_size: int) -> None:
    """What a request may not exceed, beyond what the check of the setting says."""
    if key == "block_size" and value != block_size:
        raise ValueError(f"{name} must be {block_size}, which the server runs with, got {value}")
    if key == "temperature":
        check_temperature(value, name)
    most: float = (
        MAX_REVISIONS if key == "max_post_edit_steps" else MAX_INTEGER if isinstance(value, int) else MAX_NUMBER
    )
    if not isinstance(value, str) and value > most:
        raise ValueError(f"{name} must be at most {most:.10g}, got {short(value)}")


def check_temperature(value: Any, name: str = "temperature") -> float:
    """Return a temperature of a request.

    Raises:
        ValueError: Unless it is 0, or from ``LEAST_TEMPERATURE`` to ``MAX_TEMPERATURE``.
    """
    is_number = not isinstance(value, bool) and isinstance(value, (int, float))
    if not is_number or not (value == 0 or LEAST_TEMPERATURE <= value <= MAX_TEMPERATURE):
        raise ValueError(f"{name} must be 0, or from {LEAST_TEMPERATURE:g} to {MAX_TEMPERATURE:g}, got {shown(value)}")
    return float(value)


def check_seed(value: Any, name: str = SEED) -> int:
    """Return a seed of a request.

    Raises:
        ValueError: Unless it is an integer of 64 bits.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not -(2**63) <= value < 2**63:
        raise ValueError(f"{name} must be an integer of 64 bits, got {shown(value)}")
    return value
