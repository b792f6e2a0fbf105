"""A chain as one job on a real Slurm: two nodes, both this host. A worker is killed, then the job gets its signal."""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nemo_bard.base.paths import conf_dir, find_recipe
from nemo_bard.cli.app import main
from nemo_bard.launch import slurm
from nemo_bard.launch.exits import COMPLETE
from nemo_bard.pipeline.status import read_status, render

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]
pytestmark = [
    pytest.mark.slurm,
    pytest.mark.slow,
    pytest.mark.skipif(bool(MISSING), reason=f"no {', '.join(MISSING)} here (Debian: slurm-wlm, munge)"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd runs jobs as root only"),
]

STAGES = ("pbm_b4", "pbm_b8")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=10
SlurmctldPort={ctld}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=2
MpiDefault=none
ReturnToService=2
MinJobAge=3600
KillWait=30
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={n1} CPUs=1
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={n2} CPUs=1
PartitionName=pair Nodes=n1,n2 State=UP MaxTime=INFINITE
"""


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def wait_for(condition, seconds, what, log=None):
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        told = log.read_text()[-4000:] if log is not None and log.is_file() else ""
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{told}"
        time.sleep(0.1)
    return found


@pytest.fixture(scope="session")
def cluster(tmp_path_factory):
    """Starts munged, slurmctld and two slurmd; yields the environment for Slurm's commands."""
    folder = tmp_path_factory.mktemp("slurm")
    (folder / "state").mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o400)
    ctld, n1, n2 = free_ports(3)
    conf = folder / "slurm.conf"
    conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ctld=ctld, n1=n1, n2=n2))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin"
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("SLURM_")},
        "SLURM_CONF": str(conf), "PATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }  # fmt: skip
    munge = [f"--{name}={folder}/munge.{end}" for name, end in
             (("socket", "socket"), ("key-file", "key"), ("pid-file", "pid"), ("log-file", "log"), ("seed-file", "seed"))]  # fmt: skip
    daemons = {
        "munged": ["munged", "--foreground", "--force", *munge],
        "slurmctld": ["slurmctld", "-D", "-f", str(conf)],
        "n1": ["slurmd", "-D", "-N", "n1", "-f", str(conf)],
        "n2": ["slurmd", "-D", "-N", "n2", "-f", str(conf)],
    }
    running = {}

    def command(*words):
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=False).stdout

    try:
        for name, words in daemons.items():
            with (folder / f"{name}.out").open("wb") as out:
                words = [shutil.which(words[0], path=path), *words[1:]]
                running[name] = subprocess.Popen(words, env=environment, stdout=out, stderr=out)
            if name == "munged":
                wait_for((folder / "munge.socket").exists, 20, "munged", folder / "munged.out")
        wait_for(lambda: command("sinfo", "-h", "-o", "%T %D").split() == ["idle", "2"], 60, "two idle nodes",
                 folder / "slurmctld.out")  # fmt: skip
        yield environment
    finally:
        if "slurmctld" in running:
            command("scancel", "--user=root")
            deadline = time.monotonic() + 90
            while command("squeue", "-h").strip() and time.monotonic() < deadline:
                time.sleep(0.5)
        for process in reversed(running.values()):
            process.terminate()
        for process in reversed(running.values()):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.fixture
def on_cluster(cluster, monkeypatch, tmp_path):
    """Lets this process talk to the cluster; returns what a job's state is asked with."""
    monkeypatch.chdir(tmp_path)
    for name, value in cluster.items():
        monkeypatch.setenv(name, value)

    def state(number):
        told = subprocess.run(["scontrol", "show", "job", number], capture_output=True, text=True, check=True)
        return re.search(r"JobState=(\w+)", told.stdout)[1]

    return state


def words(source, run_dir, *more):
    return [
        f"model.source={source}",
        f"run_dir={run_dir}",
        f"order=[start,{','.join(STAGES)}]",
        "stage.pbm_b4.max_steps=4",
        "stage.pbm_b8.max_steps=12",
        *(f"stage.{name}.ckpt_every_steps=1" for name in STAGES),
        *(f"stage.{name}.local_batch_size=2" for name in STAGES),
        *(f"stage.{name}.global_batch_size=4" for name in STAGES),
        *(f"stage.{name}.warmup_steps=1" for name in STAGES),
        "overrides.dataloader.num_workers=0",
        "data.rows=1",
        "evaluation.data=null",
        *more,
    ]


def weights(run_dir):
    found = {
        name: [f.read_bytes() for f in sorted((run_dir / name / "export").glob("*.safetensors"))] for name in STAGES
    }
    assert all(found.values())
    return found


def worker(rank, run_dir):
    """Process id of a worker: it has the words of the command line and its RANK, and torchrun as its parent."""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            line = (entry / "cmdline").read_bytes().split(b"\0")
            if f"run_dir={run_dir}".encode() in line and b"nemo_bard.launch" not in line:
                variables = (entry / "environ").read_bytes().split(b"\0")
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                above = Path(f"/proc/{parent}/cmdline").read_bytes().split(b"\0")
                if f"RANK={rank}".encode() in variables and b"nemo_bard.launch" in above:
                    return int(entry.name)
        except (FileNotFoundError, ProcessLookupError):
            continue
    return None


def submit(capsys, *more):
    """Submit the tiny chain; the job's number."""
    assert main(["finetune", "--config", "recipes/bard_tiny.yaml", *more]) == 0
    return re.search(r"^submitted: job (\d+),", capsys.readouterr().out, re.M)[1]


def test_a_killed_worker_and_a_signal_change_nothing(on_cluster, tmp_path, capsys):
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    source = make_tiny_qwen3_vl(tmp_path / "tiny")
    run = tmp_path / "run"
    ours = words(source, run, "launch=slurm", "launch.nodes=2", "launch.grace_seconds=120")

    assert main(["finetune", "--config", "bard_tiny", *ours]) == 2
    assert "launch.partition must be set: this cluster has no default partition; known: pair" in capsys.readouterr().err
    assert not run.exists()

    number = submit(capsys, *ours, "launch.partition=pair")
    log = run / "slurm" / f"{number}.log"
    assert main(["finetune", "--config", "bard_tiny", *ours, "launch.partition=pair"]) == 2
    assert f"job {number} of an earlier command is " in capsys.readouterr().err

    def has_checkpoint(stage, step):
        assert on_cluster(number) in ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING"), log.read_text()[-4000:]
        return (run / stage / "checkpoints" / f"epoch_0_step_{step}").is_dir()

    wait_for(lambda: has_checkpoint("pbm_b4", 1), 600, "a checkpoint", log)
    status = read_status(run)
    assert status.running
    assert f"running; Slurm job {number}: RUNNING" in render(status, run)
    os.kill(worker(1, run), signal.SIGKILL)
    wait_for(lambda: "back into the queue (requeue 1)" in log.read_text(), 300, "the first requeue", log)
    assert (run / "slurm" / f"{number}.failures").read_text() == "go 1: exit code 1\n"
    wait_for(lambda: on_cluster(number) == "PENDING", 60, "a job that waits", log)
    status = read_status(run)
    assert not status.needs_resume
    assert f"Slurm job {number}: PENDING" in render(status, run)

    wait_for(lambda: has_checkpoint("pbm_b8", 0), 600, "a checkpoint of the second stage", log)
    assert not (run / "slurm" / f"{number}.failures").exists(), "failures are counted from the last checkpoint on"
    subprocess.run(["scancel", "--batch", "--signal=USR1", number], check=True)
    wait_for(lambda: "stopped with exit code 75, back into the queue (requeue 2)" in log.read_text(), 300, "75", log)
    assert "preempted in stage pbm_b8: everything is saved" in log.read_text()
    assert not (run / "pbm_b8" / "manifest.json").exists()
    assert not (run / "slurm" / f"{number}.failures").exists(), "a signal is no failure"

    wait_for(lambda: on_cluster(number) in ("COMPLETED", "FAILED", "CANCELLED"), 600, "the end", log)
    assert on_cluster(number) == "COMPLETED", log.read_text()[-4000:]
    told = log.read_text()
    assert "the chain is complete after 2 requeues" in told
    assert read_status(run).complete
    assert "_target_" not in told, "recipes are in the run directory, not in the log"
    assert "Warning" not in told

    command = [sys.executable, "-m", "nemo_bard.launch", "--standalone", "--nproc-per-node=2", "-m", "nemo_bard.cli"]
    command += ["finetune", "--config", "bard_tiny", *words(source, tmp_path / "whole")]
    whole = subprocess.run(command, capture_output=True, text=True, check=False)
    assert whole.returncode == 0, whole.stderr[-3000:]
    assert weights(run) == weights(tmp_path / "whole")


def test_a_rehearsal_is_one_short_job(on_cluster, tmp_path, capsys):
    """Both nodes run the chain in small; its folder goes, its findings and its log stay, the run directory is not made."""
    from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

    source, run = make_tiny_qwen3_vl(tmp_path / "tiny"), tmp_path / "run"
    ours = words(source, run, "launch=slurm", "launch.nodes=2", "launch.partition=pair", "order=[start,pbm_b4]")
    assert main(["rehearse", "--config", "bard_tiny", *ours]) == 0
    number = re.search(r"^submitted: job (\d+), output in (\S+)$", capsys.readouterr().out, re.M)
    log = Path(number[2])
    assert log.parent == tmp_path / "run.rehearsal"
    wait_for(lambda: on_cluster(number[1]) in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"), 600, "the end", log)
    assert on_cluster(number[1]) == "COMPLETED", log.read_text()[-4000:]
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "run.rehearsal", "run.rehearsal.json"}
    told = json.loads((tmp_path / "run.rehearsal.json").read_text())
    assert told["network"]["ranks"] == len(told["files"]) == 2
    assert [stage["name"] for stage in told["stages"]] == ["start", "pbm_b4"]
    assert told["stages"][1]["resumed"]
    assert "network   gloo, 2 ranks" in log.read_text()


def test_a_cancelled_job_does_not_come_back(on_cluster, tmp_path, capsys):
    program = tmp_path / "python"  # stands in for torchrun: stops like it does
    started = tmp_path / "started"
    program.write_text(
        "#!/bin/bash\ntrap 'exit 75' TERM USR1\n"
        f"touch {shlex.quote(str(started))}-$SLURM_PROCID\nwhile :; do sleep 0.1; done\n"
    )
    program.chmod(0o755)
    section = yaml.safe_load((conf_dir() / "launch" / "slurm.yaml").read_text())
    section |= {
        "job_name": "x",
        "folder": str(tmp_path / "slurm"),
        "nodes": 2,
        "partition": "pair",
        "python": str(program),
    }
    assert slurm.submit(slurm.SlurmSettings(**section), ("a",), find_recipe("bard_tiny"), [], None) == 0
    number = re.search(r"job (\d+),", capsys.readouterr().out)[1]
    wait_for(lambda: len(list(tmp_path.glob("started-*"))) == 2, 120, "two tasks", tmp_path / "slurm" / f"{number}.log")
    assert slurm.find_job(tmp_path / "slurm") == (number, "RUNNING")
    subprocess.run(["scancel", number], check=True)
    wait_for(lambda: slurm.find_job(tmp_path / "slurm") == (number, None), 120, "the end")
    assert on_cluster(number) == "CANCELLED"
    log = (tmp_path / "slurm" / f"{number}.log").read_text()
    assert "back into the queue" not in log
    assert COMPLETE not in {file.suffix for file in (tmp_path / "slurm").iterdir()}
