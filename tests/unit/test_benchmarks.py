"""The benchmarks run on the tiny shape and write what they promise, whatever fails in them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"


def start(script: str, *arguments: str) -> None:
    """Run a benchmark in a process of its own: some fork, which must happen before OpenMP's threads exist."""
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    command = [sys.executable, str(BENCHMARKS / script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("smoke")
    start("gpu.py", "--smoke", "--output", str(folder))
    return folder, json.loads((folder / "gpu_cpu_smoke.json").read_text())


@pytest.mark.slow
class TestSmoke:
    """``gpu.py --smoke``: every section on a CPU."""

    def rows(self, smoke, name: str) -> list[dict]:
        section = next(section for section in smoke[1]["sections"] if section["name"] == name)
        assert "failed" not in section
        return section["rows"]

    def test_decode(self, smoke):
        rows = self.rows(smoke, "decode_4b")
        assert [row["path"] for row in rows] == ["ar", "ar_graph", "plain", "ours"]
        for row in rows:
            assert row["tokens_per_second"] > 0
            assert row["ms_per_step"] > row["floor_ms"] > 0
        # the tokens of the second row against those of the first, and of the fourth against the third
        assert rows[1]["agreement"] == rows[3]["agreement"] == 1
        assert rows[2]["tpf"] == rows[3]["tpf"] == 4
        assert rows[2]["times_plain"] == 1
        assert rows[3]["times_ar"] == pytest.approx(3 * rows[3]["tpf"] / rows[3]["tpf_for_3x_ar"])

    def test_training(self, smoke):
        rows = self.rows(smoke, "train_4b")
        pairs, packing, packed_rows = rows[:4], rows[4:6], rows[6:]
        assert [row["path"] for row in pairs] == ["plain", "unpacked"] * 2
        assert [row["path"] for row in packing] == ["unpacked", "packed"]
        assert [row["path"] for row in packed_rows] == ["plain", "unpacked", "packed"]
        for same in (pairs[:2], pairs[2:], packing, packed_rows):
            for row in same:
                assert row["loss"] == pytest.approx(same[0]["loss"], rel=1e-4)
                assert row["supervised"] == same[0]["supervised"] > 0
                assert min(row["ms"], row["peak_mib"], row["predicted_mib"]) > 0
        assert pairs[1]["positions"] < pairs[0]["positions"]
        packed = packed_rows[2]
        assert packed["positions"] == packed["length"] == 400
        assert packed["samples"] == 2
        assert packed_rows[1]["real_tokens"] == packed["real_tokens"] > 0.9 * 400

    def test_attention(self, smoke):
        rows = self.rows(smoke, "attention")
        assert [row["path"] for row in rows] == ["dense", "flex", "causal"] * 2
        assert rows[3]["pairs"] < rows[0]["pairs"] < 0.5 < rows[2]["pairs"]
        assert all(row["error"] < 1e-5 for row in rows[1::3])

    def test_the_rest(self, smoke):
        assert [row["patches"] for row in self.rows(smoke, "vision")] == [64, 288]
        copy, product = self.rows(smoke, "ceilings")
        assert copy["gb_s"] > 0
        assert product["tflops"] > 0
        tests = self.rows(smoke, "tests")
        assert tests
        assert {row["outcome"] for row in tests} == {"skipped"}

    def test_tables(self, smoke):
        folder, facts = smoke
        text = (folder / "gpu_cpu_smoke.md").read_text()
        assert "these figures mean nothing" in text
        assert facts["device"] in text
        assert all(facts["versions"][name] in text for name in ("torch", "transformers", "triton", "nemo-automodel"))
        assert "| ours | 1 | 8 | 2 | 4.00 |" in text
        assert (folder / "gpu_cpu_smoke.png").stat().st_size > 5000


@pytest.fixture
def modules(monkeypatch):
    """``gpu.py`` and ``_summary.py``, which import torch alone."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import _summary
    import gpu

    return gpu, _summary


SCRIPT = """
import json, sys, time
rows = [{"path": "ours", "block_size": 32, "batch": 1, "ms_per_step": 2.5, "floor_ms": 2.0, "times_ar": 2.0}]
rows[0]["decode_tokens_per_second"] = 1000.0
facts = {"device": "NVIDIA H900", "device_gib": 1.0, "driver": "1", "cuda": "2", "python": "3", "versions": {"torch": "9"}}
open(sys.argv[-1], "w").write(json.dumps({**facts, "columns": {"path": "path|s", "ms_per_step": "ms/step|.2f"}, "warnings": ["slow"], "rows": rows}))
"""


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("time.sleep(60)", "stopped after 2 s; what it had measured is kept"),
        ("print('x'); raise SystemExit('error: no room')", "error: no room"),
        ("import os; os.kill(os.getpid(), 9)", "ended by signal 9"),
    ],
)
def test_a_section_that_ends_badly_keeps_its_rows_and_says_why(end, reason, modules, tmp_path):
    gpu, summary = modules
    script = tmp_path / "bad.py"
    script.write_text(SCRIPT + end)
    section = gpu.Section(name="decode_4b", seconds=2, command=(str(script),))
    begin = time.monotonic()
    row = gpu.run(section, tmp_path, smoke=False, seconds=2)
    assert time.monotonic() - begin < 10
    assert row["failed"] == reason
    assert row["rows"][0]["ms_per_step"] == 2.5
    never = {"name": "train_4b", "seconds": 0.0, "rows": [], "facts": {}, "failed": "the time was up"}
    facts = {"smoke": False, "command": "c", "commit": None, "notes": ["torch 9, tried with torch 8"], "minutes": 1.0}
    data, text, *_ = summary.write_summary(tmp_path / "out", facts, [row, never])
    assert data.name == "gpu_nvidia_h900.json"
    markdown = text.read_text()
    assert f"**Failed**: {reason}" in markdown
    assert "**Failed**: the time was up" in markdown
    assert "| ours | 2.50 |\n\n- warned: slow" in markdown
    aims = json.loads(data.read_text())["aims"]
    assert [aim["met"] for aim in aims] == ["yes", "not measured", "no", "not measured", "not measured"]


def test_a_section_that_prints_nothing_or_writes_nothing(modules, tmp_path):
    gpu, _ = modules
    script = tmp_path / "bad.py"
    script.write_text("raise SystemExit(3)")
    row = gpu.run(gpu.Section(name="x", seconds=9, command=(str(script),)), tmp_path, smoke=False, seconds=9)
    assert row["failed"] == "it printed nothing"
    assert row["rows"] == []


def test_output_of_pytest(modules):
    gpu, _ = modules
    found = gpu.read_tests(
        "tests/gpu/test_a.py::test_x[cuda-a b] PASSED    [ 10%]\n"
        "tests/gpu/test_a.py::test_y[cuda] FAILED    [ 20%]\n"
        "tests/gpu/test_a.py::test_z ERROR\n"
        "tests/unit/test_b.py::test_w SKIPPED (needs a CUDA device)\n"
        "measured: bf16: 0.9\n"
        "FAILED tests/gpu/test_a.py::test_y[cuda] - AssertionError: 1 != 2\n"
    )
    assert [(row["outcome"], row.get("failed")) for row in found["rows"]] == [
        ("passed", None),
        ("failed", "AssertionError: 1 != 2"),
        ("error", "no reason was told"),
        ("skipped", None),
    ]
    assert found["facts"] == {"measured": ["bf16: 0.9"]}


def test_arguments(modules, capsys):
    gpu, _ = modules
    assert gpu.parse_args(["--only", "vision,tests"]).only == ["vision", "tests"]
    with pytest.raises(SystemExit):
        gpu.parse_args(["--only", "trian"])
    assert "--only takes ceilings, decode_4b" in capsys.readouterr().err
    assert sum(section.seconds for section in gpu.SECTIONS) < 15 * 60
    assert gpu.SECTIONS[-1].name == "tests"


@pytest.mark.slow
def test_data(tmp_path):
    """``data.py``: a mixture is planned, workers feed and do not grow."""
    sizes = ("--draws", "30000", "--samples", "4", "--side", "128", "--read", "2000", "--workers", "0", "2")
    start("data.py", *sizes, "--scratch", str(tmp_path), "--output", str(tmp_path / "data.json"))
    rows = json.loads((tmp_path / "data.json").read_text())["rows"]
    assert [row["section"] for row in rows] == ["ready", "workers", "workers", "memory", "memory"]
    assert rows[0]["ready_s"] > 0
    assert rows[0]["rows"] > 1000
    assert all(row["samples_per_second"] > 0 for row in rows[1:3])
    assert rows[4]["grown_mib"] < 50
    assert {path.name for path in tmp_path.iterdir()} == {"data.json"}, "what was made is gone"
