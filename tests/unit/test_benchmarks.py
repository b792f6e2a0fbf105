"""The benchmarks run on the tiny shape and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"

pytestmark = pytest.mark.slow


def run(script: str, *arguments: str) -> dict:
    output = Path(arguments[arguments.index("--output") + 1])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    # a process of its own: the benchmark forks, which must happen before OpenMP's threads exist
    command = [sys.executable, str(BENCHMARKS / script), "--shape", "tiny", "--device", "cpu", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(output.read_text())


def test_train_step(tmp_path):
    arguments = ("--dtype", "float32", "--prompt-tokens", "70", "--image-tokens", "16", "--lengths", "150", "171")
    facts = run(
        "train_step.py", *arguments, "--repeat", "1", "--packing", "2", "--output", str(tmp_path / "train.json")
    )
    rows = facts["rows"]
    assert [row["path"] for row in rows] == ["plain", "unpacked"] * 2 + ["unpacked", "packed"]
    for first, second in zip(rows[::2], rows[1::2], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=1e-4)
        assert second["supervised"] == first["supervised"] > 0
    assert rows[1]["positions"] < rows[0]["positions"]
    assert all(row["ms"] > 0 and row["peak_mib"] > 0 for row in rows)
    assert (tmp_path / "train.png").stat().st_size > 5000


def test_decode(tmp_path):
    arguments = ("--prompt-tokens", "24", "--image-tokens", "0", "--new-tokens", "16", "--settings", "8:2")
    facts = run("decode.py", *arguments, "--repeat", "1", "--output", str(tmp_path / "decode.json"))
    assert [row["path"] for row in facts["rows"]] == ["ar", "plain", "ours"]
    assert all(row["tokens_per_second"] > 0 for row in facts["rows"])
