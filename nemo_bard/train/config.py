"""What a PBM recipe file may say, checked before anything heavy is imported."""

from __future__ import annotations

import difflib
import importlib
import inspect
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.settings import check_keys
from nemo_bard.data.rejects import check_on_bad_sample
from nemo_bard.method.chunked import check_chunk_tokens
from nemo_bard.method.schedule import NoiseSchedule, NoiseSettings, ValidationNoise

RECIPE_KEYS = (
    "recipe", "seed", "dist_env", "step_scheduler", "model", "processor", "freeze_config", "distributed", "dataset",
    "dataloader", "validation_dataset", "validation_dataloader", "loss_fn", "optimizer", "lr_scheduler",
    "clip_grad_norm", "checkpoint", "packed_sequence", "peft", "compile", "fp8", "quantization", "prewarm", "wandb",
    "mlflow", "noise", "validation_noise", "compute_dtype", "loss_chunk_tokens", "ar_loss_weight",
    "packing", "on_bad_sample",
)  # fmt: skip
"""Top-level keys: those of AutoModel's VLM recipe, and what is BARD's."""
REQUIRED_KEYS = ("model", "dataset", "dataloader", "loss_fn", "optimizer", "distributed", "step_scheduler")
ANCHOR_KEYS = ("anchor", "offload_anchor")
SECTION_KEYS = {
    "dist_env": ("backend", "timeout_minutes"),
    "step_scheduler": (
        "global_batch_size", "local_batch_size", "num_epochs", "max_steps", "ckpt_every_steps",
        "save_checkpoint_every_epoch", "validate_on_checkpoint", "val_every_steps", "log_remote_every_steps",
        "loss_average_window_steps", "gc_every_steps", "start_step", "start_epoch", "preemption_signal",
    ),
    "lr_scheduler": (
        "_target_", "lr_warmup_steps", "lr_decay_steps", "lr_decay_style", "init_lr", "max_lr", "min_lr", "start_wd",
        "end_wd", "wd_incr_steps", "wd_incr_style", "use_checkpoint_opt_param_scheduler",
        "override_opt_param_scheduler", "wsd_decay_steps", "lr_wsd_decay_style",
    ),
    "dataloader": (
        "_target_", "shuffle", "num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "drop_last",
        "collate_fn",
    ),
    "distributed": (
        "_target_", "strategy", "tp_size", "pp_size", "cp_size", "ep_size", "dp_size", "dp_replicate_size",
        "activation_checkpointing", "activation_checkpointing_scope", "mp_policy", "offload_policy", "autocast_dtype",
        "defer_fsdp_grad_sync", "reshard_after_forward", "enable_compile", "enable_fsdp2_prefetch",
        "fsdp2_backward_prefetch_depth", "fsdp2_forward_prefetch_depth", "sequence_parallel", "tp_plan",
        "enable_async_tensor_parallel", "patch_is_packed_sequence", "multimodal", "pipeline", "moe",
    ),
    "clip_grad_norm": ("max_norm", "backend"),
    "packing": ("max_length", "cache_dir"),
    "freeze_config": (
        "freeze_modules", "unfreeze_modules", "freeze_vision_tower", "freeze_audio_tower", "freeze_language_model",
        "freeze_video_embedder",
    ),
    "peft": (
        "_target_", "target_modules", "exclude_modules", "match_all_linear", "dim", "alpha", "use_dora", "dropout",
        "dropout_position", "lora_A_init", "lora_dtype", "use_memory_efficient_lora", "use_triton",
    ),
    "checkpoint": (
        "enabled", "checkpoint_dir", "restore_from", "best_metric_key", "model_save_format", "model_cache_dir",
        "model_repo_id", "save_consolidated", "is_peft", "model_state_dict_keys", "is_async", "wait_for_staging",
        "cpu_offload", "allow_legacy_pickle_restore", "dequantize_base_checkpoint", "original_model_root_dir",
        "skip_task_head_prefixes_for_base_model", "single_rank_consolidation", "staging_dir", "v4_compatible",
        "legacy_paramwrapper_layout", "diffusers_compatible", "max_recent_checkpoints", "consolidation_timeout_minutes",
    ),
    "model": (
        "_target_", "pretrained_model_name_or_path", "torch_dtype", "dtype", "attn_implementation",
        "use_liger_kernel", "use_sdpa_patching", "sdpa_method", "force_hf", "trust_remote_code", "cache_dir",
        "revision", "token", "text_config", "vision_config", "quantization_config", "block_size", "mask_token_id",
        "context_attention", "assistant_header_ids", "eos_token_id", "tie_word_embeddings",
    ),
}  # fmt: skip
BACKENDS = ("auto", "nccl", "gloo")
COMPUTE_DTYPES = ("auto", "bfloat16", "float32")
ATTENTION_BACKENDS = ("auto", "sdpa", "bard")
SINGLE_SIZES = ("tp_size", "pp_size", "cp_size", "ep_size")


def validate_recipe(raw: Mapping[str, Any], *, with_anchor: bool = False) -> None:
    """Check a recipe; nothing is built, and no file but ``config.json`` of its checkpoint folders is read.

    Args:
        raw: The recipe as plain dictionaries, with ``_target_`` as dotted names.
        with_anchor: Whether it distils from an anchor.

    Raises:
        ValueError: One line that names the key, its value, and what is allowed.
    """
    if "ema" in raw:
        raise ValueError("ema: NeMo AutoModel 0.7.0 has no average of weights in its VLM recipe; remove the key")
    check_keys("", raw, [*RECIPE_KEYS, *(ANCHOR_KEYS if with_anchor else ())])
    for key in [*REQUIRED_KEYS, *(["anchor"] if with_anchor else [])]:
        if not isinstance(raw.get(key), Mapping):
            raise ValueError(f"the recipe needs a section {key!r}, got {raw.get(key)!r}")
    for section, known in {**SECTION_KEYS, "anchor": SECTION_KEYS["model"]}.items():
        for name in (section, f"validation_{section}") if section == "dataloader" else (section,):
            if raw.get(name) is not None:
                if not isinstance(raw[name], Mapping):
                    raise ValueError(f"{name} must be a section of keys, got {raw[name]!r}")
                check_keys(name, raw[name], known)
    if raw.get("packed_sequence"):
        raise ValueError(
            "packed_sequence is not supported by this recipe: its collator would be replaced; use packing.max_length"
        )
    _check_packing(raw)
    check_on_bad_sample(raw.get("on_bad_sample"))
    _check_choice("compute_dtype", raw.get("compute_dtype", "auto"), COMPUTE_DTYPES)
    _check_choice("dist_env.backend", (raw.get("dist_env") or {}).get("backend", "auto"), BACKENDS)
    check_chunk_tokens(raw.get("loss_chunk_tokens"))
    seed = raw.get("seed", 42)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ValueError(f"seed must be an integer, got {seed!r}")
    _check_distributed(raw["distributed"])
    _check_optimizer(raw["optimizer"])
    _check_step_scheduler(raw["step_scheduler"])
    _check_lr_scheduler(raw.get("lr_scheduler") or {}, raw)
    for name in ("model", "anchor") if with_anchor else ("model",):
        _check_model(name, raw[name])
    _check_ar_loss(raw)
    offload = raw.get("offload_anchor", False)
    if not isinstance(offload, bool):
        raise ValueError(f"offload_anchor must be true or false, got {offload!r}")
    for name in ("dataset", "validation_dataset"):
        _check_dataset(name, raw.get(name))
    for name in ("dataloader", "validation_dataloader"):
        if raw.get(name.replace("dataloader", "dataset")) is not None:
            _check_collator(name, raw.get(name) or {})
            _check_workers(name, raw.get(name) or {})
    _check_noise(raw)
    _check_freeze(raw.get("freeze_config"))
    _check_peft(raw)
    _check_best_metric(raw, with_anchor)


def _check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{key} must be one of {', '.join(allowed)}, got {value!r}{hint}")


def _check_count(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{key} must be an integer >= 1, got {value!r}")


def _check_distributed(section: Mapping[str, Any]) -> None:
    strategy = section.get("strategy", "fsdp2")
    if strategy == "megatron_fsdp":
        raise ValueError(
            "distributed.strategy: megatron_fsdp does not work with the installed megatron-core; use fsdp2"
        )
    _check_choice("distributed.strategy", strategy, ("fsdp2",))
    for key in SINGLE_SIZES:
        if section.get(key) not in (None, 1):
            raise ValueError(
                f"distributed.{key} must be 1 (block masks are not split over ranks), got {section[key]!r}"
            )


def _check_optimizer(section: Mapping[str, Any]) -> None:
    target = section.get("_target_")
    if not target:
        raise ValueError("optimizer must have _target_, such as torch.optim.AdamW")
    if isinstance(target, str) and target.startswith("torch.optim."):
        known = inspect.signature(_resolve("optimizer._target_", target)).parameters
        check_keys("optimizer", section, ["_target_", "param_group_overrides", *known])
    for key in ("lr", "weight_decay", "eps"):
        value = section.get(key, 0.0)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
            raise ValueError(f"optimizer.{key} must be a number >= 0, got {value!r}")


def _check_step_scheduler(section: Mapping[str, Any]) -> None:
    for key in ("global_batch_size", "local_batch_size"):
        _check_count(f"step_scheduler.{key}", section.get(key))
    for key in ("max_steps", "num_epochs", "ckpt_every_steps", "val_every_steps"):
        if section.get(key) is not None:
            _check_count(f"step_scheduler.{key}", section[key])
    if section.get("max_steps") is None and section.get("num_epochs") is None:
        raise ValueError("set step_scheduler.max_steps or step_scheduler.num_epochs; both are null")
    check_batch_sizes(section["global_batch_size"], section["local_batch_size"], 1)


def _check_lr_scheduler(section: Mapping[str, Any], raw: Mapping[str, Any]) -> None:
    """What upstream's scheduler asserts, as far as it is known before the data set is."""
    warmup, decay = section.get("lr_warmup_steps"), section.get("lr_decay_steps")
    if warmup is not None:
        if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
            raise ValueError(f"lr_scheduler.lr_warmup_steps must be an integer >= 0 or null, got {warmup!r}")
        key, steps = "step_scheduler.max_steps", raw["step_scheduler"].get("max_steps")
        if decay is not None:
            key, steps = "lr_scheduler.lr_decay_steps", decay
        if steps is not None and warmup >= steps:
            raise ValueError(f"lr_scheduler.lr_warmup_steps={warmup} must be less than {key}={steps}")
    lr, min_lr = raw["optimizer"].get("lr"), section.get("min_lr")
    if min_lr is not None and (isinstance(min_lr, bool) or not isinstance(min_lr, (int, float)) or min_lr < 0):
        raise ValueError(f"lr_scheduler.min_lr must be a number >= 0 or null, got {min_lr!r}")
    if lr is not None and min_lr is not None and min_lr > lr:
        raise ValueError(f"lr_scheduler.min_lr={min_lr} must be at most optimizer.lr={lr}")


def check_batch_sizes(global_batch_size: int, local_batch_size: int, ranks: int) -> None:
    """Raise ValueError unless the global batch is a whole number of local batches on all ranks."""
    if global_batch_size % (local_batch_size * ranks):
        raise ValueError(
            f"step_scheduler.global_batch_size={global_batch_size} must be divisible by"
            f" step_scheduler.local_batch_size={local_batch_size} times {ranks} data-parallel rank(s)"
        )


def _check_model(section_name: str, section: Mapping[str, Any]) -> None:
    if section.get("attn_implementation") is not None:
        _check_choice(f"{section_name}.attn_implementation", section["attn_implementation"], ATTENTION_BACKENDS)
    if section.get("block_size") is not None:
        _check_count(f"{section_name}.block_size", section["block_size"])
    key = f"{section_name}.pretrained_model_name_or_path"
    name = section.get("pretrained_model_name_or_path")
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key} must name a checkpoint folder made by `nemo-bard convert`, got {name!r}")
    folder = Path(name)
    if not folder.is_dir():
        is_hub_id = name.count("/") == 1 and not name.startswith((".", "~", "/"))
        if not is_hub_id or os.environ.get("HF_HUB_OFFLINE") in ("1", "ON", "YES", "TRUE"):
            raise ValueError(f"{key}: {name} is not a folder")
        return
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(f"{key}: {folder} has no config.json")
    try:
        model_type = json.loads(config_file.read_text()).get("model_type")
    except (json.JSONDecodeError, AttributeError) as error:
        raise ValueError(f"{key}: {config_file} is not a JSON object ({error})") from error
    if model_type == "qwen3_vl":
        raise ValueError(
            f"{key}: {folder} is a Qwen3-VL checkpoint; make a start point with `nemo-bard convert {folder} DST`"
            " and name DST"
        )
    if model_type != "bard_vl":
        raise ValueError(f"{key}: {config_file} has model_type {model_type!r}, allowed is 'bard_vl'")


def check_ar_loss(weight: object, context_attention: str | None) -> None:
    """Check ``ar_loss_weight`` against the model's ``context_attention`` (None if that is not known yet).

    Raises:
        ValueError: If the weight is no number >= 0, or the context cannot learn to predict the next token.
    """
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 <= weight < math.inf:
        raise ValueError(f"ar_loss_weight must be a number >= 0, got {weight!r}")
    if weight and context_attention not in (None, "causal"):
        raise ValueError(
            f"ar_loss_weight={weight} needs a model with context_attention: causal (a token must not see the next one),"
            f" got {context_attention!r}; set model.context_attention=causal or ar_loss_weight=0"
        )


def _check_ar_loss(raw: Mapping[str, Any]) -> None:
    attention = raw["model"].get("context_attention")
    config_file = Path(raw["model"]["pretrained_model_name_or_path"]) / "config.json"
    if attention is None and config_file.is_file():
        attention = json.loads(config_file.read_text()).get("context_attention", "block")
    check_ar_loss(raw.get("ar_loss_weight", 0.0), attention)


def _check_dataset(name: str, section: object) -> None:
    if section is None:
        return
    if not isinstance(section, Mapping) or not section.get("_target_"):
        raise ValueError(f"{name} must be a section with _target_, got {section!r}")
    target = section["_target_"]
    if isinstance(target, str) and target.startswith("nemo_bard."):
        target = _resolve(f"{name}._target_", target)
    if callable(target) and getattr(target, "__module__", "").startswith("nemo_bard."):
        parameters = inspect.signature(target).parameters
        open_ended = inspect.Parameter.VAR_KEYWORD in {p.kind for p in parameters.values()}
        known = [key for key, p in parameters.items() if key != "self" and p.kind != inspect.Parameter.VAR_KEYWORD]
        extra = ("_target_", "chat_template")
        if not open_ended:  # a target that takes any key checks its keys itself
            check_keys(name, section, [*known, *extra])
        for key in known:
            required = parameters[key].default is inspect.Parameter.empty
            if required and section.get(key) is None:
                raise ValueError(f"{name}.{key} must be set, got {section.get(key)!r}")
    path = section.get("path")
    if isinstance(path, str) and not Path(path).exists():
        raise ValueError(f"{name}.path: {path} does not exist")


def _check_packing(raw: Mapping[str, Any]) -> None:
    section = raw.get("packing") or {}
    if section.get("max_length") is None:
        return
    _check_count("packing.max_length", section["max_length"])
    cache = section.get("cache_dir")
    if cache is not None and (not isinstance(cache, str) or not cache):
        raise ValueError(f"packing.cache_dir must be a folder or null, got {cache!r}")
    collator = (raw["dataloader"].get("collate_fn") or {}).get("_target_")
    if not str(collator).endswith("nemo_bard.data.BlockDiffusionCollator"):
        raise ValueError(
            f"packing needs dataloader.collate_fn._target_: nemo_bard.data.BlockDiffusionCollator, got {collator!r}"
        )


def _check_workers(name: str, section: Mapping[str, Any]) -> None:
    for key in ("persistent_workers", "prefetch_factor"):
        if section.get(key) and not section.get("num_workers"):
            raise ValueError(f"{name}.{key}={section[key]} needs {name}.num_workers > 0")


def _check_collator(name: str, section: Mapping[str, Any]) -> None:
    collator = section.get("collate_fn")
    if not isinstance(collator, Mapping) or not collator.get("_target_"):
        raise ValueError(f"{name}.collate_fn must be a section with _target_, got {collator!r}")
    if str(collator["_target_"]).endswith("nemo_bard.data.BlockDiffusionCollator"):
        known = ("_target_", "max_length", "turns", "overlong", "pad_to_multiple_of")
        check_keys(f"{name}.collate_fn", collator, known)


def _check_noise(raw: Mapping[str, Any]) -> None:
    noise = raw.get("noise")
    schedule = NoiseSchedule.from_dict(noise)
    base = NoiseSettings.from_dict({key: value for key, value in (noise or {}).items() if key != "schedule"})
    validation = ValidationNoise.from_dict(raw.get("validation_noise"), base)
    used = {"noise.name": base}
    used.update({f"noise.schedule[{i}].name": phase.settings for i, phase in enumerate(schedule.phases)})
    used["validation_noise.name"] = validation.settings
    target = raw["loss_fn"].get("_target_")
    if not target:
        raise ValueError("loss_fn must have _target_, such as nemo_bard.method.BlockDiffusionCrossEntropy")
    loss = _resolve("loss_fn._target_", target) if isinstance(target, str) else target
    if str(getattr(loss, "__module__", "")).startswith("nemo_bard."):
        check_keys("loss_fn", raw["loss_fn"], ["_target_", *inspect.signature(loss).parameters])
    for key, settings in used.items():
        if (reason := settings.noise.misfit(loss)) is not None:
            raise ValueError(f"loss_fn {loss.__name__} does not go with {key}: {settings.name} ({reason})")


def _check_freeze(section: object) -> None:
    """Upstream freezes the vision tower whenever the section names neither it nor modules."""
    if section is None:
        return
    if not any(section.get(key) is not None for key in ("freeze_modules", "unfreeze_modules", "freeze_vision_tower")):
        raise ValueError(
            "freeze_config must say freeze_vision_tower: true or false, or list freeze_modules; without them the vision"
            f" tower would be frozen, got {dict(section)!r}"
        )


def _check_peft(raw: Mapping[str, Any]) -> None:
    """Only adapters that ``nemo_bard.checkpoints.merge.merge`` can add to their weights."""
    section = raw.get("peft")
    if section is None:
        return
    if not section.get("_target_"):
        raise ValueError("peft must have _target_, such as nemo_automodel.components._peft.lora.PeftConfig")
    if section.get("match_all_linear"):
        raise ValueError(
            "peft.match_all_linear would put an adapter on lm_head, which this recipe does not support; use"
            " peft.exclude_modules: [lm_head] for all other linear layers"
        )
    if section.get("use_dora"):
        raise ValueError("peft.use_dora: adapters of this kind cannot be merged; remove it")
    for key in ("dim", "alpha"):
        if section.get(key) is not None:
            _check_count(f"peft.{key}", section[key])
    if (raw.get("checkpoint") or {}).get("is_async"):
        raise ValueError("checkpoint.is_async must be false with peft: adapters are merged before a checkpoint counts")
    for key in ("text_config", "vision_config", "tie_word_embeddings"):
        if raw["model"].get(key) is not None:
            raise ValueError(f"model.{key} cannot be changed with peft; make it part of the checkpoint's config.json")
    folder = raw["model"].get("pretrained_model_name_or_path")
    if not Path(folder).is_dir():
        raise ValueError(f"model.pretrained_model_name_or_path must be a folder with peft, got {folder!r}")


def _check_best_metric(raw: Mapping[str, Any], with_anchor: bool) -> None:
    name = (raw.get("checkpoint") or {}).get("best_metric_key")
    if name is None:
        return
    levels = ValidationNoise.from_dict(raw.get("validation_noise"), NoiseSettings()).names()
    allowed = ["default", "val_loss", *levels]
    allowed += ["val_ce_loss", "val_kd_loss"] if with_anchor else []
    allowed += ["val_diffusion_loss", "val_ar_loss"] if raw.get("ar_loss_weight") else []
    _check_choice("checkpoint.best_metric_key", name, allowed)


def _resolve(key: str, dotted: str) -> Any:
    module, _, name = dotted.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{key}: {dotted} cannot be imported ({error})") from error
