"""What a recipe will cost: ``nemo-bard plan`` for what a training stage's YAML says, on so many ranks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nemo_bard.cost.count import GPUS, Gpu, attention_widths, count_parameters, row_tokens
from nemo_bard.cost.estimate import Plan, PlanSettings, estimate
from nemo_bard.data.collate import DEFAULT_MAX_LENGTH
from nemo_bard.train.config import replicas_of
from nemo_bard.train.settings import PackingSettings
from nemo_bard.upstream.transformers import text_section

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig


def plan_of_recipe(
    recipe: Mapping[str, Any],
    *,
    config: Qwen3VLConfig,
    world_size: int,
    gpus_per_node: int,
    device: str | Gpu,
    anchor: Qwen3VLConfig | None = None,
    measured: Mapping[str, Any] | None = None,
) -> Plan:
    """Plan a stage.

    Args:
        recipe: A PBM or SWD recipe as plain dictionaries.
        config: Configuration of the model that it trains.
        world_size: Ranks.
        gpus_per_node: Ranks of a node.
        device: A kind of GPU that ``nemo-bard plan`` knows, or what a rank has; a ``Gpu`` with ``bfloat16=0`` computes in
            float32.
        anchor: Configuration of the anchor of a recipe that distils.
        measured: Fields of ``PlanSettings`` that are known better than by default, such as ``prompt_tokens``,
            ``response_tokens`` or ``utilisation``.

    Returns:
        The plan; its ``settings`` hold what was taken from the recipe. Where rows are packed, ``global_batch_size`` is the
        number of samples that the recipe's rows hold. Of a ``freeze_config`` vision tower and language model count, an
        adapter as one on all linear layers of the text model.

    Raises:
        ValueError: If a value is not allowed, or ranks, rows and replicas do not go together.
    """
    gpu = GPUS[device] if isinstance(device, str) else device
    steps, distributed = recipe["step_scheduler"], recipe.get("distributed") or {}
    known, packed = measured or {}, _row_length(recipe)[1]
    shape = {**_shape(recipe, config), **known}
    sample = row_tokens(shape["prompt_tokens"], shape["response_tokens"], shape["block_size"])
    batch = steps["global_batch_size"] * (max(shape["max_length"] // sample, 1) if packed else 1)
    dtype = recipe.get("compute_dtype", "auto")
    values = {
        "model": str(recipe["model"].get("pretrained_model_name_or_path") or config.model_type),
        "gpus": world_size,
        "gpus_per_node": gpus_per_node,
        "gpu": device if isinstance(device, str) else PlanSettings.gpu,
        "dp_replicate_size": replicas_of(distributed, world_size, gpus_per_node),
        "packing": packed,
        "global_batch_size": batch,
        "local_batch_size": steps["local_batch_size"],
        "dtype": ("bfloat16" if gpu.bfloat16 else "float32") if dtype == "auto" else dtype,
        "activation_checkpointing": bool(distributed.get("activation_checkpointing")),
        "defer_fsdp_grad_sync": distributed.get("defer_fsdp_grad_sync", True),
        "dense_mask": recipe["model"].get("attn_implementation") == "sdpa",
    }
    if steps.get("max_steps"):
        values["samples"] = float(steps["max_steps"] * batch)
    return estimate(
        config,
        PlanSettings(**{**values, **shape}),
        gpu=gpu,
        trained=_trained(recipe, config),
        anchor=anchor,
        anchor_offloaded=bool(recipe.get("offload_anchor")),
    )


def _row_length(recipe: Mapping[str, Any]) -> tuple[int, bool]:
    """Tokens of the longest row, and whether samples share rows."""
    collator = (recipe.get("dataloader") or {}).get("collate_fn") or {}
    packed = PackingSettings.from_dict(recipe.get("packing")).max_length
    return packed or collator.get("max_length") or DEFAULT_MAX_LENGTH, packed is not None


def _shape(recipe: Mapping[str, Any], config: Qwen3VLConfig) -> dict[str, int]:
    """Block size, row length, and the sample that ``nemo-bard plan`` assumes, made shorter where it fits into no row."""
    longest, _ = _row_length(recipe)
    block_size = recipe["model"].get("block_size") or getattr(config, "block_size", None) or PlanSettings.block_size
    response = min(PlanSettings.response_tokens, max(longest // 4, 1))
    prompt = min(PlanSettings.prompt_tokens, longest - row_tokens(0, response, block_size))
    return {
        "block_size": block_size,
        "max_length": longest,
        "prompt_tokens": prompt,
        "image_tokens": min(PlanSettings.image_tokens, max(prompt, 0) * 3 // 4),
        "response_tokens": response,
    }


def _trained(recipe: Mapping[str, Any], config: Qwen3VLConfig) -> int:
    """Parameters that have a gradient."""
    parameters, frozen = count_parameters(config), recipe.get("freeze_config") or {}
    if recipe.get("peft"):
        text = text_section(config)
        h, inter, (q, kv) = text.hidden_size, text.intermediate_size, attention_widths(text)
        widths = 2 * (h + q) + 2 * (h + kv) + 3 * (h + inter)
        return recipe["peft"].get("dim", 8) * text.num_hidden_layers * widths
    trained = parameters.total
    if frozen.get("freeze_vision_tower"):
        trained -= parameters.vision
    if frozen.get("freeze_language_model"):
        trained -= parameters.layers
    return trained
