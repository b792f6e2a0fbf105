"""What we touch of transformers' models and configurations. Nothing is imported here before it is used."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from nemo_bard.upstream.torch import become
from nemo_bard.upstream.touched import Touched

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel, Qwen3VLConfig
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

_QWEN = "transformers.models.qwen3_vl.modeling_qwen3_vl"

_read = partial(Touched, version="transformers 5.18.0")
TOUCHED = (
    _read(
        "transformers.PreTrainedConfig._attn_implementation",
        reason="says which attention backend a model was loaded with",
        until="transformers has a public reader for it",
    ),
    _read(
        "transformers.PreTrainedConfig._attn_implementation_internal",
        reason="set in a copy of the configuration, so that decoding uses the backend `bard` whatever the model was loaded with",
        until="a forward takes its backend as an argument",
    ),
    _read(
        f"{_QWEN}.Qwen3VLModel.get_rope_index",
        reason="M-RoPE positions of a training row, computed where there is no model",
        until="transformers has it as a function of the configuration",
        parameters="self, input_ids, mm_token_type_ids, image_grid_thw, video_grid_thw, attention_mask, **kwargs",
        source="self.config.vision_config.spatial_merge_size",
    ),
    _read(
        f"{_QWEN}.Qwen3VLTextModel._deepstack_process",
        reason="overridden: takes indices, since a mask makes the host wait for the number of its elements",
        until="transformers adds visual features without a boolean index",
        parameters="self, hidden_states, visual_pos_masks, visual_embeds",
        source="local_this = hidden_states[visual_pos_masks, :] + visual_embeds",
    ),
    _read(
        f"{_QWEN}.Qwen3VLModel.forward",
        reason="overridden: features go to their placeholders by index, not through a mask",
        until="as _deepstack_process",
        parameters="self, input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, pixel_values,"
        " pixel_values_videos, image_grid_thw, video_grid_thw, mm_token_type_ids, mm_encoder_outputs, **kwargs",
    ),
    _read(
        f"{_QWEN}.Qwen3VLVisionModel.forward",
        reason="given what it would compute from the grids, and sequences for the attention of its blocks",
        until="transformers computes them where the grids are, and has an attention backend on torch's varlen kernel",
        parameters="self, hidden_states, grid_thw, **kwargs",
        source="get_vision_attention_seqlens(grid_thw, self.config, kwargs=kwargs)",
    ),
    _read(
        f"{_QWEN}.Qwen3VLVisionAttention.forward",
        reason="hands keyword arguments on to its backend, which gets the sequences that way",
        until="as Qwen3VLVisionModel.forward",
        source="torch.split(tensor, lengths.tolist(), dim=2)",
    ),
    _read(
        "transformers.utils.output_capturing._CAN_RECORD_REGISTRY",
        reason="a model that becomes one of our classes goes on to give hidden states when asked",
        until="transformers looks for what a model can record in the classes that it derives from",
    ),
    _read(
        f"{_QWEN}.Qwen3VLTextRMSNorm.forward",
        reason="replaced in training by one that keeps less for the backward pass",
        until="transformers keeps no more than that itself",
        parameters="self, hidden_states",
        source="return self.weight * hidden_states.to(input_dtype)",
    ),
    _read(
        f"{_QWEN}.Qwen3VLTextRMSNorm.variance_epsilon",
        reason="a setting of the norm that is replaced",
        until="as its forward",
    ),
    _read(
        f"{_QWEN}.Qwen3VLTextMLP.forward",
        reason="replaced in training by one that keeps less for the backward pass",
        until="transformers keeps no more than that itself",
        parameters="self, x",
        source="self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))",
    ),
)
"""What this room and ``model`` touch of transformers; ``docs/decisions.md`` says why there is a room for it."""


def text_section(config: Qwen3VLConfig) -> Qwen3VLTextConfig:
    """``text_config``, which transformers declares as a configuration, a dictionary or None."""
    return cast("Qwen3VLTextConfig", config.text_config)


def vision_section(config: Qwen3VLConfig) -> Qwen3VLVisionConfig:
    """``vision_config``, which transformers declares as a configuration, a dictionary or None."""
    return cast("Qwen3VLVisionConfig", config.vision_config)


def attn_implementation(config: PreTrainedConfig) -> str | None:
    """The name of the attention backend that a model with this configuration uses."""
    return config._attn_implementation


def become_model(model: PreTrainedModel, kind: type[PreTrainedModel]) -> None:
    """Give a model that is built the methods of a subclass of its class; it can still give hidden states."""
    from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

    become(model, kind)
    _CAN_RECORD_REGISTRY[str(kind)] = kind._can_record_outputs


def rope_index(config: PreTrainedConfig) -> Callable[..., tuple[Tensor, Tensor]]:
    """Qwen3-VL's ``get_rope_index``, which computes M-RoPE positions, without the weights of the model that it belongs to."""
    from torch import nn
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    model: Any = Qwen3VLModel.__new__(Qwen3VLModel)
    nn.Module.__init__(model)
    model.config = config
    return model.get_rope_index
