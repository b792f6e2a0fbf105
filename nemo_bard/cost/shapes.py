"""Model shapes: the released Qwen3-VL sizes, a tiny one, and one with Qwen3-VL's vocabulary that a CPU can measure.

The numbers are those of the published ``config.json`` files of Qwen3-VL 2B, 4B, 8B and 32B (all dense).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig

_TOKEN_IDS = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
}
_VISION_SMALL = {
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "deepstack_visual_indexes": [5, 11, 17],
}
_VISION_LARGE = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "deepstack_visual_indexes": [8, 16, 24],
}
_TINY_INIT = 0.1  # about 1 / sqrt(hidden_size); from 0.02 the tiny model learns several times more slowly
_SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "text": {
            "vocab_size": 512,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "max_position_embeddings": 4096,
            "initializer_range": _TINY_INIT,
        },
        "vision": {
            "depth": 2,
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_heads": 4,
            "deepstack_visual_indexes": [0],
            "num_position_embeddings": 256,
            "initializer_range": _TINY_INIT,
        },
        "mrope_section": [8, 4, 4],
        "tie": True,
    },
    "cpu": {
        "text": {
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
            "max_position_embeddings": 32768,
        },
        "vision": {
            "depth": 4,
            "hidden_size": 256,
            "intermediate_size": 1024,
            "num_heads": 4,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        "mrope_section": [12, 10, 10],
        "tie": False,
    },
    "2b": {
        "text": {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
        "vision": _VISION_SMALL,
        "tie": True,
    },
    "4b": {
        "text": {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "vision": _VISION_SMALL,
        "tie": True,
    },
    "8b": {
        "text": {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "vision": _VISION_LARGE,
        "tie": False,
    },
    "32b": {
        "text": {
            "hidden_size": 5120,
            "intermediate_size": 25600,
            "num_hidden_layers": 64,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
        },
        "vision": _VISION_LARGE,
        "tie": False,
    },
}

SHAPES: tuple[str, ...] = tuple(_SHAPES)
"""Names that ``make_config`` knows."""


def make_config(
    name: str, *, text: dict[str, Any] | None = None, vision: dict[str, Any] | None = None, **top: object
) -> Qwen3VLConfig:
    """Build the configuration of a shape.

    Args:
        name: One of ``SHAPES``.
        text: Fields of the text configuration to replace, for example ``num_hidden_layers``.
        vision: Fields of the vision configuration to replace.
        top: Fields of the configuration itself to replace, for example ``image_token_id`` or ``tie_word_embeddings``.

    Returns:
        A new configuration; ``vision_config.out_hidden_size`` is the text's hidden size.

    Raises:
        ValueError: If ``name`` is unknown, or head size and M-RoPE sections do not fit.
    """
    from transformers import Qwen3VLConfig

    if name not in _SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {name!r}")
    shape = _SHAPES[name]
    text_fields: dict[str, Any] = {
        "vocab_size": 151936,
        "head_dim": 128,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "rope_theta": 5_000_000,
        **shape["text"],
        **(text or {}),
    }
    sections = text_fields.pop("mrope_section", shape.get("mrope_section", [24, 20, 20]))
    if 2 * sum(sections) != text_fields["head_dim"]:
        raise ValueError(f"mrope_section {sections} must add up to head_dim / 2 = {text_fields['head_dim'] / 2:g}")
    text_fields.setdefault(
        "rope_scaling", {"rope_type": "default", "mrope_section": list(sections), "mrope_interleaved": True}
    )
    vision_fields: dict[str, Any] = {
        "patch_size": 16,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 2304,
        "out_hidden_size": text_fields["hidden_size"],
        **shape["vision"],
        **(vision or {}),
    }
    return Qwen3VLConfig(
        text_config=text_fields,
        vision_config=vision_fields,
        **{**_TOKEN_IDS, "tie_word_embeddings": shape["tie"], **top},
    )
