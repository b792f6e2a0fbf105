"""What of ours a recipe of NeMo AutoModel's own may name: data sets. Everything else would do something else in silence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from nemo_bard.base.folders import read_object
from nemo_bard.base.names import MODEL_TYPE
from nemo_bard.base.registry import import_dotted
from nemo_bard.method.losses import BlockDiffusionLoss, DistillationLoss
from nemo_bard.train.keys import OWN_SECTIONS, is_our_collator
from nemo_bard.train.settings import DistillationSettings
from nemo_bard.upstream.sections import keys_read

UPSTREAM = "nemo_automodel."
OWN_RECIPES = "nemo_bard.train.pbm.PBMRecipe or nemo_bard.train.swd.SWDRecipe"
MODELS = ("model", "teacher_model")


def check_beside(raw: Mapping[str, Any], recipe: type) -> None:
    """Check a recipe file whose ``recipe`` is NeMo AutoModel's own; other packages' recipes know what they name.

    Args:
        raw: The file as plain dictionaries, overrides included.
        recipe: The class that it names.

    Raises:
        ValueError: One line, if it names a collator, a loss, a checkpoint or settings of block diffusion, which only a
            recipe of ours can train with.
    """
    if not recipe.__module__.startswith(UPSTREAM):
        return
    for name in ("dataloader", "validation_dataloader"):
        target = _target(_section(raw, name).get("collate_fn"))
        if target is not None and is_our_collator(target):
            raise _misplaced(f"{name}.collate_fn", target, recipe, "lays out rows for block diffusion; leave it out")
    target = _target(raw.get("loss_fn"))
    if target is not None and _is_our_loss(target):
        remedy = (
            f"needs the noise of a block-diffusion recipe; use {UPSTREAM}components.loss.masked_ce.MaskedCrossEntropy"
        )
        raise _misplaced("loss_fn", target, recipe, remedy)
    for name in MODELS:
        _check_model(name, _section(raw, name), recipe)
    known = {*keys_read(), "recipe"}
    for key in (*OWN_SECTIONS, "anchor", *(field.name for field in fields(DistillationSettings))):
        if key not in known and raw.get(key) is not None:
            raise ValueError(f"{key} is not read by {recipe.__name__}; remove it, or use recipe: {OWN_RECIPES}")


def _check_model(name: str, section: Mapping[str, Any], recipe: type) -> None:
    """A context that sees whole blocks cannot be trained to predict next tokens; one that is causal can."""
    folder = section.get("pretrained_model_name_or_path")
    if not isinstance(folder, str) or not (file := Path(folder) / "config.json").is_file():
        return
    config = {**read_object(file), **section}
    if config.get("model_type") == MODEL_TYPE and config.get("context_attention", "block") != "causal":
        raise _misplaced(
            f"{name}.pretrained_model_name_or_path",
            folder,
            recipe,
            "is a block-diffusion checkpoint, whose tokens see ahead in their block; use the Qwen3-VL checkpoint",
        )


def _misplaced(key: str, value: object, recipe: type, reason: str) -> ValueError:
    return ValueError(
        f"{key}: {value} {reason} with {recipe.__name__}, which trains to predict the next token, or use recipe:"
        f" {OWN_RECIPES}"
    )


def _section(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = raw.get(name)
    return section if isinstance(section, Mapping) else {}


def _target(section: Any) -> str | None:
    """The dotted name that a section means, or stands for itself."""
    target = section.get("_target_") if isinstance(section, Mapping) else section
    return target if isinstance(target, str) and "." in target else None


def _is_our_loss(target: str) -> bool:
    if target.startswith(UPSTREAM):
        return False
    try:
        loss = import_dotted(target)
    except ValueError:
        return False  # AutoModel says so
    return isinstance(loss, type) and (
        issubclass(loss, (BlockDiffusionLoss, DistillationLoss)) or hasattr(loss, "objective_class")
    )
