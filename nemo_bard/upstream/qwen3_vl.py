"""transformers' Qwen3-VL language model, where what it calls by a private name is ours."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel


class TextModel(Qwen3VLTextModel):
    """Qwen3-VL's language model; ``visual_pos_masks`` may be the flat indices of the placeholders, ``[V]`` int64."""

    def _deepstack_process(self, hidden_states: Tensor, visual_pos_masks: Tensor, visual_embeds: Tensor) -> Tensor:
        if visual_pos_masks.dtype == torch.bool:
            return super()._deepstack_process(hidden_states, visual_pos_masks, visual_embeds)
        flat = hidden_states.flatten(0, 1)
        return flat.index_add(0, visual_pos_masks, visual_embeds.to(flat)).view_as(hidden_states)
