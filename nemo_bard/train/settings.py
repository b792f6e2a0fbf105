"""Our own keys of a recipe that are single values, and the section ``packing``: defaults, checks and their reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from nemo_bard.base.settings import (
    Check,
    check_settings,
    choice,
    flag,
    from_mapping,
    integer,
    number,
    reference,
    setting,
)
from nemo_bard.data.rejects import BadSamplePolicy
from nemo_bard.method.noise import NOISES
from nemo_bard.method.schedule import NoiseSchedule, NoiseSettings

COMPUTE_DTYPES = ("auto", "bfloat16", "float32")
_WHOLE_NUMBER = Check("an integer", lambda v: isinstance(v, int) and not isinstance(v, bool), int, "N")
_FOLDER = Check("a folder", lambda v: isinstance(v, str) and bool(v), str, "FOLDER", optional=True)

T = TypeVar("T", bound="RecipeSettings")


@dataclass(frozen=True, kw_only=True)
class RecipeSettings:
    """Values at the top level of a PBM recipe.

    Raises:
        ValueError: For a value that is not allowed.
    """

    seed: int = setting(42, _WHOLE_NUMBER, "seed of initialisation and noise")
    compute_dtype: str = setting(
        "auto", choice(COMPUTE_DTYPES), "of matrix products; auto: bfloat16 on GPUs that have it, float32 elsewhere"
    )
    loss_chunk_tokens: int | None = setting(
        None, integer(optional=True), "supervised tokens whose logits exist at once; null: what suits the device"
    )
    ar_loss_weight: float = setting(
        0.0, number(), "above 0 the context also learns to predict the next token; needs context_attention: causal"
    )

    def __post_init__(self) -> None:
        check_settings(self)

    @classmethod
    def from_recipe(cls: type[T], raw: Mapping[str, Any]) -> T:
        """Read them from a recipe, which has other keys too."""
        return cls(**{field.name: raw[field.name] for field in fields(cls) if field.name in raw})


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(RecipeSettings):
    """Values at the top level of an SWD recipe."""

    offload_anchor: bool = setting(False, flag(), "keep the anchor in CPU memory between its forwards (GPUs only)")


@dataclass(frozen=True, kw_only=True)
class PackingSettings:
    """The section ``packing``.

    Raises:
        ValueError: For a value that is not allowed.
    """

    max_length: int | None = setting(
        None, integer(optional=True), "tokens of a row that several samples share; null: one sample per row"
    )
    cache_dir: str | None = setting(
        None, _FOLDER, "folder for measured lengths and for what has been checked; null: checkpoint.checkpoint_dir"
    )

    def __post_init__(self) -> None:
        check_settings(self, "packing")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> PackingSettings:
        """Build from a recipe's section, which may be absent.

        Raises:
            ValueError: For an unknown key or a value that is not allowed.
        """
        if values is not None and not isinstance(values, Mapping):
            raise ValueError(f"packing must be a section of keys, got {values!r}")
        return from_mapping(cls, values, "packing")


def recipe_reference() -> dict[str, str]:
    """Markdown about our keys of a recipe, by section."""
    noises = [f"`{name}`: {', '.join(f'`{f.name}`' for f in fields(NOISES.get(name))) or 'none'}" for name in NOISES]
    own = {field.name: field for name in NOISES for field in fields(NOISES.get(name))}
    return {
        "Top level": reference(fields(DistillationSettings)),
        "`noise`": reference(fields(NoiseSettings))
        + f"\n\nParameters of a noise are keys of its section too. {'; '.join(noises)}.\n\n"
        + reference(own.values())
        + "\n\n`noise.schedule` is a list of phases; each replaces "
        + ", ".join(f"`{key}`" for key in NoiseSchedule.PHASE_KEYS[2:])
        + " or a parameter of its noise, up to the fraction `until` of the run, with `ramp: true` step by step."
        + "\n\n`validation_noise` has the same keys but for `schedule`, and `levels`: a list of noise levels, one pass each.",
        "`packing`": reference(fields(PackingSettings)),
        "`on_bad_sample`": "The action alone, or a section.\n\n" + reference(fields(BadSamplePolicy)),
    }
