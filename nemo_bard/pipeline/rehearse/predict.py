"""What ``nemo-bard plan`` expects of a stage, for the rows that it has."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nemo_bard.cost.count import GIB, GPUS, Gpu, row_tokens
from nemo_bard.cost.estimate import Plan
from nemo_bard.pipeline.rehearse.rows import Rows, SampleShape
from nemo_bard.train.plan import plan_of_recipe


@dataclass(frozen=True)
class Machine:
    """What trains."""

    device: str
    """Name of the GPU as CUDA says it, or ``CPU``."""
    memory_gib: float
    ranks: int
    ranks_per_node: int


@dataclass(frozen=True)
class Prediction:
    """Of a real step; None where it cannot be told."""

    memory_gib: float | None = None
    step_seconds: float | None = None


def predict(
    recipe: Mapping[str, Any], start: Path, anchor: Path | None, *, rows: Rows | None, machine: Machine
) -> Prediction:
    """Memory of the longest rows, and time of a step of typical ones on a GPU that is known.

    Args:
        recipe: The stage's real recipe, environment variables filled in.
        start: Folder with the configuration of the model.
        anchor: Likewise of the anchor.
        rows: What is known of the stage's rows; None for what ``plan`` assumes.
        machine: What trains.
    """
    from transformers import AutoConfig

    if rows is not None and (rows.longest_sample is None or rows.typical_sample is None):
        return Prediction()
    config: Any = AutoConfig.from_pretrained(start)
    other: Any = None if anchor is None else AutoConfig.from_pretrained(anchor)
    if config.model_type not in ("bard_vl", "qwen3_vl"):
        return Prediction()
    known = next((GPUS[key] for key in GPUS if key in machine.device.lower()), None)
    peak = Gpu(gib=0, bfloat16=1.0, float32=1.0, node_bandwidth=1.0, network_bandwidth=1.0)
    if machine.device == "CPU" and recipe.get("compute_dtype", "auto") == "auto":
        recipe = {**recipe, "compute_dtype": "float32"}

    def plan(sample: SampleShape | None, row: int = 0) -> Plan:
        shape = {}
        if sample is not None:
            block = recipe["model"].get("block_size") or config.block_size
            own = row_tokens(sample.prompt_tokens, sample.response_tokens, block)
            shape = {**asdict(sample), "max_length": max(row, own)}
        return plan_of_recipe(
            recipe,
            config=config,
            anchor=other,
            world_size=machine.ranks,
            gpus_per_node=machine.ranks_per_node,
            device=replace(known or peak, gib=machine.memory_gib),
            measured=shape,
        )

    if rows is None:
        return Prediction(step_seconds=plan(None).seconds_per_step if known else None)
    longest = plan(rows.longest_sample, rows.longest or 0)
    packed = (recipe.get("packing") or {}).get("max_length")
    typical = plan(rows.typical_sample, packed or 0)
    return Prediction(longest.memory_total / GIB, typical.seconds_per_step if known else None)
