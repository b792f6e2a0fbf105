"""What a PBM recipe file may say, checked before anything heavy is imported."""

from __future__ import annotations

import glob
import inspect
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import not_one_of, one_line
from nemo_bard.base.folders import read_model_type, read_object
from nemo_bard.base.names import MODEL_TYPE
from nemo_bard.base.registry import import_dotted
from nemo_bard.base.settings import check_keys
from nemo_bard.cost.sharding import check_replicas, node_replicas
from nemo_bard.data.readers import find_reader
from nemo_bard.data.rejects import check_on_bad_sample
from nemo_bard.method.objectives import JointObjective, Objective, PBMObjective, SWDObjective
from nemo_bard.method.schedule import NoiseSchedule, NoiseSettings, ValidationNoise
from nemo_bard.train.keys import COLLATOR, check_all_keys, collator_keys, is_our_collator
from nemo_bard.train.settings import DistillationSettings, PackingSettings, RecipeSettings
from nemo_bard.train.trackers import check_trackers

BACKENDS = ("auto", "nccl", "gloo")
ATTENTION_BACKENDS = ("auto", "sdpa", "bard")
LOSS = "nemo_bard.method.BlockDiffusionCrossEntropy"
REPLICAS_KEY = "distributed.dp_replicate_size"
ONE_PER_NODE = "auto"
"""As ``distributed.dp_replicate_size``."""
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
    check_all_keys(raw, with_anchor=with_anchor)
    settings = (DistillationSettings if with_anchor else RecipeSettings).from_recipe(raw)
    _check_packing(raw)
    check_on_bad_sample(raw.get("on_bad_sample"))
    _check_choice("dist_env.backend", (raw.get("dist_env") or {}).get("backend", "auto"), BACKENDS)
    _check_distributed(raw["distributed"])
    _check_optimizer(raw["optimizer"])
    _check_step_scheduler(raw["step_scheduler"])
    _check_lr_scheduler(raw.get("lr_scheduler") or {}, raw)
    for name in ("model", "anchor") if with_anchor else ("model",):
        _check_model(name, raw[name])
    _check_ar_loss(raw, settings.ar_loss_weight)
    for name in ("dataset", "validation_dataset"):
        _check_dataset(name, raw.get(name))
    for name in ("dataloader", "validation_dataloader"):
        if raw.get(name.replace("dataloader", "dataset")) is not None:
            _check_collator(name, raw.get(name) or {})
    _check_noise(raw)
    _check_freeze(raw.get("freeze_config"))
    _check_peft(raw)
    _check_best_metric(raw, with_anchor)
    check_trackers(raw)


def _check_choice(key: str, value: object, allowed: Iterable[str]) -> None:
    if value not in tuple(allowed):
        raise not_one_of(key, value, allowed)


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
    replicas = section.get("dp_replicate_size")
    is_count = isinstance(replicas, int) and not isinstance(replicas, bool) and replicas >= 1
    if replicas not in (None, ONE_PER_NODE) and not is_count:
        raise ValueError(f"{REPLICAS_KEY} must be {ONE_PER_NODE}, null or an integer >= 1, got {replicas!r}")


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


def replicas_of(distributed: Mapping[str, Any], ranks: int, ranks_per_node: int) -> int:
    """Copies of the model, each sharded over equally many ranks, that ``distributed.dp_replicate_size`` asks for.

    Args:
        distributed: The recipe's section; without the key, or with null, all ranks share one copy.
        ranks: All ranks.
        ranks_per_node: Those of a node; with ``auto`` every node has a copy, see ``node_replicas``.

    Raises:
        ValueError: If the ranks cannot be divided so.
    """
    replicas = distributed.get("dp_replicate_size") or 1
    if replicas == ONE_PER_NODE:
        return node_replicas(ranks, ranks_per_node)
    check_replicas(REPLICAS_KEY, replicas, ranks)
    return replicas


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
    try:
        model_type = read_model_type(folder)
    except ValueError as error:
        raise ValueError(f"{key}: {one_line(error)}") from error
    if model_type != MODEL_TYPE:
        raise ValueError(
            f"{key}: {folder} is a Qwen3-VL checkpoint; make a start point with `nemo-bard convert {folder} DST`"
            " and name DST"
        )


def check_ar_loss(weight: float, context_attention: str | None) -> None:
    """Check ``ar_loss_weight`` against the model's ``context_attention`` (None if that is not known yet).

    Raises:
        ValueError: If the context cannot learn to predict the next token.
    """
    if weight and context_attention not in (None, "causal"):
        raise ValueError(
            f"ar_loss_weight={weight} needs a model with context_attention: causal (a token must not see the next one),"
            f" got {context_attention!r}; set model.context_attention=causal or ar_loss_weight=0"
        )


def _check_ar_loss(raw: Mapping[str, Any], weight: float) -> None:
    attention = raw["model"].get("context_attention")
    config_file = Path(raw["model"]["pretrained_model_name_or_path"]) / "config.json"
    if attention is None and config_file.is_file():
        attention = read_object(config_file).get("context_attention", "block")
    check_ar_loss(weight, attention)


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
    _check_tokenized(name, section)
    spec = section.get("spec")
    key, path = ("spec", _path_of(spec)) if isinstance(spec, (str, Mapping)) else ("path", section.get("path"))
    if isinstance(path, str) and not Path(path).exists() and not glob.has_magic(path):
        raise ValueError(f"{name}.{key}: {path} does not exist")
    if callable(check := getattr(target, "check_settings", None)):
        settings = {key: value for key, value in section.items() if key not in ("_target_", "chat_template")}
        try:
            check(**settings)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _check_tokenized(name: str, section: Mapping[str, Any]) -> None:
    """Keys of any data set that AutoModel takes for itself, to hand on something else than conversations."""
    for key in ("pretokenize", "packing", "max_length"):
        value = section.get(key)
        if key == "packing" and isinstance(value, Mapping):
            value = value.get("enabled")
        if value and not (key == "max_length" and section.get("pretokenize") is False):
            raise ValueError(
                f"{name}.{key}: AutoModel would make rows for predicting the next token; use"
                f" {'packing.max_length' if key == 'packing' else 'dataloader.collate_fn.max_length'}, got {value!r}"
            )
    if section.get("shard_data"):
        raise ValueError(f"{name}.shard_data must be false: every rank takes its share of all samples")


def _path_of(spec: str | Mapping[str, Any]) -> Any:
    """The path that ``open_dataset`` will read, None if it reads none."""
    reader, words, settings = find_reader(spec)
    return {**dict(zip(inspect.signature(reader).parameters, words, strict=False)), **settings}.get("path")


def _check_packing(raw: Mapping[str, Any]) -> None:
    if PackingSettings.from_dict(raw.get("packing")).max_length is None:
        return
    collator = (raw["dataloader"].get("collate_fn") or {}).get("_target_")
    if not is_our_collator(collator):
        raise ValueError(f"packing needs dataloader.collate_fn._target_: {COLLATOR}, got {collator!r}")


def _check_collator(name: str, section: Mapping[str, Any]) -> None:
    collator = section.get("collate_fn")
    if not isinstance(collator, Mapping) or not collator.get("_target_"):
        raise ValueError(f"{name}.collate_fn must be a section with _target_, got {collator!r}")
    if str(collator["_target_"]).startswith("nemo_automodel."):
        raise ValueError(
            f"{name}.collate_fn: {collator['_target_']} makes rows for predicting the next token; this recipe needs"
            f" {COLLATOR}"
        )
    if is_our_collator(collator["_target_"]):
        check_keys(f"{name}.collate_fn", collator, collator_keys())


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
        raise ValueError(f"loss_fn must have _target_, such as {LOSS}")
    loss = _resolve("loss_fn._target_", target) if isinstance(target, str) else target
    module = str(getattr(loss, "__module__", ""))
    if module.startswith("nemo_automodel.") and not hasattr(loss, "objective_class"):
        raise ValueError(f"loss_fn of this recipe must be one of block diffusion, such as {LOSS}, got {target}")
    if module.startswith("nemo_bard."):
        check_keys("loss_fn", raw["loss_fn"], ["_target_", *inspect.signature(loss).parameters])
    for key, settings in used.items():
        if (reason := settings.noise.misfit(loss)) is not None:
            raise ValueError(f"loss_fn {loss.__name__} does not go with {key}: {settings.name} ({reason})")


def _check_freeze(section: Mapping[str, Any] | None) -> None:
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
    target = raw["loss_fn"].get("_target_")
    loss = _resolve("loss_fn._target_", target) if isinstance(target, str) else target
    own: type[Objective] = getattr(loss, "objective_class", SWDObjective if with_anchor else PBMObjective)
    parts = [*own.parts, *(JointObjective.parts if raw.get("ar_loss_weight") else ())]
    allowed += [f"val_{part}" for part in parts]
    _check_choice("checkpoint.best_metric_key", name, allowed)


def _resolve(key: str, dotted: str) -> Any:
    try:
        return import_dotted(dotted)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from error
