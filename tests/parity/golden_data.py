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
