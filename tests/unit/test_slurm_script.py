"""The script of a Slurm job: what it says, what its bash does with exit codes and signals, and what is refused."""

import dataclasses
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from nemo_bard.base.paths import conf_dir
from nemo_bard.base.settings import from_mapping
from nemo_bard.launch import slurm
from nemo_bard.launch.launchers import LAUNCHERS
from nemo_bard.launch.torchrun import node_options

STAGES = ("start", "pbm_b4", "report")
RECIPE = Path("/recipes/bard b32.yaml")


def settings(path, **changed):
    section = yaml.safe_load((conf_dir() / "launch" / "slurm.yaml").read_text())
    return slurm.SlurmSettings(**{**section, "job_name": "bard_b32", "folder": str(path), **changed})


def script(folder, words=(), processes=None, **changed):
    section = settings(folder, **changed)
    slurm.check(section)
    return slurm.script(section, STAGES, RECIPE, words, processes)


def directives(text):
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH")]


@pytest.mark.parametrize("name", ["local", "slurm"])
def test_the_shipped_file_holds_every_setting_with_its_default(name):
    section = yaml.safe_load((conf_dir() / "launch" / f"{name}.yaml").read_text())
    cls = LAUNCHERS.get(name).Settings
    given = from_mapping(cls, section)
    assert set(section) == {field.name for field in dataclasses.fields(cls)}
    assert given == cls(**{key: section[key] for key in ("name", "job_name", "folder") if key in section})


def test_defaults_name_only_what_is_set(tmp_path):
    assert directives(script(tmp_path)) == [
        "--job-name=bard_b32",
        "--nodes=1",
        "--ntasks-per-node=1",
        "--signal=B:USR1@660",
        f"--output={tmp_path}/%j.log",
        "--open-mode=append",
        "--exclusive",
        "--mem=0",
        "--requeue",
    ]


def test_everything_that_can_be_set_is_in_the_script(tmp_path):
    text = script(
        tmp_path,
        ["run_dir=my runs", "data.path=$HOME"],
        nodes=4,
        gpus_per_node=8,
        cpus_per_task=64,
        partition="gpu,long",
        account="lab-1",
        time="1-02:00:00",
        grace_seconds=300,
        modules=["cuda/12.8"],
        setup=["export NCCL_DEBUG=INFO"],
        container="/images/nemo bard.sqsh",
        container_mounts=["/data:/data", "/home"],
        sbatch=["--mem=500G", "--qos=high"],
    )
    said = directives(text)
    for option in (
        "--nodes=4", "--gpus-per-node=8", "--cpus-per-task=64", "--partition=gpu,long", "--account=lab-1",
        "--time=1-02:00:00", "--signal=B:USR1@360", "--exclusive", "--qos=high",
    ):  # fmt: skip
        assert option in said
    assert said.index("--mem=500G") > said.index("--mem=0"), "the last one counts"
    joined = re.sub(r" \\\n *", " ", text)
    (command,) = [line for line in joined.splitlines() if line.lstrip().startswith("srun ")]
    assert "srun --nodes=4 --ntasks=4 --ntasks-per-node=1" in command
    assert (
        "--cpus-per-task=64 --container-image='/images/nemo bard.sqsh' --container-workdir=\"$PWD\" --container-mounts=/data:/data,/home"
        in command
    )
    assert " python -m nemo_bard.launch --nnodes=4 --nproc-per-node=8 " in command
    assert '--rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$SLURM_JOB_ID$1"' in command
    assert "--shutdown-timeout=300 --signals-to-handle=SIGTERM,SIGUSR1," in command
    assert "finetune --config '/recipes/bard b32.yaml' 'run_dir=my runs' 'data.path=$HOME' " in command
    assert text.index("module load cuda/12.8\nexport NCCL_DEBUG=INFO\n") < text.index("srun ")


def test_a_node_gives_all_its_cpus_or_as_many_as_are_named(tmp_path):
    """A task that names none has one by Slurm's default, for all processes of a node."""
    whole = script(tmp_path)
    assert "srun --nodes=1 --ntasks=1 --ntasks-per-node=1 --wait=60 --kill-on-bad-exit=0 --cpu-bind=none " in whole
    shared = script(tmp_path, exclusive=False, cpus_per_task=12)
    assert "--cpus-per-task=12" in directives(shared)
    assert "--exclusive" not in shared
    assert "--mem" not in shared
    assert "--kill-on-bad-exit=0 --cpus-per-task=12 " in shared


def test_processes_per_node(tmp_path):
    assert "--nproc-per-node=1 " in script(tmp_path)
    assert "--nproc-per-node=2 " in script(tmp_path, gpus_per_node=8, processes=2)
    section = settings(tmp_path, processes=2)
    assert "--nproc-per-node=3 " in slurm.script(section, STAGES, RECIPE, [], 3), "the command line comes first"
    with pytest.raises(ValueError, match=r"launch.processes \(--nproc-per-node\) must be 1 to 4 .*, got 8"):
        script(tmp_path, processes=8, gpus_per_node=4)


# ------------------ what the bash does ------------------
SCRIPTS = [
    {},
    {"mode": "per_stage", "nodes": 2, "gpus_per_node": 8, "modules": ["cuda/12.8"], "setup": ["export A='b c'"]},
    {"container": "/images/nemo bard.sqsh", "container_mounts": ["/data:/data"], "cpus_per_task": 4},
]


@pytest.mark.parametrize("changed", SCRIPTS, ids=str)
def test_the_script_is_whole_and_bash_can_read_it(tmp_path, changed):
    text = script(tmp_path, ["a=b c", "data.path=$HOME"], **changed)
    assert re.search(r"@[A-Z_]+@", text) is None
    assert text.startswith("#!/bin/bash\n# Chain bard_b32: nodes x processes = ")
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False).stderr == ""


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck here")
@pytest.mark.parametrize("changed", SCRIPTS, ids=str)
def test_shellcheck_finds_nothing(tmp_path, changed):
    text = script(tmp_path, ["a=b c"], **changed)
    done = subprocess.run(["shellcheck", "-"], input=text, text=True, capture_output=True, check=False)
    assert done.stdout == ""


FAKES = {
    "scontrol": 'echo "scontrol $*" >>calls; case "$1 $2" in'
    ' "--oneliner show") [ "$4" = "n[1-2]" ] && for n in 1 2; do'
    ' echo "NodeName=n$n Arch=x86_64 NodeAddr=10.0.0.$n NodeHostName=n$n Version=22"; done;; esac',
    "squeue": "echo ${FAKE_STATE:-RUNNING}",
    "srun": 'printf "%s " "$@" >>calls; echo >>calls; trap "exit 75" USR1; eval "$FAKE_DO";'
    ' [ -z "$FAKE_WAIT" ] || { touch started; while :; do sleep 0.05; done; };'
    ' code=$(head -n 1 codes); sed -i 1d codes; exit "$code"',
}


def said(process, timeout):
    """What a script writes, after the line that every go begins with."""
    head, _, rest = process.communicate(timeout=timeout)[0].partition("\n")
    assert re.fullmatch(r"slurm: job 12345, go \d+, [\d-]+ [\d:]+, n\[1-2\], 2 x 1 processes", head)
    return rest


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Runs a script with programs in place of Slurm's: ``job(codes, **settings)``."""
    monkeypatch.chdir(tmp_path)
    for name, body in FAKES.items():
        file = tmp_path / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{body}\n")
        file.chmod(0o755)
    path = f"{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = {
        **os.environ,
        "PATH": path,
        "PYTHONPATH": str(Path(slurm.__file__).parents[2]),
        "SLURM_JOB_ID": "12345",
    }
    environment["SLURM_JOB_NODELIST"] = "n[1-2]"

    def start(codes, variables=None, **changed):
        (tmp_path / "codes").write_text("".join(f"{code}\n" for code in codes))
        (tmp_path / "calls").write_text("")
        (tmp_path / "job.sh").write_text(script(tmp_path, ["a=b c"], **{"nodes": 2, **changed}))
        return subprocess.Popen(
            ["bash", "job.sh"], env={**environment, **(variables or {})}, stdout=subprocess.PIPE, text=True
        )

    def run(*args, **kwargs):
        process = start(*args, **kwargs)
        told = said(process, timeout=30)
        return process.returncode, told, (tmp_path / "calls").read_text()

    run.start = start
    return run


def test_complete(job):
    code, told, calls = job([0])
    assert (code, told) == (0, "slurm: the chain is complete after 0 requeues\n")
    port = re.search(r"--rdzv-endpoint=10.0.0.1:(\d+) --rdzv-id=12345 ", calls)[1]
    assert 20000 <= int(port) < 32000
    assert " a=b c " in calls
    assert "requeue" not in calls


def test_every_node_knows_its_own_address_and_where_they_meet(job, tmp_path):
    assert job([0], {"FAKE_DO": 'echo "$NEMO_BARD_NODES" >nodes'})[0] == 0
    told = (tmp_path / "nodes").read_text()
    assert told == "n1=10.0.0.1\nn2=10.0.0.2\n"
    for name, host in (("n1", 1), ("n2", 0)):
        options = node_options({"NEMO_BARD_NODES": told, "SLURMD_NODENAME": name})
        assert options == [f"--local-addr=10.0.0.{name[1]}", f"--rdzv-conf=is_host={host}"]
    assert node_options({"SLURMD_NODENAME": "n1"}) == []


@pytest.mark.parametrize("exit_code", [75, 1, 137])
def test_preempted_and_failed_goes_are_requeued(job, exit_code):
    code, told, calls = job([exit_code], {"SLURM_RESTART_COUNT": "4"})
    assert code == 0
    assert told == f"slurm: stopped with exit code {exit_code}, back into the queue (requeue 5)\n"
    assert calls.endswith("scontrol requeue 12345\n")


def test_a_mistake_is_not_requeued(job):
    code, told, calls = job([2])
    assert (code, told) == (2, "slurm: not requeued, see the error above\n")
    assert "requeue" not in calls


def test_requeues_and_failures_are_bounded(job):
    code, told, calls = job([75], {"SLURM_RESTART_COUNT": "7"}, max_requeues=7)
    assert code == 75
    assert "not requeued, 7 requeues (launch.max_requeues)" in told
    for restarts, expected in enumerate((0, 9)):
        code, told, calls = job([9], {"SLURM_RESTART_COUNT": str(restarts)}, max_failures=2)
        assert code == expected
    assert "not requeued, 2 failures without a new checkpoint in between (launch.max_failures);" in told
    assert "the last exit code is 9" in told
    assert "scontrol requeue" not in calls


def test_failures_are_counted_since_the_last_checkpoint_and_of_this_job(job, tmp_path):
    failures = tmp_path / "12345.failures"
    failures.write_text("go 1: exit code 1\n" * 9)
    (tmp_path / "12345.complete").touch()  # both of another job of this number
    assert job([1], max_failures=2)[0] == 0
    assert failures.read_text() == "go 1: exit code 1\n"
    again = {"SLURM_RESTART_COUNT": "1"}
    note = "python -c 'from nemo_bard.launch.exits import note_progress; note_progress()'"
    assert job([1], {**again, "FAKE_DO": note}, max_failures=2)[0] == 0
    assert failures.read_text() == "go 2: exit code 1\n"
    assert job([1], again, max_failures=2)[0] == 1


def test_a_signal_after_the_end_does_not_bring_the_job_back(job):
    note = "python -c 'from nemo_bard.launch.exits import note_complete; note_complete()'"
    code, told, calls = job([75], {"FAKE_DO": note})
    assert (code, told) == (0, "slurm: the chain is complete after 0 requeues\n")
    assert "requeue" not in calls


def test_a_busy_controller_is_asked_again(job, tmp_path):
    (tmp_path / "bin" / "squeue").write_text("#!/bin/bash\n[ -f asked ] || { touch asked; exit 1; }\necho RUNNING\n")
    (tmp_path / "bin" / "sleep").write_text("#!/bin/bash\n")
    (tmp_path / "bin" / "sleep").chmod(0o755)
    assert "back into the queue" in job([75])[1]


def test_a_cancelled_job_is_not_requeued(job):
    code, told, calls = job([75], {"FAKE_STATE": "COMPLETING"})
    assert (code, told) == (75, "slurm: stopped with exit code 75, not requeued; Slurm says COMPLETING\n")
    assert "requeue" not in calls


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_the_signal_reaches_the_nodes(job, tmp_path, name):
    process = job.start([], {"FAKE_WAIT": "1"})
    deadline = time.monotonic() + 20
    while not (tmp_path / "started").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(getattr(signal, name))
    told = said(process, timeout=20)
    assert told == "slurm: stopped with exit code 75, back into the queue (requeue 1)\n"
    assert not (tmp_path / "12345.failures").exists()


def test_per_stage_stops_at_the_first_that_does_not_end_well(job):
    _, told, calls = job([0, 75, 0], mode="per_stage")
    assert [re.search(r"--stage=(\w+)", line)[1] for line in calls.splitlines() if "--stage" in line] == list(
        STAGES[:2]
    )
    assert "--rdzv-id=12345-pbm_b4 " in calls
    assert "back into the queue" in told
    assert "complete" in job([0, 0, 0], mode="per_stage")[1]


# ------------------ refusals ------------------
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"nodes": 0}, "launch.nodes must be an integer >= 1, got 0"),
        ({"nodes": "two"}, "launch.nodes must be an integer >= 1, got 'two'"),
        ({"gpus_per_node": 0}, "launch.gpus_per_node must be an integer >= 1 or null, got 0"),
        ({"max_requeues": -1}, "launch.max_requeues must be an integer >= 0, got -1"),
        ({"submit": "no"}, "launch.submit must be true or false, got 'no'"),
        ({"partition": "a b"}, "launch.partition must be a name without spaces or null, got 'a b'"),
        ({"account": "x\n#SBATCH --qos=y"}, "launch.account must be a name without spaces or null, got"),
        ({"modules": "cuda"}, "launch.modules must be a list of lines, got 'cuda'"),
        ({"setup": ["a\nb"]}, "launch.setup must be a list of lines"),
        ({"sbatch": ["-p gpu"]}, "launch.sbatch: '-p gpu' must look like --option or --option=value"),
        ({"sbatch": ["--partition=x"]}, "launch.sbatch: '--partition=x' is not allowed; set launch.partition instead"),
        ({"sbatch": ["--array=1-3"]}, "launch.sbatch: '--array=1-3' is not allowed; the script sets it itself"),
        ({"time": 86400}, "launch.time must be one line of text or null, got 86400"),
        ({"time": "86400"}, 'launch.time must be "HH:MM:SS" or "D-HH:MM:SS", in quotes, got \'86400\''),
        ({"mode": "one_jop"}, "launch.mode must be one of one_job, per_stage, got 'one_jop' (did you mean 'one_job'?)"),
        ({"name": "slrum"}, "launch.name must be one of local, slurm, got 'slrum' (did you mean 'slurm'?)"),
        ({"time": "4h"}, 'launch.time must be "HH:MM:SS" or "D-HH:MM:SS", in quotes, got \'4h\''),
        ({"time": "00:11:00"}, "launch.time 00:11:00 must be longer than launch.grace_seconds and a minute"),
        (
            {"exclusive": False},
            "launch.cpus_per_task must be set with launch.exclusive=false, or Slurm gives all processes of a node one CPU",
        ),
        ({"exclusive": "no"}, "launch.exclusive must be true or false, got 'no'"),
        ({"container_mounts": ["/a"]}, "launch.container_mounts needs launch.container"),
        ({"folder": "my runs"}, "launch.folder must not have spaces"),
    ],
)
def test_wrong_values_are_one_line(tmp_path, changed, message):
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        slurm.check(settings(tmp_path, **changed))
    assert "\n" not in str(caught.value)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts programs on an otherwise empty PATH."""
    folder = tmp_path / "path"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def put(**bodies):
        for name, body in bodies.items():
            (folder / name).write_text(f"#!/bin/bash\n{body}\n")
            (folder / name).chmod(0o755)

    return put


def submit(folder, **changed):
    return slurm.submit(settings(folder, **changed), STAGES, RECIPE, [], None)


def test_written_only(tmp_path, commands, capsys):
    assert submit(tmp_path / "run" / "slurm", submit=False) == 0
    path = tmp_path / "run" / "slurm" / "job.sbatch"
    assert capsys.readouterr().out == f"script: {path}\n"
    assert path.stat().st_mode & stat.S_IXUSR


def test_submitted(tmp_path, commands, capsys):
    commands(sinfo='echo "cpu*"; echo gpu', sbatch='echo "77;cluster"')
    assert submit(tmp_path / "s") == 0
    assert capsys.readouterr().out.endswith(f"submitted: job 77, output in {tmp_path}/s/77.log\n")


@pytest.mark.parametrize(
    ("programs", "changed", "message"),
    [
        ({}, {}, "launch=slurm: no sbatch here"),
        ({"sinfo": "echo cpu; echo gpu"}, {}, "launch.partition must be set: this cluster has no default partition; known: cpu, gpu"),
        ({"sinfo": "echo cpu; echo gpu"}, {"submit": False}, "launch.partition must be set"),
        ({"sinfo": "echo cpu*; echo gpu"}, {"partition": "gpuu"}, "no partition 'gpuu' in this cluster; did you mean gpu?"),
        ({"sinfo": "echo down >&2; exit 1"}, {}, "launch=slurm: sinfo says: down"),
    ],
)  # fmt: skip
def test_refused_before_anything_is_written(tmp_path, commands, programs, changed, message):
    commands(**programs, **({"sbatch": "touch submitted"} if programs else {}))
    with pytest.raises(ValueError, match=re.escape(message)):
        submit(tmp_path / "s", **changed)
    assert not (tmp_path / "s").exists()


def test_what_sbatch_says_is_passed_on(tmp_path, commands):
    commands(sinfo='echo "cpu*"', sbatch='echo "sbatch: error: Invalid account" >&2; exit 1')
    with pytest.raises(ValueError, match=r"sbatch refuses .*job.sbatch: sbatch: error: Invalid account$"):
        submit(tmp_path / "s")


def test_a_second_job_is_refused_while_one_is_in_the_queue(tmp_path, commands):
    commands(sinfo='echo "cpu*"', sbatch="echo 77", squeue='echo "$*" >"$0.asked"; echo "PENDING Resources"')
    assert slurm.find_job(tmp_path / "s") is None
    submit(tmp_path / "s")
    with pytest.raises(ValueError, match=r"/s: job 77 of an earlier command is PENDING \(Resources\); .* scancel 77 "):
        submit(tmp_path / "s")
    assert "--jobs=77" in (tmp_path / "path" / "squeue.asked").read_text()
    assert submit(tmp_path / "s", submit=False) == 0
    for body, state in (
        ("echo RUNNING None", "RUNNING"),
        ("echo COMPLETED None", None),
        ("echo CANCELLED by 0", None),
        ("echo slurm_load_jobs error: Invalid job id specified >&2; exit 1", None),
    ):
        commands(squeue=body)
        assert slurm.find_job(tmp_path / "s") == ("77", state)
    assert submit(tmp_path / "s") == 0


def test_world_size(tmp_path):
    count = LAUNCHERS.get("slurm")().world_size
    assert count(settings(tmp_path, nodes=3, gpus_per_node=8), None) == 24
    assert count(settings(tmp_path, nodes=3, gpus_per_node=8, processes=2), None) == 6
    assert count(settings(tmp_path, nodes=3), 4) == 12
    with pytest.raises(ValueError, match="launch.nodes must be an integer"):
        count(settings(tmp_path, nodes="3"), None)
