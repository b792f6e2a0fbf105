"""Fixtures of the tests that compare vLLM with ``generate``; where vLLM is and what it serves is ``served``'s."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import served

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT_S = 600


def process_environment(folder):
    """Environment of a process with vLLM: this checkout's, with an entry point of its own where it is not installed."""
    info = folder / "nemo_bard-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: nemo-bard\nVersion: 0\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\nbard_vl = nemo_bard.serving.vllm:register\n")
    given = served.environment()
    path = os.pathsep.join([given["PYTHONPATH"], str(folder)])
    return {**given, "PYTHONPATH": path, "VLLM_LOGGING_LEVEL": "WARNING"}


@pytest.fixture(scope="session")
def vllm_python():
    """A Python that has vLLM."""
    return served.vllm_python()


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A run folder with trained stages."""
    served.vllm_python()
    return served.trained_run(tmp_path_factory.mktemp("trained") / "run")


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
def reference(trained, tmp_path_factory):
    """``(block size, causal) -> file``: what ``generate`` answers; made once for each."""

    @functools.cache
    def make(block_size, causal=False):
        out = tmp_path_factory.mktemp(f"reference_b{block_size}")
        script = [sys.executable, HERE / "make_reference.py", trained / f"pbm_b{block_size}" / "export", out]
        subprocess.run(
            [*script, *["--causal"] * causal], check=True, timeout=LIMIT_S, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )
        return out / "reference.json"

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
