"""flex_attention on packed training rows against a dense mask, forward and backward, at the sizes of the benchmark.

``tests/unit/test_masks.py`` compares whole tiny models.
"""

from __future__ import annotations

import pytest
import torch


def rows_of(device: torch.device, *words: str) -> list[dict]:
    from attention import measure, parse_args

    args = parse_args(["--device", device.type, "--repeat", "1", *words])
    expected: dict[str, torch.Tensor] = {}
    return [measure(args, path, length, expected) for length in args.lengths for path in ("dense", "flex")]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_output_and_gradients_of_a_tiny_layer(dtype, device):
    small = ("--shape", "tiny", "--lengths", "384", "--sample-tokens", "180", "--prompt-tokens", "70", "--dtype", dtype)
    _, flex = rows_of(device, *small)
    assert flex["error"] <= {"float32": 5e-3, "bfloat16": 3e-2}[dtype]
    assert "failed" not in flex


@pytest.mark.gpu
def test_output_and_gradients_of_a_layer_of_4b(cuda, record_property):
    for dtype in ("bfloat16", "float32"):
        _, flex = rows_of(cuda, "--shape", "4b", "--lengths", "2048", "--dtype", dtype)
        record_property("measured", f"flex against dense, 4b, {dtype}: {flex['error']:.1e} of the largest value")
        assert "failed" not in flex
