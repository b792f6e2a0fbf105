"""What the GPU tests share. Where a test can, it runs on a CPU as well, in float32 and with the same code, to stay right."""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from nemo_bard import BardVLForConditionalGeneration

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))  # models with random weights, prompts, counted waits


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def cuda() -> torch.device:
    return torch.device("cuda")


@pytest.fixture
def model_on(golden_model) -> Callable[..., BardVLForConditionalGeneration]:
    """A tiny checkpoint of its own for each call, on a device: ``model_on(name, device, dtype)``."""

    def load(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> BardVLForConditionalGeneration:
        return copy.deepcopy(golden_model(name)).to(device, dtype)

    return load


@pytest.fixture(autouse=True)
def told(request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """On a GPU no test passes because decoding went on without graphs; other warnings of the package are told at the end."""
    yield
    if request.node.get_closest_marker("gpu") is not None:
        records = caplog.get_records("call")
        warned = [r.getMessage() for r in records if r.name.startswith("nemo_bard") and r.levelno >= logging.WARNING]
        assert not [line for line in warned if "capturing failed" in line]
        request.node.user_properties += [("measured", f"{request.node.name} warned: {line}") for line in warned]
