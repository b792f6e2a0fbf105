"""The names under which transformers and NeMo AutoModel know our classes."""

from __future__ import annotations

MODEL_TYPE = "bard_vl"
CONFIG_CLASS = "BardVLConfig"
MODEL_CLASS = "BardVLForConditionalGeneration"
SOURCE_MODEL_TYPE = "qwen3_vl"
"""What ``convert`` makes a BARD checkpoint of."""
SOURCE_MODEL_CLASS = "Qwen3VLForConditionalGeneration"
MODEL_TYPES = (SOURCE_MODEL_TYPE, MODEL_TYPE)
"""What commands load."""
MASK_TOKEN = "<|mask|>"
"""How the tokenizer of a folder that ``convert`` wrote spells the mask token."""


def mask_in_prompt(mask_token_id: int) -> str:
    """What is wrong with a prompt that holds the mask token."""
    return (
        f"the prompt holds the mask token (id {mask_token_id}), which stands for what is still to be decoded; take it (in a"
        f" text {MASK_TOKEN}) out"
    )
