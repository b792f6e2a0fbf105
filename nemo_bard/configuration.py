"""Configuration of the model (``BardVLConfig``) and of decoding (``BardGenerationConfig``)."""

from __future__ import annotations

import difflib
from typing import Any

from transformers import GenerationConfig
from transformers.models.qwen3_vl.configuration_qwen3_vl import (
    Qwen3VLConfig,
    Qwen3VLTextConfig,
    Qwen3VLVisionConfig,
)

from nemo_bard.layout import check_block_size, check_context_attention

QWEN3_VL_VOCAB_SIZE = 151936
QWEN3_VL_MASK_TOKEN_ID = 151671
QWEN3_VL_EOS_TOKEN_ID = 151645
QWEN3_VL_ASSISTANT_HEADER_IDS = (151644, 77091, 198)


class BardVLConfig(Qwen3VLConfig):
    """Qwen3-VL's configuration plus what block diffusion needs; weights and sub-configs keep their names.

    The four fields below (and ``eos_token_id``) are the only home of these values: training and decoding read them from
    here. For a checkpoint with Qwen3-VL's vocabulary (151,936 rows) that lacks them, such as a released Bard-VL one,
    the token ids default to Qwen3-VL's: mask 151671, ``<|im_end|>`` 151645, ``<|im_start|>assistant\\n``.

    Raises:
        ValueError: If ``block_size`` < 1, ``context_attention`` is unknown, or ``mask_token_id`` lies outside the embedding.
    """

    model_type = "bard_vl"
    sub_configs = {"vision_config": Qwen3VLVisionConfig, "text_config": Qwen3VLTextConfig}

    block_size: int = 4
    """Tokens denoised together, ``B``."""
    mask_token_id: int | None = None
    """Id of ``[MASK]``: a row of the embedding that no text uses."""
    context_attention: str = "block"
    """How prefix and clean tokens attend: ``block`` or ``causal``."""
    assistant_header_ids: list[int] | None = None
    """Ids of the text that opens an assistant turn; where a response starts, blocks are counted anew."""
    eos_token_id: int | list[int] | None = None
    """Id that ends a turn, or a list of them."""

    def __post_init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        for name, own in (("vision_config", "qwen3_vl_vision"), ("text_config", "qwen3_vl_text")):
            sub = getattr(self, name)
            if isinstance(sub, dict) and str(sub.get("model_type", "")).startswith("bard_vl"):
                setattr(self, name, {**sub, "model_type": own})  # released checkpoints name their own sub-types
        super().__post_init__(**kwargs)
        check_block_size(self.block_size)
        check_context_attention(self.context_attention)
        vocab_size = self.text_config.vocab_size
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


def as_id_list(value: int | list[int] | None) -> list[int]:
    """Return a token id, a list of them or None as a list."""
    if value is None:
        return []
    return [int(value)] if isinstance(value, int) else [int(v) for v in value]


def check_mask_token_id(mask_token_id: int | None, vocab_size: int) -> None:
    """Raise ValueError unless ``mask_token_id`` is None or a row of the embedding."""
    if mask_token_id is not None and not 0 <= mask_token_id < vocab_size:
        raise ValueError(
            f"mask_token_id must be a row of the embedding, 0 to {vocab_size - 1}, got {mask_token_id}"
        )


def unknown_key_error(kind: str, name: str, known: list[str]) -> ValueError:
    """Return the error for a name that is not known, with the nearest known one."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ValueError(f"unknown {kind} {name!r}{hint} Known: {', '.join(sorted(known))}")


class BardGenerationConfig(GenerationConfig):
    """How ``BardVLForConditionalGeneration.generate`` decodes; saved as ``generation_config.json``.

    Placeholder docstring, completed in ``decode``.
    """
