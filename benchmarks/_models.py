"""Models with random weights, prompts of random ids and pixels, and the arguments that choose them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nemo_bard import BardVLConfig, BardVLForConditionalGeneration
from nemo_bard.cost.shapes import SHAPES, make_config
from nemo_bard.train.forward import ON_HOST


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that all benchmarks have: shape, device, dtype, repetitions, threads, seed, result file."""
    on_gpu = torch.cuda.is_available()
    parser.add_argument(
        "--shape", choices=SHAPES, default="4b" if on_gpu else "cpu", help="random weights of this shape"
    )
    parser.add_argument("--repeat", type=int, default=3, help="measurements of a row; the median counts")
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16" if on_gpu else "float32")
    parser.add_argument("--threads", type=int, help="CPU threads")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="result file (JSON); by default one in benchmarks/results")


def bard_config(shape: str, block_size: int, **fields: Any) -> BardVLConfig:
    """Configuration of a shape with random weights; token ids move inside a small vocabulary."""
    source = make_config(shape)
    size = source.text_config.vocab_size
    known = {k: v for k, v in source.to_dict().items() if k not in ("model_type", "architectures")}
    if source.image_token_id >= size:
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        known.update({name: size - 8 + i for i, name in enumerate(names)})
    ids = {"mask_token_id": size - 1, "eos_token_id": size - 2, "assistant_header_ids": [1]}
    return BardVLConfig(**{**known, **ids, **fields}, block_size=block_size)


def random_model(
    config: BardVLConfig, *, device: torch.device, dtype: torch.dtype, seed: int
) -> BardVLForConditionalGeneration:
    """A model whose weights depend on the seed alone, made where it runs."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            return BardVLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)


def image_prompt(config: Any, *, rows: int, prompt_tokens: int, image_tokens: int, seed: int) -> dict[str, Tensor]:
    """Random prompts of ``prompt_tokens`` tokens, ``image_tokens`` of them one image each (0 for none).

    Args:
        config: A Qwen3-VL or BARD configuration.
        rows: Batch size.
        prompt_tokens: Tokens per row.
        image_tokens: Image tokens per row; the image is as square as its number of tokens allows.
        seed: Seed of ids and pixels.
    """
    generator = torch.Generator().manual_seed(seed)
    low_ids = min(config.image_token_id, config.text_config.vocab_size) - 100
    ids = torch.randint(10, max(low_ids, 11), (rows, prompt_tokens), generator=generator)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if image_tokens:
        merge, patch = config.vision_config.spatial_merge_size, config.vision_config.patch_size
        height = max(h for h in range(1, int(image_tokens**0.5) + 1) if image_tokens % h == 0)
        grid = torch.tensor([[1, height * merge, image_tokens // height * merge]] * rows)
        start = 8
        ids[:, start - 1] = config.vision_start_token_id
        ids[:, start : start + image_tokens] = config.image_token_id
        ids[:, start + image_tokens] = config.vision_end_token_id
        width = config.vision_config.in_channels * config.vision_config.temporal_patch_size * patch * patch
        batch["pixel_values"] = torch.randn(int(grid.prod(-1).sum()), width, generator=generator)
        batch["image_grid_thw"] = grid
    return batch


def on_device(batch: dict[str, Any], device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """A batch with its tensors on the device, pixels in the model's dtype; what the host reads stays there."""
    return {
        key: value.to(device, dtype if key == "pixel_values" else None)
        if torch.is_tensor(value) and key not in ON_HOST
        else value
        for key, value in batch.items()
    }
