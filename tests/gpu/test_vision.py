"""The vision tower on a GPU: a CPU's numbers in float32, and no wait of the host."""

from __future__ import annotations

import pytest
import torch

IMAGES = ((16, 1), (36, 2), (6, 1))
"""Tokens and number of images of one call."""


def pictures(config) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels and grids of images of three sizes."""
    from _models import image_prompt

    prompts = [
        image_prompt(config, rows=number, prompt_tokens=tokens + 12, image_tokens=tokens, seed=tokens)
        for tokens, number in IMAGES
    ]
    return tuple(torch.cat([prompt[name] for prompt in prompts]) for name in ("pixel_values", "image_grid_thw"))


def features(model, pixels: torch.Tensor, grid: torch.Tensor) -> list[list[torch.Tensor]]:
    """Of each image: its features, and those added in the first layers."""
    with torch.no_grad():
        out = model.get_image_features(pixels, grid, return_dict=True)
    return [list(image) for image in zip(out.pooler_output, *out.deepstack_features, strict=True)]


@pytest.mark.parametrize("attention", ["bard", "sdpa"])
def test_features_are_those_of_a_cpu(attention, device, model_on):
    """All images in one call on the device against one call for each on a CPU."""
    model = model_on("tiny_untied", torch.device("cpu"))
    pixels, grid = pictures(model.config)
    parts = zip(pixels.split(grid.prod(-1).tolist()), grid.split(1), strict=True)
    model.set_attn_implementation("sdpa")
    expected = [image for part in parts for image in features(model, *part)]
    model = model_on("tiny_untied", device)
    model.set_attn_implementation(attention)
    found = features(model, pixels.to(device), grid)
    assert len(found) == len(expected) == len(grid)
    for ours, other in zip(found, expected, strict=True):
        for x, y in zip(ours, other, strict=True):
            torch.testing.assert_close(x.cpu(), y, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_host_does_not_wait(dtype, cuda, model_on):
    """Grids are on the host; PyTorch raises where the host would wait."""
    model = model_on("tiny_untied", cuda, dtype)
    model.set_attn_implementation("bard")
    pixels, grid = pictures(model.config)
    pixels = pixels.to(cuda, dtype)
    features(model, pixels, grid)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = features(model, pixels, grid)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(x.isfinite().all() for image in found for x in image)
