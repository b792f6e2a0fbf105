"""Reads the golden data; a plain module, because parametrization needs it before fixtures exist."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

GOLDEN = Path(__file__).parents[1] / "golden"


def golden_cases(folder: str) -> list[dict[str, Any]]:
    """Settings of the cases of a folder."""
    return json.loads((GOLDEN / folder / "cases.json").read_text())


def golden_arrays(folder: str, file: str) -> dict[str, torch.Tensor]:
    """Arrays of one file."""
    with np.load(GOLDEN / folder / file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def case_name(case: dict[str, Any]) -> str:
    """Name of a case in test ids."""
    return case["file"].removesuffix(".npz")


def mixed_batch(*, image: int, header: list[int], end: int, padding: int) -> dict[str, torch.Tensor]:
    """Text, an image between texts, and earlier turns, padded on the left; the arguments are token ids."""
    arrays = golden_arrays("generate", "dynamic_b8_t0.5_image.npz")
    g = torch.Generator().manual_seed(0)

    def text(length: int) -> torch.Tensor:
        return torch.randint(image, (length,), generator=g)

    turns = torch.tensor([*text(9), *header, *text(13), end, *text(5), *header, *text(3), end, *text(4), *header])
    rows = [text(3), arrays["input_ids"][0], turns]
    width, pad = max(len(row) for row in rows), torch.nn.functional.pad
    return {
        "input_ids": torch.stack([pad(row, (width - len(row), 0), value=padding) for row in rows]),
        "attention_mask": torch.stack([pad(torch.ones_like(row), (width - len(row), 0)) for row in rows]),
        "pixel_values": arrays["pixel_values"],
        "image_grid_thw": arrays["image_grid_thw"],
    }
