"""What decoding can be told: the general settings, and the parameters of the remasking strategies.

The fields of ``GenerationSettings`` and of the strategies are the only home of names, defaults, checks and help. From them
follow ``BardGenerationConfig``, the arguments of ``generate``, the flags of the command line, calibration and the reference.
Nothing here imports torch or transformers.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass
from typing import Any

from nemo_bard.base.registry import Registry
from nemo_bard.base.settings import (
    Check,
    check_settings,
    choice,
    flag,
    fraction,
    integer,
    number,
    reference,
    setting,
    text,
)
from nemo_bard.generation.strategies import (
    Autoregressive,
    EntropyBound,
    LowConfidenceDynamic,
    LowConfidenceStatic,
    SelfSpeculative,
    Strategy,
)

CACHE_IMPLEMENTATIONS = ("dynamic", "static")
NO_END = -1
"""As ``eos_token_id``: nothing ends a response but ``max_new_tokens``."""
NEXT_TOKEN_ENGINES = {
    "fast": "nemo_bard.generation.causal.CausalEngine",
    "graph": "nemo_bard.generation.causal.CausalEngine",
    "plain": "nemo_bard.generation.causal.PlainCausalEngine",
}
"""Engines of strategies that decode by the next-token distribution, by ``decode_path``."""
ENGINE_METHODS = ("first", "step", "advance", "select")


def check_strategy(name: str, thing: Any) -> None:
    """Raise ValueError unless ``thing`` is a strategy whose parameters agree with all other settings."""
    key = STRATEGIES.key
    if not (isinstance(thing, type) and issubclass(thing, Strategy)) or inspect.isabstract(thing):
        raise ValueError(f"{key}: {name} must be a class derived from nemo_bard.generation.Strategy, with fix")
    for field in dataclasses.fields(thing):
        if field.metadata.get("check") is None or field.default is dataclasses.MISSING:
            raise ValueError(f"{key}: {name}.{field.name} must be made with setting(), with a default and a check")
        if field.name in GENERAL:
            raise ValueError(
                f"{key}: the parameter {field.name} of {name} has the name of a general setting; rename it"
            )
        for other in STRATEGIES:
            for theirs in dataclasses.fields(STRATEGIES.get(other)) if other != name else ():
                if theirs.name == field.name and _declared(theirs) != _declared(field):
                    raise ValueError(
                        f"{key}: {name} and {other} declare the parameter {field.name} differently; rename one"
                    )


def _declared(field: Field[Any]) -> tuple[Any, ...]:
    check = field.metadata["check"]
    return field.default, check.allowed, check.metavar, check.optional, field.metadata["help"]


def check_engine(name: str, thing: Any) -> None:
    """Raise ValueError unless ``thing`` is a class with what ``nemo_bard.generation.engines.Engine`` asks for."""
    missing = [part for part in (*ENGINE_METHODS, "separate_commits") if not hasattr(thing, part)]
    if not isinstance(thing, type) or missing:
        lacks = f"; it lacks {', '.join(missing)}" if missing else ""
        raise ValueError(f"{ENGINES.key}: {name} must be a class as nemo_bard.generation.engines.Engine{lacks}")


STRATEGIES: Registry[type[Strategy]] = Registry(
    "remasking_strategy",
    "nemo_bard.strategies",
    {
        "low_confidence_static": LowConfidenceStatic,
        "low_confidence_dynamic": LowConfidenceDynamic,
        "entropy_bound": EntropyBound,
        "autoregressive": Autoregressive,
        "self_speculative": SelfSpeculative,
    },
    check=check_strategy,
)
"""Strategies by name; installed packages declare theirs as entry points of ``nemo_bard.strategies``."""
ENGINES: Registry[type] = Registry(
    "decode_path",
    "nemo_bard.engines",
    {
        "fast": "nemo_bard.generation.engines.FastEngine",
        "graph": "nemo_bard.generation.graph.GraphEngine",
        "plain": "nemo_bard.generation.engines.PlainEngine",
    },
    check=check_engine,
)
"""Engines by name; installed packages declare theirs as entry points of ``nemo_bard.engines``."""


def token_ids(text: str) -> int | list[int]:
    """Read ``7`` or ``7,8``."""
    ids = [int(word) for word in text.split(",")]
    return ids[0] if len(ids) == 1 else ids


def _or_none(check: Check) -> Check:
    """Null means "not given" here, which messages about wrong values leave out."""
    return dataclasses.replace(check, test=lambda value: value is None or check.test(value))


def _is_token_id(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, int) and value >= 0


def _ends(value: Any) -> bool:
    several = isinstance(value, (list, tuple)) and all(_is_token_id(one) for one in value)
    return several or _is_token_id(value) or (type(value) is int and value == NO_END)


_token_id = _or_none(Check("a token id >= 0", _is_token_id, int, "N"))
_end_ids = _or_none(Check("a token id >= 0", _ends, token_ids, "IDS"))


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """The settings that are not a strategy's own.

    Raises:
        ValueError: For a value that is not allowed; names it and what is.
    """

    max_new_tokens: int = setting(1024, integer(1), "most response tokens; exact, not rounded up to whole blocks")
    block_size: int | None = setting(None, _or_none(integer(1)), "tokens denoised together; null takes the model's")
    denoising_steps: int | None = setting(
        None, _or_none(integer(1)), "most denoising forwards per block; null is the block size, which more means too"
    )
    remasking_strategy: str = setting(
        "low_confidence_dynamic", choice(lambda: STRATEGIES, dotted=True), "how a step picks the tokens to fix"
    )
    adapter: str | None = setting(
        None,
        text(optional=True),
        "LoRA adapter of the model's folder, such as b32, with its own settings where none are given; null is none",
    )
    edit_threshold: float | None = setting(
        None, _or_none(fraction()), "replace a visible token of the current block above this probability, in (0, 1]"
    )
    max_post_edit_steps: int = setting(
        0, integer(0), "revision steps after the last mask of a block is gone; they end when nothing changes"
    )
    temperature: float = setting(0.0, number(), "0 is argmax, else the divisor of the logits that are drawn from")
    top_k: int = setting(0, integer(0), "draw from the K most likely tokens; 0 is all")
    top_p: float = setting(1.0, fraction(), "draw from the most likely tokens of this total probability, in (0, 1]")
    suppress_mask_token: bool = setting(True, flag(), "never emit the mask id")
    mask_token_id: int | None = setting(None, _token_id, "id of [MASK]; null takes the model's")
    eos_token_id: int | Sequence[int] | None = setting(
        None, _end_ids, "id that ends a response, or several joined by commas; null takes the model's, -1 is none"
    )
    pad_token_id: int | None = setting(None, _token_id, "id after the end of a response; null is the first end id")
    bos_token_id: int | None = setting(None, _token_id, "not used by block diffusion")
    decode_path: str = setting(
        "fast",
        choice(lambda: ENGINES, dotted=True),
        "engine: fast (with a static cache that is graph), graph, or plain, the slow path that serves as reference",
    )
    cache_implementation: str | None = setting(
        None,
        choice(CACHE_IMPLEMENTATIONS, optional=True),
        "dynamic has exact shapes, static fixed ones, as CUDA graphs need them; null is static on CUDA",
    )
    compile_step: bool | None = setting(
        None,
        flag(optional=True),
        "capture steps as CUDA graphs, with compiled kernels; needs the static cache; null is true on CUDA",
    )
    return_dict_in_generate: bool = setting(False, flag(), "return a BardGenerateOutput instead of ids", flag=False)
    return_step_stats: bool = setting(False, flag(), "return (ids, statistics)", flag=False)
    output_history: bool = setting(False, flag(), "keep ids and confidence of every step in the output", flag=False)

    def __post_init__(self) -> None:
        check_settings(self)
        if self.decode_path == "graph" and self.cache_implementation == "dynamic":
            raise ValueError("decode_path=graph needs cache_implementation=static or none, got 'dynamic'")
        if self.compile_step and self.cache_implementation != "static" and self.decode_path != "graph":
            raise ValueError('compile_step=True needs cache_implementation="static"')
        if self.max_post_edit_steps and self.edit_threshold is None:
            raise ValueError(f"max_post_edit_steps={self.max_post_edit_steps} needs edit_threshold in (0, 1]")


GENERAL: dict[str, Field[Any]] = {field.name: field for field in dataclasses.fields(GenerationSettings)}


def strategy_fields(name: str) -> dict[str, Field[Any]]:
    """Parameters of a strategy, by name."""
    return {field.name: field for field in dataclasses.fields(STRATEGIES.get(name))}


def calibrated_strategies() -> list[str]:
    """Strategies that calibration tries by itself, the default one first."""
    first = GenerationSettings.remasking_strategy
    return [first, *(name for name in STRATEGIES if name != first and STRATEGIES.get(name).calibrated)]


def denoising_strategies() -> list[str]:
    """Strategies that take denoising steps, those of other packages included."""
    return [name for name in STRATEGIES if not STRATEGIES.get(name).by_next_token]


def setting_fields(strategy: Any = None) -> dict[str, Field[Any]]:
    """Every setting by name: the general ones, and the parameters of all strategies behind ``remasking_strategy``.

    Args:
        strategy: The one in use, which may be a dotted name; names that are none are left to the check of the settings.
    """
    found: dict[str, Field[Any]] = {}
    for name, field in GENERAL.items():
        found[name] = field
        if name == "remasking_strategy":
            dotted = [strategy] if isinstance(strategy, str) and "." in strategy and strategy not in STRATEGIES else []
            for other in [*STRATEGIES, *dotted]:
                found |= strategy_fields(other)
    return found


def build_settings(values: Mapping[str, Any]) -> tuple[GenerationSettings, Strategy]:
    """Check all settings and build the objects that hold them.

    Args:
        values: Settings by name, as ``setting_fields`` has them; absent ones have their defaults.

    Returns:
        The general settings, and the strategy with its parameters.

    Raises:
        ValueError: For a value that is not allowed, those of strategies not in use included.
    """
    general = GenerationSettings(**{name: values[name] for name in GENERAL if name in values})
    for name, field in setting_fields(general.remasking_strategy).items():
        if name not in GENERAL and name in values:
            field.metadata["check"](name, values[name])
    own = strategy_fields(general.remasking_strategy)
    ENGINES.get(general.decode_path)
    strategy = STRATEGIES.get(general.remasking_strategy)
    if strategy.by_next_token:
        _check_next_token(general)
    return general, strategy(**{name: values[name] for name in own if name in values})


def _check_next_token(general: GenerationSettings) -> None:
    name = f"remasking_strategy={general.remasking_strategy}"
    if general.edit_threshold is not None:
        raise ValueError(f"edit_threshold={general.edit_threshold}: {name} never replaces a token; leave it out")
    if general.decode_path not in NEXT_TOKEN_ENGINES:
        raise ValueError(
            f"decode_path must be one of {', '.join(NEXT_TOKEN_ENGINES)} with {name}, got {general.decode_path!r}"
        )


def settings_reference() -> str:
    """Two Markdown tables: all settings, and the strategies with their parameters."""
    rows = ["| strategy | what a step fixes | parameters |", "| --- | --- | --- |"]
    for name in STRATEGIES:
        summary = " ".join((inspect.getdoc(STRATEGIES.get(name)) or "").split("\n\n")[0].split())
        parameters = ", ".join(f"`{parameter}`" for parameter in strategy_fields(name)) or "none"
        rows.append(f"| `{name}` | {summary} | {parameters} |")
    return reference(setting_fields().values()) + "\n\n" + "\n".join(rows)
