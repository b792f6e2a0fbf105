"""The chain for real: PBM at two block sizes and SWD, killed, gone on with, stopped by a signal, stage by stage."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nemo_bard.pipeline.manifest import newest_checkpoint
from nemo_bard.pipeline.status import read_status

pytestmark = [pytest.mark.slow, pytest.mark.chain]

HERE = Path(__file__).parent
STAGES = ("pbm_b4", "pbm_b8", "swd_b32")
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    return make_tiny_qwen3_vl(tmp_path_factory.mktemp("source") / "tiny")


def words(source, run_dir, *more):
    steps = [f"stage.{name}.max_steps=3" for name in STAGES] + [f"stage.{name}.ckpt_every_steps=1" for name in STAGES]
    return [
        f"model.source={source}",
        f"run_dir={run_dir}",
        f"order=[start,{','.join(STAGES)}]",
        "stage.swd_b32.block_size=8",
        *steps,
        "data.rows=1",
        "overrides.step_scheduler.global_batch_size=4",
        "overrides.step_scheduler.local_batch_size=2",
        "overrides.lr_scheduler.lr_warmup_steps=1",
        "overrides.dataloader.num_workers=1",
        "overrides.dataloader.persistent_workers=true",
        "evaluation.limit=3",
        "evaluation.generation.max_new_tokens=16",
        *more,
    ]


def drive(folder, jobs, *, ranks=1):
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs))
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [*start, str(HERE / "pipeline_driver.py"), str(file)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, check=False)


def weights(run_dir, stages=STAGES):
    found = {}
    for name in stages:
        files = sorted((run_dir / name / "export").glob("*.safetensors"))
        assert files
        found[name] = [file.read_bytes() for file in files]
    return found


def answers(run_dir):
    found = {}
    for name in STAGES:
        samples = json.loads((run_dir / name / "eval.json").read_text())["samples"]
        found[name] = [(sample["sample_index"], sample["answer"]) for sample in samples]
    return found


def run_killed(source, folder, kill, *, ranks=1):
    """A chain that is killed once and gone on with (``run``), and one that is not (``whole``); what the second told."""
    killed = drive(folder, [{"words": words(source, folder / "run"), "kill": kill}], ranks=ranks)
    assert killed.returncode != 0
    assert not (folder / "run" / "swd_b32").exists()
    done = drive(folder, [{"words": words(source, folder / name)} for name in ("run", "whole")], ranks=ranks)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module")
def one_rank(source, tmp_path_factory):
    """Killed when a checkpoint of the second stage was written but not published."""
    folder = tmp_path_factory.mktemp("one")
    return folder, run_killed(source, folder, {"rank": 0, "block_size": 8, "step": 1, "place": "publish"})


def check_same(folder):
    assert weights(folder / "run") == weights(folder / "whole")
    assert answers(folder / "run") == answers(folder / "whole")
    for name in STAGES:
        folders = sorted(path.name for path in (folder / "run" / name / "checkpoints").glob("epoch_*"))
        assert folders == ["epoch_0_step_1", "epoch_0_step_2"], "keep_last bounds them"
        lines = [json.loads(line) for line in (folder / "run" / name / "checkpoints" / "training.jsonl").open()]
        assert [line["step"] for line in lines] == [0, 1, 2]
    assert (folder / "run" / "report.html").is_file()
    assert (folder / "run" / "answers.png").is_file()


def test_killed_and_gone_on_with_ends_bit_by_bit_as_undisturbed(one_rank):
    folder, done = one_rank
    assert "pbm_b8/checkpoints/epoch_0_step_1: half-written" in done.stderr
    assert "pbm_b4: finished before" in done.stdout
    assert "pbm_b8 goes on from" in done.stderr
    check_same(folder)


def test_killed_at_random_instants(source, one_rank, tmp_path):
    """As often as ``NEMO_BARD_KILLS`` says; every chain that comes to its end has the weights of the undisturbed one."""
    kills = int(os.environ.get("NEMO_BARD_KILLS", "6"))
    alone = ("overrides.dataloader.num_workers=0", "overrides.dataloader.persistent_workers=false")
    job = {
        "words": words(source, tmp_path / "run", *alone),
        "random_kills": {"count": kills, "seed": 0, "seconds": 8.0},
    }
    done = drive(tmp_path, [job])
    assert done.returncode == 0, done.stderr[-3000:]
    complete = sorted(tmp_path.glob("run*"))
    assert f"{kills} kills, {len(complete)} chains complete" in done.stdout
    whole = weights(one_rank[0] / "whole")
    for folder in complete:
        assert weights(folder) == whole, folder


def test_one_of_two_ranks_killed(source, tmp_path):
    run_killed(source, tmp_path, {"rank": 1, "block_size": 4, "step": 2, "place": "step"}, ranks=2)
    check_same(tmp_path)


def test_one_torchrun_per_stage_gives_the_weights_of_one_job(source, one_rank, tmp_path):
    start = [sys.executable, "-m", "nemo_bard.cli", "finetune", "--config", "bard_tiny", "--nproc-per-node", "1"]
    chosen = words(source, tmp_path / "parts", "launch.mode=per_stage", "order=[start,pbm_b4,pbm_b8]")
    parts = subprocess.run([*start, *chosen], env=ENVIRONMENT, check=False)
    assert parts.returncode == 0
    whole = weights(one_rank[0] / "whole")
    assert weights(tmp_path / "parts", STAGES[:2]) == {name: whole[name] for name in STAGES[:2]}


def test_signal_to_the_launcher(source, tmp_path):
    """SIGTERM to the parent of two workers: a checkpoint and exit code 75."""
    start = [sys.executable, "-m", "nemo_bard.cli", "finetune", "--config", "bard_tiny", "--nproc-per-node", "2"]
    run = tmp_path / "long"
    process = subprocess.Popen([*start, *words(source, run, "stage.pbm_b4.max_steps=100000")], env=ENVIRONMENT)
    deadline = time.monotonic() + 240
    while not any((run / "pbm_b4" / "checkpoints").glob("epoch_*")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 75
    told = read_status(run)
    assert told.needs_resume
    assert [stage.state for stage in told.stages] == ["finished", "stopped", "waiting", "waiting"]
    newest, wrong = newest_checkpoint(run / "pbm_b4" / "checkpoints")
    assert newest.name == f"epoch_{newest.name.split('_')[1]}_step_{told.stages[1].steps - 1}"
    assert wrong == []
