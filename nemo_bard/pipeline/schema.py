"""What the configuration of a chain may say: one dataclass per section, whose fields give types, defaults, checks and help.

``structured`` hands them to Hydra, ``job`` reads a composed configuration with them. The sections of launchers are in
``nemo_bard.launch``, those of stage kinds beside their classes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from nemo_bard.base.settings import (
    Check,
    check_keys,
    check_settings,
    choice,
    flag,
    from_mapping,
    integer,
    setting,
    text,
)

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T", bound="DataclassInstance")
SECTION = Check("a section", lambda value: isinstance(value, Mapping), str, "SECTION", optional=True)
"""Keys of something else: a recipe, a generation config; checked there."""
NAMES = Check(
    "a list of names",
    lambda value: isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value),
    str,
    "NAMES",
)
DATASET = Check(
    "a file or folder of any layout, a prepared folder, digits:SPLIT, a reader or {_target_: ...}",
    lambda value: isinstance(value, (str, Mapping)) and bool(value),
    str,
    "DATA",
    True,
)


def read_section(cls: type[T], values: Mapping[str, Any], section: str) -> T:
    """Build a settings class from a section, and check every value.

    Raises:
        ValueError: One line that names the key, its value and what is allowed.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{section} must be a section, got {values!r}")
    check_keys(section, values, [one.name for one in dataclasses.fields(cls)], "key")
    settings = from_mapping(cls, values, section)
    check_settings(settings, section)
    return settings


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """``model``: the source, and how it becomes a start point."""

    name: str = setting(check=text(), help="of the file")
    source: str | None = setting(None, text(optional=True), "folder (Qwen3-VL or BARD) or Hugging Face name")
    mask_token_id: int | None = setting(
        None, integer(0, optional=True), "null: the first row above the tokenizer's last id"
    )
    context_attention: str = setting("block", choice(("block", "causal")), "attention among context blocks")
    recipe: dict[str, Any] | None = setting(
        factory=dict, check=SECTION, help="keys for the recipes of all training stages with this model"
    )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """``data``, as far as the chain reads it; a file may have further keys for its own use."""

    evaluation: Any = setting(None, DATASET, "answers to its samples are scored after each stage; null means none")
    recipe: dict[str, Any] | None = setting(factory=dict, check=SECTION, help="keys for the recipes of training stages")


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """``evaluation``: what is scored after each stage whose ``evaluate`` is true."""

    data: Any = setting(None, DATASET, "held-out samples; null means no evaluation")
    limit: int | None = setting(128, integer(optional=True), "first samples; null: all")
    batch_size: int = setting(1, integer(), "prompts that are decoded together")
    samples_per_process: int = setting(
        8, integer(), "at least; with fewer samples, fewer processes load the model and answer"
    )
    scorer: str | None = setting(None, text(optional=True), "null: the data set's own; see nemo-bard evaluate --help")
    warm_up: bool = setting(True, flag(), "decode the first batch once untimed")
    generation: dict[str, Any] = setting(
        factory=dict, check=SECTION, help="decoding settings; what is missing is as in the checkpoint"
    )
    pictures: int = setting(4, integer(0), "answers drawn in the report")


@dataclass(frozen=True, kw_only=True)
class ChainSettings:
    """The top of the configuration."""

    name: str = setting(check=text(), help="of the pipeline; a run directory belongs to one")
    run_dir: str = setting(check=text(), help="everything that a run writes; the same command with it goes on")
    order: list[str] = setting(check=NAMES, help="names of stages, in order; others do not run")
    keep_last: int = setting(2, integer(), "newest training checkpoints kept per stage")
    overrides: dict[str, Any] = setting(factory=dict, check=SECTION, help="keys of the recipes of all training stages")
    allow_version_change: bool = setting(
        False, flag(), "go on although packages differ from those that finished stages were made with"
    )
    evaluation: Any = setting(factory=dict, check=SECTION, help="see EvaluationSettings")
    model: Any = setting(factory=dict, check=SECTION, help="see ModelSettings")
    data: dict[str, Any] = setting(factory=dict, check=SECTION, help="see DataSettings")
    launch: Any = setting(factory=dict, check=SECTION, help="the launcher's settings")
    stage: dict[str, Any] = setting(factory=dict, check=SECTION, help="one section per stage: its kind's settings")


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """A stage's section, as far as it is the same for all kinds."""

    kind: str = setting(check=text(), help="what makes the stage: a name, or a dotted one")
    output: str | None = setting(None, text(optional=True), "folder below run_dir; null means the stage's name")
    evaluate: bool = setting(True, flag(), "whether its export is scored")
    generation: dict[str, Any] = setting(
        factory=dict, check=SECTION, help="decoding settings of its evaluation, over evaluation.generation"
    )


@dataclass(frozen=True, kw_only=True)
class FollowingSettings(StageSettings):
    """The section of a stage that starts from what another one left."""

    init: str | None = setting(None, text(optional=True), "earlier stage or folder; null means the stage before")
