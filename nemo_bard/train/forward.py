"""The forward of a training step: from a weighed microbatch to its loss, straight from the LM head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from nemo_bard.method.chunked import chunked_loss
from nemo_bard.method.objectives import Objective
from nemo_bard.train.masks import make_mask

if TYPE_CHECKING:
    from nemo_bard.method.objectives import BatchLoss
    from nemo_bard.model.configuration import BardVLConfig


ON_HOST = ("image_grid_thw",)
"""What of a microbatch stays on the CPU, since the host would have to ask the device for it."""


def model_inputs(batch: Mapping[str, Any], config: BardVLConfig) -> dict[str, Any]:
    """Arguments of the forward of a model with this configuration.

    Args:
        batch: A weighed microbatch on the model's device, ``ON_HOST`` excepted, see ``Objective.weigh``.
        config: The model's; says how its context attends and which form its masks have.
    """
    return {
        "input_ids": batch["input_ids"],
        "attention_mask": make_mask(batch, config),
        "position_ids": batch["position_ids"],
        "pixel_values": batch["pixel_values"],
        "image_grid_thw": batch["image_grid_thw"].tolist(),  # FSDP moves tensors, and the host needs the grids
        "output_positions": batch["output_positions"],
        "use_cache": False,
    }


def batch_loss(
    model: nn.Module,
    config: BardVLConfig,
    objective: Objective,
    batch: Mapping[str, Any],
    *,
    chunk_tokens: int | None = None,
) -> tuple[Tensor, BatchLoss]:
    """Run the model on a weighed microbatch.

    Args:
        model: What is trained.
        config: Its configuration.
        objective: What it is trained for.
        batch: A weighed microbatch on the model's device.
        chunk_tokens: Tokens whose logits exist at once; None means what suits the device.

    Returns:
        The loss, a scalar that sums to the step's loss over microbatches and ranks, and what keeps the sums of its parts.
    """
    loss = objective.loss(batch)
    output_fn = partial(chunked_loss, loss=loss, chunk_tokens=chunk_tokens)
    return model(**model_inputs(batch, config), output_fn=output_fn), loss
