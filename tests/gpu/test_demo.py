"""The demo with two steps a stage, on a GPU: training, export, decoding and the report, as a user starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.gpu
def test_demo(tmp_path):
    command = [sys.executable, "-m", "nemo_bard.cli.demo", "--output", str(tmp_path / "demo"), "--small"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env={**os.environ}, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "capturing failed" not in done.stdout + done.stderr
    assert (tmp_path / "demo" / "report.html").is_file()
    logs = sorted((tmp_path / "demo").rglob("training.jsonl"))
    assert len(logs) >= 5
    for log in logs:
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        assert [line["step"] for line in lines] == [0, 1]
        assert all(line["loss"] > 0 for line in lines)
