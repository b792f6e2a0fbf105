"""Which keys a recipe may have: AutoModel's that are read here, and ours."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

from nemo_bard.base.errors import short
from nemo_bard.base.moved import new_name
from nemo_bard.base.settings import check_keys
from nemo_bard.train.settings import DistillationSettings, RecipeSettings
from nemo_bard.upstream.sections import constructor_keys, keys_read, section_keys

REQUIRED_SECTIONS = ("model", "dataset", "dataloader", "loss_fn", "optimizer", "distributed", "step_scheduler")
OWN_SECTIONS = ("noise", "validation_noise", "packing", "on_bad_sample")
COLLATOR = "nemo_bard.data.BlockDiffusionCollator"
GIVEN_TO_COLLATOR = ("processor", "config", "max_row_length", "options")
"""Parameters of the collator that AutoModel or the recipe gives it."""

_NO_TENSOR_PARALLELISM = "is read with tensor parallelism only, and block masks are not split over ranks; remove it"
_NO_EXPERTS = "is for mixtures of experts, and the model has none; remove it"
_BASE_WEIGHTS = "is not read: AutoModel loads base weights with settings of its own; remove it"
UNUSED = {
    "compile": "does nothing under distributed.strategy: fsdp2; use distributed.enable_compile: true",
    "fp8": "would replace the LM head, inside which the loss runs; use compute_dtype: bfloat16",
    "quantization": "is not supported, neither to train nor to export quantized weights; use peft on the weights as they are",
    "packed_sequence": "is not supported by this recipe: its collator would be replaced; use packing.max_length",
    "mtp": "is for heads that predict several tokens, and the model has none; see ar_loss_weight",
    "model.quantization_config": "is not supported, neither to train nor to export quantized weights; use peft on the"
    " weights as they are",
    "model.use_liger_kernel": "does nothing: Liger replaces parts of transformers' own models, and this one has its own;"
    " remove it",
    "distributed.sequence_parallel": _NO_TENSOR_PARALLELISM,
    "distributed.tp_plan": _NO_TENSOR_PARALLELISM,
    "distributed.enable_async_tensor_parallel": _NO_TENSOR_PARALLELISM,
    "distributed.pipeline": "is read with distributed.pp_size > 1 only, and the model is not split into stages; remove it",
    "distributed.moe": _NO_EXPERTS,
    "distributed.patch_is_packed_sequence": "is read by flash attention only, which takes no block masks; remove it",
    "prewarm.fla_gdn_autotune": "is for gated delta nets, and the model has none; remove it",
    "prewarm.mamba_ssd_autotune": "is for Mamba layers, and the model has none; remove it",
    "prewarm.pipeline_stage_compile": "is for pipeline stages, and the model is not split into any; remove it",
    "peft.moe_rank_scaling": _NO_EXPERTS,
    "peft.expert_weight_format": _NO_EXPERTS,
    "freeze_config.freeze_audio_tower": "freezes nothing, the model has no audio tower; remove it",
    "freeze_config.freeze_video_embedder": "freezes nothing, the vision tower reads videos too; use freeze_modules",
    "checkpoint.model_cache_dir": "is overwritten by model.cache_dir; set that",
    "checkpoint.model_repo_id": "is overwritten by model.pretrained_model_name_or_path; set that",
    "checkpoint.is_peft": "is overwritten: it is true with a section peft; remove it",
    "checkpoint.model_state_dict_keys": "is not read: they are the model's; remove it",
    "checkpoint.dequantize_base_checkpoint": _BASE_WEIGHTS,
    "checkpoint.skip_task_head_prefixes_for_base_model": _BASE_WEIGHTS,
    "checkpoint.legacy_paramwrapper_layout": _NO_EXPERTS,
    "step_scheduler.loss_average_window_steps": "is not read by AutoModel's VLM recipe, which logs no average; remove it",
}
"""Keys that AutoModel takes and that do nothing, or nothing good, for this model under FSDP2: what to say about them."""
NEEDS = {
    "distributed.fsdp2_backward_prefetch_depth": "distributed.enable_fsdp2_prefetch",
    "distributed.fsdp2_forward_prefetch_depth": "distributed.enable_fsdp2_prefetch",
    "distributed.activation_checkpointing_scope": "distributed.activation_checkpointing",
    "checkpoint.wait_for_staging": "checkpoint.is_async",
    "dataloader.persistent_workers": "dataloader.num_workers",
    "dataloader.prefetch_factor": "dataloader.num_workers",
    "validation_dataloader.persistent_workers": "validation_dataloader.num_workers",
    "validation_dataloader.prefetch_factor": "validation_dataloader.num_workers",
}
"""Keys that are read only if another one is set."""
BUILT = {"lr_scheduler": "OptimizerParamScheduler", "distributed": "FSDP2"}
"""Sections whose ``_target_`` AutoModel drops, and what it builds whatever that says."""


def known_keys(section: str) -> tuple[str, ...]:
    """Keys of a section of AutoModel's that a recipe may have, refused ones included."""
    return tuple(section_keys()["model" if section == "anchor" else section.removeprefix("validation_")])


def is_our_collator(target: object) -> bool:
    """Whether a ``_target_`` is ``BlockDiffusionCollator``, under any of its names; it is not imported."""
    name = (
        target
        if isinstance(target, str)
        else f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', '')}"
    )
    return new_name(name) in (COLLATOR, "nemo_bard.data.collate.BlockDiffusionCollator")


def collator_keys() -> tuple[str, ...]:
    """Settings of ``BlockDiffusionCollator`` in a recipe."""
    taken = constructor_keys("nemo_bard.data.collate", "BlockDiffusionCollator")
    return ("_target_", *(key for key in taken if key not in GIVEN_TO_COLLATOR))


def check_all_keys(raw: Mapping[str, Any], *, with_anchor: bool) -> None:
    """Check that a recipe has the sections it needs, only keys that exist, and none that would do nothing.

    Raises:
        ValueError: One line that names the key and what to use instead.
    """
    anchor = ["anchor"] if with_anchor else []
    own = fields(DistillationSettings if with_anchor else RecipeSettings)
    check_keys("", raw, ["recipe", *keys_read(), *OWN_SECTIONS, *(field.name for field in own), *anchor])
    for key in (*REQUIRED_SECTIONS, *anchor):
        if not isinstance(raw.get(key), Mapping):
            raise ValueError(f"the recipe needs a section {key!r}, got {raw.get(key)!r}")
    for section in (*section_keys(), "validation_dataloader", *anchor):
        if (values := raw.get(section)) is None:
            continue
        if not isinstance(values, Mapping):
            raise ValueError(f"{section} must be a section of keys, got {values!r}")
        check_keys(section, values, known_keys(section))
    _check_unused(raw, anchor)


def _check_unused(raw: Mapping[str, Any], anchor: Iterable[str]) -> None:
    taken = {
        "checkpoint.model_cache_dir": _value(raw, "model.cache_dir"),
        "checkpoint.model_repo_id": _value(raw, "model.pretrained_model_name_or_path"),
        "checkpoint.is_peft": bool(raw.get("peft")),
    }
    for key, reason in UNUSED.items():
        if key in taken and _value(raw, key) == taken[key]:
            continue
        for dotted in (key, *(key.replace("model.", f"{name}.", 1) for name in anchor if key.startswith("model."))):
            if _asks_for_something(raw, dotted):
                raise ValueError(f"{dotted} {reason}, got {short(_value(raw, dotted))}")
    for key, other in NEEDS.items():
        if _asks_for_something(raw, key) and not _value(raw, other):
            raise ValueError(f"{key}={short(_value(raw, key))} needs {other}{' > 0' if 'num_' in other else ''}")
    for section, built in BUILT.items():
        target = _value(raw, f"{section}._target_")
        if target is not None and built.lower() not in str(target).lower():
            raise ValueError(f"{section}._target_ is not read: AutoModel builds {built}; remove it, got {target}")


def _asks_for_something(raw: Mapping[str, Any], dotted: str) -> bool:
    """Whether a key is there with a value that is neither empty nor what AutoModel takes without it."""
    value = _value(raw, dotted)
    section, _, key = dotted.partition(".")
    if not value or (isinstance(value, Mapping) and value.get("enabled") is False):
        return False
    return (
        not key or value != section_keys()["model" if section == "anchor" else section.removeprefix("validation_")][key]
    )


def _value(raw: Mapping[str, Any], dotted: str) -> Any:
    """The value of a key, None if it or its section is not there."""
    section, _, key = dotted.partition(".")
    value = raw.get(section)
    return value if not key or value is None else value.get(key)
