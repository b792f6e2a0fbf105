"""Checkpoint folders that bring their own code, in an environment with transformers and torch alone (``make test-plain``)."""

import os
import shutil
from pathlib import Path

import plain_cases
import pytest

from nemo_bard.checkpoints.exporting.export import export

pytestmark = pytest.mark.plain
ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = {"PYTHONPATH": str(ROOT / "tests" / "vllm" / "cpu_shims"), "TRITON_INTERPRET": "1"}
"""torchvision of the package index is built for CUDA, torch of that environment is not: see the shims."""
STAGES = ("pbm_b4", "pbm_b8", "pbm_b32", "swd_b32")
"""Of a ``bard_tiny`` run that ``PLAIN_RUN`` names."""


@pytest.fixture(scope="module")
def python():
    """The interpreter of the environment; skips the tests where there is none."""
    path = os.environ.get("PLAIN_PYTHON") or str(ROOT / ".venv-plain/bin/python")
    if not Path(path).is_file():
        pytest.skip(f"no plain environment: {path} is not there (make venv-plain, or PLAIN_PYTHON=...)")
    return path


@pytest.fixture(scope="module")
def checkpoints(start):
    """Folders by name: random weights, and what was trained in the run named by ``PLAIN_RUN``."""
    run = os.environ.get("PLAIN_RUN")
    trained = {name: Path(run) / name / "export" for name in STAGES} if run else {}
    return {"random": start} | {name: folder for name, folder in trained.items() if folder.is_dir()}


def test_same_answers(python, checkpoints, tmp_path):
    asked = plain_cases.cases()
    for name, checkpoint in checkpoints.items():
        made, folder = tmp_path / name / "made", tmp_path / name / "elsewhere" / "my model v1.0"
        export(checkpoint, made, self_contained=True)
        shutil.copytree(made, folder)
        shutil.rmtree(made)
        found = plain_cases.ask(python, folder, asked, tmp_path / name, environment=ENVIRONMENT)
        wanted = plain_cases.expected(folder, asked)
        assert plain_cases.differing(asked, found["answers"], wanted) == [], name
        assert found["again"] == wanted[0]
        assert not set(found["modules"]) & {"nemo_bard", "nemo_automodel", "hydra", "omegaconf"}


def test_under_a_name_on_the_hub(python, start, tmp_path):
    """As ``huggingface_hub`` keeps what it has downloaded; transformers then goes another way to the code."""
    repository, commit = "some-org/bard.v1-b4", "0123456789abcdef0123456789abcdef01234567"
    kept = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs" / "main").write_text(commit)
    export(start, kept / "snapshots" / commit, self_contained=True)
    asked = plain_cases.cases()[:2]
    found = plain_cases.ask(
        python,
        repository,
        asked,
        tmp_path,
        environment={**ENVIRONMENT, "HF_HUB_CACHE": str(tmp_path / "hub")},
        start_in=tmp_path,
    )
    assert plain_cases.differing(asked, found["answers"], plain_cases.expected(start, asked)) == []
    assert found["class"] == f"transformers_modules.some_hyphen_org.bard_dot_v1_hyphen_b4.{commit}.modeling_bard_vl"
    assert found["again"] == found["answers"][0]
