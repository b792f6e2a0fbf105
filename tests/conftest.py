"""Shared fixtures: the golden data's folder and tiny checkpoints."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from nemo_bard import BardVLForConditionalGeneration

torch.set_num_threads(1)

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    return GOLDEN


@pytest.fixture(scope="session")
def golden_model() -> Callable[..., BardVLForConditionalGeneration]:
    """Loads a tiny checkpoint, with configuration overrides, once; tests must leave it as they found it."""
    from nemo_bard import BardVLForConditionalGeneration

    loaded: dict[str, BardVLForConditionalGeneration] = {}

    def load(name: str, **overrides: object) -> BardVLForConditionalGeneration:
        key = f"{name} {sorted(overrides.items())}"
        if key not in loaded:
            folder = GOLDEN / "models" / name
            loaded[key] = BardVLForConditionalGeneration.from_pretrained(folder, **overrides).eval()
        return loaded[key]

    return load
