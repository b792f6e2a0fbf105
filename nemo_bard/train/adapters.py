"""LoRA in a run: its checkpoints hold whole models too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.checkpoints.merge import CONFIG_OVERRIDES, merge

if TYPE_CHECKING:
    from nemo_bard.model.configuration import BardVLConfig


def export_merged(checkpointer: Any, config: BardVLConfig, base: Path, is_last_step: Callable[[], bool]) -> None:
    """Write LoRA checkpoints merged into their base, where and when other runs write their Hugging Face folder.

    Args:
        checkpointer: AutoModel's; whatever it publishes from now on is merged first.
        config: The model's.
        base: Folder of the weights that the adapters are for.
        is_last_step: Whether the checkpoint that is being published is the run's last.
    """
    lifecycle, publish = checkpointer.lifecycle, checkpointer.lifecycle.publish
    mode = str(checkpointer.config.save_consolidated.value)
    overrides = {key: getattr(config, key) for key in CONFIG_OVERRIDES}

    def merge_and_publish(path: str, **kwargs: Any) -> None:
        folder = Path(path) / "model"
        if mode == "every" or (mode == "final" and is_last_step()):
            lifecycle.run_coordinator_step(
                lambda: merge(folder, folder / "consolidated", base=base, overrides=overrides),
                description=f"merge the adapters in {folder}",
            )
        publish(path, **kwargs)

    lifecycle.publish = merge_and_publish
