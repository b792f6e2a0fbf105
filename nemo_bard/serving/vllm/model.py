"""The model: vLLM's Qwen3-VL, decoded by ``state`` and ``sampler``."""

from __future__ import annotations

from vllm.model_executor.models.qwen3_vl import (
    Qwen3VLDummyInputsBuilder,
    Qwen3VLForConditionalGeneration,
    Qwen3VLMultiModalProcessor,
    Qwen3VLProcessingInfo,
)
from vllm.multimodal import MULTIMODAL_REGISTRY


@MULTIMODAL_REGISTRY.register_processor(
    Qwen3VLMultiModalProcessor, info=Qwen3VLProcessingInfo, dummy_inputs=Qwen3VLDummyInputsBuilder
)
class BardVLForConditionalGeneration(Qwen3VLForConditionalGeneration):
    """Weights, vision and language model are Qwen3-VL's."""

    @staticmethod
    def get_model_state_cls() -> type:
        """What vLLM's runner asks a model for."""
        from nemo_bard.serving.vllm.state import BardModelState

        return BardModelState
