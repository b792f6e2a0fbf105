"""LoRA in a run: its checkpoints hold whole models too."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.checkpoints.merge import CONFIG_OVERRIDES, merge
from nemo_bard.upstream import automodel

if TYPE_CHECKING:
    from nemo_bard.model.configuration import BardVLConfig


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
