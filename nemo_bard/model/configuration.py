"""Configuration of the model: ``BardVLConfig``."""

from __future__ import annotations

from typing import Any

from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)
from transformers.utils.versions import require_version

from nemo_bard.generation.settings import as_id_list, check_mask_token_id
from nemo_bard.method.layout import check_block_size, check_context_attention
from nemo_bard.upstream.transformers import text_section

require_version(
    "transformers>=5.18", "The code of BARD's model calls what older versions lack."
)  # code in folders, too

QWEN3_VL_VOCAB_SIZE = 151936
QWEN3_VL_MASK_TOKEN_ID = 151671
QWEN3_VL_EOS_TOKEN_ID = 151645
QWEN3_VL_ASSISTANT_HEADER_IDS = (151644, 77091, 198)


class BardVLConfig(Qwen3VLConfig):
    r"""Qwen3-VL's configuration plus what block diffusion needs; weights and sub-configs keep their names.

    The four fields below (and ``eos_token_id``) are the only home of these values: training and decoding read them from
    here. For a checkpoint with Qwen3-VL's vocabulary (151,936 rows) that lacks them, such as a released Bard-VL one,
    the token ids default to Qwen3-VL's: mask 151671, ``<|im_end|>`` 151645, ``<|im_start|>assistant\n``.

    Raises:
        ValueError: If ``block_size`` < 1, ``context_attention`` is unknown, or ``mask_token_id`` lies outside the embedding.
    """

    model_type = "bard_vl"
    sub_configs = {"vision_config": Qwen3VLVisionConfig, "text_config": Qwen3VLTextConfig}

    block_size: int | None = None
    """Tokens denoised together, ``B``; None where a checkpoint does not say."""
    mask_token_id: int | None = None
    """Id of ``[MASK]``: a row of the embedding that no text uses."""
    context_attention: str = "block"
    """How prefix and clean tokens attend: ``block`` or ``causal``."""
    assistant_header_ids: list[int] | None = None
    """Ids of the text that opens an assistant turn; where a response starts, blocks are counted anew."""
    eos_token_id: int | list[int] | None = None
    """Id that ends a turn, or a list of them."""

    @staticmethod
    def flops_formula(
        config: BardVLConfig,
        gbs: int = 1,
        seq_len: int = 1024,
        *,
        prompt_tokens: int = 0,
        image_tokens: int = 0,
        supervised: float = 0.5,
    ) -> float:
        """FLOPs of forward and backward; what AutoModel's ``AutoMFU`` asks a configuration for.

        Args:
            config: The model's configuration, with its ``block_size``.
            gbs: Rows.
            seq_len: Tokens of a training row ``[prompt | clean | noisy]``, as ``input_ids`` has them.
            prompt_tokens: Tokens before the response, images included.
            image_tokens: Tokens of one image among them; 0 for none.
            supervised: Part of the noisy tokens that is supervised, 0.5 for levels uniform in (0, 1].

        Raises:
            ValueError: If the configuration has no block size, or no response fits.
        """
        from nemo_bard.cost.count import training_flops

        if config.block_size is None:
            raise ValueError("flops_formula needs a configuration with block_size")
        response = (seq_len - prompt_tokens + config.block_size) // 2
        if not 0 <= image_tokens <= prompt_tokens or seq_len <= prompt_tokens:
            raise ValueError(
                f"flops_formula: 0 <= image_tokens <= prompt_tokens < seq_len must hold, got {image_tokens},"
                f" {prompt_tokens}, {seq_len}"
            )
        counted = training_flops(
            config,
            [(prompt_tokens, response)],
            block_size=config.block_size,
            image_tokens=image_tokens,
            supervised=supervised * response,
        )
        return gbs * counted.model

    def __post_init__(self, **kwargs: Any) -> None:
        for name, own in (("vision_config", "qwen3_vl_vision"), ("text_config", "qwen3_vl_text")):
            sub = getattr(self, name)
            if isinstance(sub, dict) and str(sub.get("model_type", "")).startswith("bard_vl"):
                setattr(self, name, {**sub, "model_type": own})  # released checkpoints name their own sub-types
        super().__post_init__(**kwargs)
        if self.block_size is not None:
            check_block_size(self.block_size)
        check_context_attention(self.context_attention)
        vocab_size = text_section(self).vocab_size
        if vocab_size == QWEN3_VL_VOCAB_SIZE:
            if self.mask_token_id is None:
                self.mask_token_id = QWEN3_VL_MASK_TOKEN_ID
            if self.eos_token_id is None:
                self.eos_token_id = QWEN3_VL_EOS_TOKEN_ID
            if self.assistant_header_ids is None:
                self.assistant_header_ids = list(QWEN3_VL_ASSISTANT_HEADER_IDS)
        check_mask_token_id(self.mask_token_id, vocab_size)

    @property
    def end_ids(self) -> list[int]:
        """``eos_token_id`` as a list, empty if unset."""
        return as_id_list(self.eos_token_id)
