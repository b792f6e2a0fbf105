"""LoRA in a run: its adapters start alike on any number of ranks, and its checkpoints hold whole models too."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from nemo_bard.checkpoints.merge import CONFIG_OVERRIDES, merge
from nemo_bard.upstream import automodel

if TYPE_CHECKING:
    from nemo_bard.model.configuration import BardVLConfig


@torch.no_grad()
def draw_adapters(model: nn.Module, method: str, seed: int) -> None:
    """Draw the first weights of all adapters again, from the seed alone, in place.

    AutoModel 0.7.0 seeds every rank on its own, so that they would depend on how many ranks there are, and that replicas of
    the model would start, and stay, different.

    Args:
        model: With adapters, sharded or not; those of one rank.
        method: ``xavier`` (normal) or ``uniform`` (Kaiming), as ``peft.lora_A_init``.
        seed: Of the run.
    """
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if not hasattr(module, "init_lora_weights"):
            continue
        weight = cast("nn.Linear", module.lora_A).weight
        whole = torch.empty(weight.shape)
        if method == "xavier":
            nn.init.xavier_normal_(whole, generator=generator)
        else:
            nn.init.kaiming_uniform_(whole, a=math.sqrt(5), generator=generator)
        whole = whole.to(device=weight.device, dtype=weight.dtype)
        if isinstance(weight, DTensor):
            whole = distribute_tensor(whole, weight.device_mesh, weight.placements, src_data_rank=None)
        weight.copy_(whole)


def export_merged(recipe: Any, config: BardVLConfig, base: Path) -> None:
    """Write LoRA checkpoints merged into their base, where and when other runs write their Hugging Face folder.

    Args:
        recipe: A recipe that is set up; whatever it publishes from now on is merged first.
        config: The model's.
        base: Folder of the weights that the adapters are for.
    """
    lifecycle = recipe.checkpointer.lifecycle
    mode = str(recipe.checkpointer.config.save_consolidated.value)
    overrides = {key: getattr(config, key) for key in CONFIG_OVERRIDES}

    def merge_adapters(path: str) -> None:
        folder = Path(path) / "model"
        if mode == "every" or (mode == "final" and recipe.step_scheduler.is_last_step):
            lifecycle.run_coordinator_step(
                lambda: merge(folder, folder / "consolidated", base=base, overrides=overrides),
                description=f"merge the adapters in {folder}",
            )

    automodel.before_publication(recipe, merge_adapters)
