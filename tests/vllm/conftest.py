"""Where vLLM is, and what it serves: ``VLLM_PYTHON``, a Python with vLLM, and ``VLLM_RUN``, a run folder with trained stages."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STAGES = {8: "pbm_b8", 32: "pbm_b32"}
LIMIT_S = 600


def process_environment(folder):
    """Environment of a process with vLLM on a CPU: this checkout, the shims, and an entry point where none is installed."""
    info = folder / "nemo_bard-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nemo-bard\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbard_vl = nemo_bard.serving.vllm:register\n")
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE / "cpu_shims", folder))),
        "TRITON_INTERPRET": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "WARNING",
    }


@pytest.fixture(scope="session")
def vllm_python():
    """A Python that has vLLM."""
    python = os.environ.get("VLLM_PYTHON", "")
    if not python or not Path(python).exists():
        pytest.skip("no environment with vLLM: VLLM_PYTHON names its Python (make test-vllm sets one up)")
    return python


@pytest.fixture(scope="session")
def run_vllm(vllm_python, tmp_path_factory):
    """Runs a script of this folder, or with ``-c`` a text, where vLLM is; returns the finished process."""
    environment = process_environment(tmp_path_factory.mktemp("entry_point"))

    def run(*arguments, check=True):
        done = subprocess.run(
            [vllm_python, *map(str, arguments)],
            env=environment,
            cwd=HERE,
            capture_output=True,
            text=True,
            timeout=LIMIT_S,
        )
        if check and done.returncode:
            pytest.fail(f"{arguments} ended with {done.returncode}:\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}")
        return done

    return run


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """``(block size, causal) -> file``: what ``generate`` answers; made once for each."""
    made = {}

    def make(block_size, causal=False):
        if (block_size, causal) not in made:
            run = Path(os.environ.get("VLLM_RUN") or "/nowhere")
            checkpoint = run / STAGES[block_size] / "export"
            if not checkpoint.is_dir():
                pytest.skip(f"no trained checkpoint: VLLM_RUN names a run folder with {STAGES[block_size]}/export")
            out = tmp_path_factory.mktemp(f"reference_b{block_size}{'_causal' * causal}")
            script = [sys.executable, HERE / "make_reference.py", checkpoint, out, *["--causal"] * causal]
            subprocess.run(script, check=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": str(ROOT)})
            made[block_size, causal] = out / "reference.json"
        return made[block_size, causal]

    return make


@pytest.fixture(scope="session")
def drive(run_vllm, tmp_path_factory):
    """Asks the cases of a reference; returns ``(cases, answers)`` per round, and vLLM's counters."""

    def ask(file, **arguments):
        out = tmp_path_factory.mktemp("answers") / "answers.json"
        run_vllm(HERE / "drive.py", file, out, *(f"{name}={json.dumps(value)}" for name, value in arguments.items()))
        cases, found = json.loads(file.read_text())["cases"], json.loads(out.read_text())
        rounds = [
            ([case for case in cases if names is None or case["name"] in names], answers)
            for names, answers in zip(found["rounds"], found["answers"], strict=True)
        ]
        return rounds, found["metrics"]

    return ask
