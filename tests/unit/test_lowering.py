"""What is compiled for GPUs is lowered for an H100 and compiled to its machine code, on a machine without one."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("pretend_h100.py")


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="this build of torch comes without Triton")
def test_kernels_of_decoding_and_flex_reach_machine_code(tmp_path):
    """Kernels of a denoising step are one or two launches each with no call between, flex is one fused kernel."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor"), "TRITON_CACHE_DIR": str(tmp_path / "triton")}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM), "decode", "flex"],
        env={**os.environ, **caches, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert {name: one["launches"] for name, one in found.items()} == {
        "norm": 1,
        "add_norm": 1,
        "gate": 1,
        "rotate": 2,
        "flex": 1,
    }
    for one in found.values():
        assert one["others"] == []
        assert len(one["sizes"]) == one["launches"]
        assert min(one["sizes"]) > 1000
