"""What lmms-eval hands over as words: ``--model_args``, and the generation settings of a task."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nemo_bard.base.errors import unknown_name
from nemo_bard.base.settings import Check, check_settings, choice, integer, number, setting, text
from nemo_bard.checkpoints.folder import DTYPES
from nemo_bard.evaluation.likelihood import METHODS
from nemo_bard.generation.parameters import setting_fields


@dataclass(frozen=True, kw_only=True)
class HarnessSettings:
    """Keys of ``--model_args`` beside the decoding settings.

    Raises:
        ValueError: For a value that is not allowed; names it and what is.
    """

    pretrained: str = setting(check=text(), help="checkpoint folder")
    batch_size: int = setting(1, integer(), "requests decoded together")
    device: str | None = setting(None, text(optional=True), "cpu, cuda or cuda:N; null is CUDA where there is one")
    dtype: str = setting("auto", choice(DTYPES), "auto is bfloat16 on CUDA and float32 elsewhere")
    system_prompt: str | None = setting(None, text(optional=True), "text of a system turn, in place of a task's own")
    min_pixels: int | None = setting(None, integer(optional=True), "smaller images are enlarged; null is as trained")
    max_pixels: int | None = setting(None, integer(optional=True), "larger images are shrunk; null is as trained")
    fps: float | None = setting(None, number(optional=True), "frames of a video per second; null is as trained")
    max_frames: int | None = setting(None, integer(optional=True), "most frames of a video; null is as trained")
    loglikelihood: str = setting(
        "auto", choice(METHODS), "how likelihoods are found; auto is exact for a causal context, else estimated"
    )
    likelihood_draws: int = setting(128, integer(), "most masks of a block for estimated likelihoods")
    likelihood_seed: int = setting(0, integer(0), "decides these masks")

    def __post_init__(self) -> None:
        check_settings(self)
        if self.fps == 0:
            raise ValueError("fps must be a finite number > 0 or null, got 0")
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels {self.min_pixels} must be at most max_pixels, {self.max_pixels}")


def read_model_args(values: Mapping[str, Any]) -> tuple[HarnessSettings, dict[str, Any]]:
    """Split ``--model_args``, as lmms-eval has read them, into the adapter's settings and those of decoding.

    Args:
        values: Words, numbers and truth values; the words ``none`` and ``null`` are None.

    Returns:
        The adapter's settings, and decoding settings by name, whose values are checked where they are used.

    Raises:
        ValueError: For an unknown key (the nearest is named) or a value that is not allowed.
    """
    own = {field.name: field for field in dataclasses.fields(HarnessSettings)}
    decoding = {
        name: field
        for name, field in setting_fields(values.get("remasking_strategy")).items()
        if field.metadata["flag"]
    }
    known = own | decoding
    read: dict[str, Any] = {}
    for name, value in values.items():
        if name not in known:
            raise unknown_name("model argument", name, known)
        read[name] = read_value(name, value, known[name].metadata["check"])
    if "pretrained" not in read:
        raise ValueError("pretrained must be given: --model_args pretrained=DIR")
    settings = HarnessSettings(**{name: value for name, value in read.items() if name in own})
    return settings, {name: value for name, value in read.items() if name not in own}


def read_value(name: str, value: Any, check: Check) -> Any:
    """A value as its setting has it: lmms-eval reads ``-1`` as ``-1.0`` and leaves ``[7,8]`` a word.

    Raises:
        ValueError: For a word where the setting takes none.
    """
    if isinstance(value, str) and value.lower() in ("none", "null"):
        return None
    if isinstance(value, str) and check.parse not in (str, bool):
        try:
            return check.parse(value.strip("[]"))
        except ValueError as error:
            raise ValueError(f"{name} must be {check.allowed}, got {value!r}") from error
    if isinstance(value, float) and value.is_integer() and not check.test(value):
        return int(value)
    if check.parse is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


@dataclass(frozen=True, kw_only=True)
class RequestSettings:
    """What a task's ``generation_kwargs`` mean here."""

    decoding: dict[str, Any]
    """Decoding settings by name, over those of the model."""
    until: tuple[str, ...]
    """An answer ends before the first of these."""
    unused: tuple[str, ...]
    """What has no meaning here, as ``key=value``."""


def read_generation_kwargs(values: Mapping[str, Any], strategy: str | None = None) -> RequestSettings:
    """Read the ``generation_kwargs`` of a task, ``--gen_kwargs`` included.

    ``do_sample: false`` is temperature 0, as in transformers, and with temperature 0 ``top_k`` and ``top_p`` mean nothing.
    What is None is as the model has it.

    Args:
        values: By name.
        strategy: The remasking strategy in use, which may be a dotted name.

    Raises:
        ValueError: For ``until`` of another form, or a word where a number must be.
    """
    known = setting_fields(values.get("remasking_strategy", strategy))
    decoding, unused = {}, []
    for name, value in values.items():
        if name in ("until", "do_sample") or value is None:
            continue
        if name in known and known[name].metadata["flag"]:
            decoding[name] = read_value(name, value, known[name].metadata["check"])
        elif not (name == "num_beams" and value == 1):
            unused.append(f"{name}={value!r}")
    sample = values.get("do_sample")
    if sample is False:
        if decoding.get("temperature"):
            unused.append(f"temperature={decoding['temperature']!r} (do_sample is false)")
        decoding["temperature"] = 0.0
    elif sample is True:
        decoding.setdefault("temperature", 1.0)
    if decoding.get("temperature") == 0:
        decoding.pop("top_k", None)
        decoding.pop("top_p", None)
    return RequestSettings(decoding=decoding, until=_read_until(values.get("until")), unused=tuple(unused))


def _read_until(until: Any) -> tuple[str, ...]:
    found = [until] if isinstance(until, str) else until or []
    if not isinstance(found, (list, tuple)) or not all(isinstance(one, str) for one in found):
        raise ValueError(f"until must be a text or a list of them, got {until!r}")
    return tuple(one for one in found if one)


def cut(answer: str, until: tuple[str, ...]) -> str:
    """The answer up to the first of ``until``."""
    return answer[: min((place for one in until if (place := answer.find(one)) >= 0), default=len(answer))]


def number_of_processes() -> int:
    """Processes that share the requests, as ``accelerate launch`` and ``torchrun`` tell."""
    return int(os.environ.get("WORLD_SIZE", "1"))
