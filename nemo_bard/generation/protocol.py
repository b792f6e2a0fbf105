"""What decoding needs of a model; ``BardVLForConditionalGeneration`` has it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

if TYPE_CHECKING:
    from nemo_bard.generation.settings import BardGenerationConfig


class DecodableModel(Protocol):
    """A Qwen3-VL whose forward takes a dense bool mask and positions of the wanted logits."""

    config: Any
    """Its ``BardVLConfig``."""
    model: Any
    """Vision tower and language model, with ``get_rope_index``."""
    lm_head: Any
    decoding_attention: str
    """Name of the attention backend of decoding, as transformers knows it; it takes dense bool masks."""

    @property
    def generation_config(self) -> BardGenerationConfig:
        """Settings where a call gives none."""
        ...

    def __call__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        position_ids: Tensor,
        past_key_values: Any,
        output_positions: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits ``[K, V]`` at flat ``output_positions`` ``[K]`` of ``[N * L]``, ``[N, L, V]`` without them."""
        ...

    def get_input_embeddings(self) -> Any:
        """The embedding, a module with ``weight`` ``[V, H]``."""
        ...

    def get_image_features(self, pixel_values: Any, image_grid_thw: Any, **kwargs: Any) -> Any:
        """What the vision tower makes of images: tensors, patches and their grids ``[images, 3]``."""
        ...

    def get_video_features(self, pixel_values_videos: Any, video_grid_thw: Any, **kwargs: Any) -> Any:
        """What the vision tower makes of videos, likewise."""
        ...
