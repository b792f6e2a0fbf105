"""One Slurm job for a chain: the script that it is, and its submission.

The job starts one torchrun per node in one ``srun`` and looks at the exit code: 0 ends it, a user's mistake ends it, a
preemption signal or a failure puts it back into the queue, where the next go resumes the chain. Its bash is in
``job.sbatch`` beside this file.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nemo_bard.base.errors import EXIT_USER_ERROR, nearest
from nemo_bard.base.settings import Check, check_settings, flag, integer, setting
from nemo_bard.launch.exits import COMPLETE, EXIT_PREEMPTED, FAILURES, FORWARDED_SIGNALS, JOB_FILES, NODES
from nemo_bard.launch.launchers import Launcher, LaunchSettings

SIGNAL_SLACK_SECONDS = 60
"""Slurm counts time limits in minutes (sbatch, ``--signal``)."""
OWN_OPTIONS = {
    "account": "account", "chdir": None, "cpus-per-task": "cpus_per_task", "gpus-per-node": "gpus_per_node",
    "job-name": "job_name", "no-requeue": None, "nodes": "nodes", "ntasks": None, "ntasks-per-node": None,
    "open-mode": None, "output": "folder", "partition": "partition", "requeue": None, "signal": "grace_seconds",
    "time": "time", "array": None, "error": None,
}  # fmt: skip
"""Options of sbatch that the script sets or cannot work with -> the key of ``launch`` that says it, if any."""
SUBMITTED = "job.json"
ENDED = (
    "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "PREEMPTED", "REVOKED",
    "TIMEOUT",
)  # fmt: skip
"""States that a job does not leave; squeue still tells of them for some minutes."""
TIME = re.compile(r"(?:(\d+)-)?(\d{1,2}):([0-5]\d)(?::([0-5]\d))?")
REHEARSAL_TIME = "00:30:00"
"""Limit of a rehearsal's job."""
TEMPLATE = Path(__file__).with_name("job.sbatch")


def _name(*, optional: bool = True) -> Check:
    return Check(
        "a name without spaces",
        lambda v: isinstance(v, str) and bool(re.fullmatch(r"[\w.,+-]+", v)),
        str,
        "NAME",
        optional,
    )


def _is_line(value: object) -> bool:
    return isinstance(value, str) and bool(value) and "\n" not in value


def _line(*, optional: bool = True) -> Check:
    return Check("one line of text", _is_line, str, "TEXT", optional)


_LINES = Check("a list of lines", lambda v: isinstance(v, list) and all(map(_is_line, v)), str, "LINES")


@dataclass(frozen=True, kw_only=True)
class SlurmSettings(LaunchSettings):
    """The ``launch`` section of a Slurm job."""

    nodes: int = setting(1, integer(), "--nodes")
    gpus_per_node: int | None = setting(None, integer(optional=True), "--gpus-per-node")
    cpus_per_task: int | None = setting(
        None, integer(optional=True), "--cpus-per-task; a task is a node's torchrun with all its processes; null: all"
    )
    exclusive: bool = setting(True, flag(), "--exclusive --mem=0: whole nodes; false needs cpus_per_task")
    partition: str | None = setting(None, _name(), "null: the cluster's default, if it has one")
    account: str | None = setting(None, _name(), "--account")
    time: str | None = setting(
        None, _line(), 'limit of one go, "HH:MM:SS" or "D-HH:MM:SS", quoted; null: the partition\'s'
    )
    job_name: str = setting(check=_name(optional=False), help="--job-name")
    folder: str = setting(
        check=_line(optional=False), help="the script and the job's output; on a file system that all nodes see"
    )
    submit: bool = setting(True, flag(), "false: only write the script")
    max_requeues: int = setting(100, integer(0), "of one job, after preemption and after failures")
    max_failures: int = setting(
        5,
        integer(),
        "goes that end without a signal and without a new checkpoint in between; the last one ends the job",
    )
    python: str | None = setting(None, _line(), "null: this one; with a container: python")
    modules: list[str] = setting(factory=list, check=_LINES, help="module load")
    setup: list[str] = setting(factory=list, check=_LINES, help="lines of bash before the first process starts")
    container: str | None = setting(None, _line(), "image for srun --container-image (pyxis)")
    container_mounts: list[str] = setting(factory=list, check=_LINES, help="srun --container-mounts")
    sbatch: list[str] = setting(
        factory=list, check=_LINES, help='more #SBATCH lines: ["--qos=long", "--mem=500G"]; they come last'
    )


class SlurmLauncher(Launcher):
    """A job that writes itself down and goes on by itself."""

    Settings = SlurmSettings
    elsewhere = True

    def check(self, settings: SlurmSettings) -> None:
        """Check the section; see ``check``."""
        check(settings)

    def world_size(self, settings: SlurmSettings, processes: int | None) -> int:
        """Return how many processes the job starts on all nodes."""
        check(settings)
        return settings.nodes * processes_per_node(settings, processes)

    def start(
        self,
        settings: SlurmSettings,
        stages: Sequence[str],
        config_path: Path,
        words: Sequence[str],
        processes: int | None,
    ) -> int:
        """Write the script and submit it; see ``submit``."""
        return submit(settings, stages, config_path, words, processes)

    def rehearsal(self, settings: SlurmSettings, scratch: Path) -> SlurmSettings:
        """One short job that does not come back, with a folder of its own beside the scratch folder."""
        return replace(
            super().rehearsal(settings, scratch),
            time=REHEARSAL_TIME,
            max_requeues=0,
            folder=str(scratch.with_name(scratch.name.rpartition("-")[0])),
            job_name=f"{settings.job_name}-rehearsal",
            setup=[*settings.setup, f"trap {shlex.quote(f'rm -rf -- {shlex.quote(str(scratch))}')} EXIT"],
        )

    def state_folders(self, settings: SlurmSettings) -> list[Path]:
        """The folder of the script and the log."""
        return [Path(settings.folder).absolute()]


def submit(
    settings: SlurmSettings, stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> int:
    """Write the script of a chain into ``settings.folder`` and submit it.

    Args:
        settings: The ``launch`` section.
        stages: Names to pass as ``--stage`` with ``mode: per_stage``, in order.
        config_path: The pipeline's recipe YAML.
        words: The command line after it.
        processes: ``--nproc-per-node``; the section's if None.

    Returns:
        0.

    Raises:
        ValueError: For wrong values, or if Slurm is missing or refuses the job; nothing is submitted then.
    """
    check(settings)
    check_cluster(settings)
    text = script(settings, stages, config_path, words, processes)
    folder = Path(settings.folder).absolute()
    number, state = find_job(folder) or (None, None)
    if settings.submit and state is not None:
        raise ValueError(
            f"{folder}: job {number} of an earlier command is {state}; wait for it, or scancel {number} first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    path.write_text(text)
    path.chmod(0o755)
    sys.stdout.write(f"script: {path}\n")
    if settings.submit:
        done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"sbatch refuses {path}: {' '.join(done.stderr.split()) or f'exit {done.returncode}'}")
        number = done.stdout.strip().split(";")[0]
        (folder / SUBMITTED).write_text(json.dumps({"job": number, "time": time.time()}) + "\n")
        sys.stdout.write(f"submitted: job {number}, output in {folder}/{number}.log\n")
    return 0


def find_job(folder: Path) -> tuple[str, str | None] | None:
    """Tell about the newest job of a folder.

    Args:
        folder: ``launch.folder``.

    Returns:
        The job's number and what the queue says of it, such as ``PENDING (Resources)``, or None if it is not there or
        there is no ``squeue`` here; None if no job was submitted.
    """
    if not (folder / SUBMITTED).is_file():
        return None
    number = json.loads((folder / SUBMITTED).read_text())["job"]
    if shutil.which("squeue") is None:
        return number, None
    words = ["squeue", "--noheader", f"--jobs={number}", "--states=all", "--format=%T %r"]
    told = subprocess.run(words, capture_output=True, text=True, check=False).stdout.split(maxsplit=1)
    if not told or told[0] in ENDED:
        return number, None
    reason = "" if len(told) < 2 or told[1].strip() == "None" else f" ({told[1].strip()})"
    return number, told[0] + reason


def check(settings: SlurmSettings) -> None:
    """Check the values of the ``launch`` section.

    Raises:
        ValueError: One line naming the key, its value and what is allowed.
    """
    check_settings(settings, "launch")
    if re.search(r"[\s%\\]", str(Path(settings.folder).absolute())):
        raise ValueError(f"launch.folder must not have spaces, % or backslashes in it, got {settings.folder!r}")
    if settings.container_mounts and settings.container is None:
        raise ValueError("launch.container_mounts needs launch.container")
    if not settings.exclusive and settings.cpus_per_task is None:
        raise ValueError(
            "launch.cpus_per_task must be set with launch.exclusive=false, or Slurm gives all processes of a node one CPU"
        )
    for line in settings.sbatch:
        _check_option(line)
    _check_time(settings)


def _check_option(line: str) -> None:
    match = re.match(r"--([a-z][a-z-]*)(?:=|$)", line)
    if match is None:
        raise ValueError(f"launch.sbatch: {line!r} must look like --option or --option=value")
    if match[1] in OWN_OPTIONS:
        key = OWN_OPTIONS[match[1]]
        hint = f"set launch.{key} instead" if key else "the script sets it itself"
        raise ValueError(f"launch.sbatch: {line!r} is not allowed; {hint}")


def _check_time(settings: SlurmSettings) -> None:
    text = settings.time
    if text is None:
        return
    match = TIME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f'launch.time must be "HH:MM:SS" or "D-HH:MM:SS", in quotes, got {text!r}')
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if limit <= settings.grace_seconds + SIGNAL_SLACK_SECONDS:
        raise ValueError(
            f"launch.time {text} must be longer than launch.grace_seconds and a minute"
            f" ({settings.grace_seconds} + {SIGNAL_SLACK_SECONDS} s), or the job would stop as soon as it starts"
        )


def check_cluster(settings: SlurmSettings) -> None:
    """Compare with the cluster, where its commands are here.

    Raises:
        ValueError: If the job is to be submitted and Slurm is not here, if there is no such partition, or if none is
            named and the cluster has no default.
    """
    if settings.submit and shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm: no sbatch here; run this where Slurm is, or only write the script: launch.submit=false"
        )
    if shutil.which("sinfo") is None:
        return
    told = subprocess.run(["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True, check=False)
    if told.returncode:
        if settings.submit:
            raise ValueError(f"launch=slurm: sinfo says: {' '.join(told.stderr.split())}")
        return
    names = list(dict.fromkeys(told.stdout.split()))
    known = [name.rstrip("*") for name in names]
    if settings.partition is None:
        if not any(name.endswith("*") for name in names):
            raise ValueError(
                f"launch.partition must be set: this cluster has no default partition; known: {', '.join(known)}"
            )
        return
    for name in settings.partition.split(","):
        if name not in known:
            near = nearest(name, known)
            raise ValueError(
                f"launch.partition: no partition {name!r} in this cluster;"
                f" {f'did you mean {near}?' if near else 'known: ' + ', '.join(known)}"
            )


def processes_per_node(settings: SlurmSettings, processes: int | None) -> int:
    """Return how many processes a node runs: ``processes``, else the section's, else one per GPU, else 1.

    Raises:
        ValueError: If that is below 1 or above the GPUs asked for.
    """
    gpus = settings.gpus_per_node
    per_node = next(number for number in (processes, settings.processes, gpus, 1) if number is not None)
    if per_node < 1 or (gpus and per_node > gpus):
        allowed = f"1 to {gpus} (launch.gpus_per_node)" if gpus else ">= 1"
        raise ValueError(f"launch.processes (--nproc-per-node) must be {allowed}, got {per_node}")
    return per_node


def script(
    settings: SlurmSettings, stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> str:
    """Return the text of the script; arguments as ``submit``."""
    folder = Path(settings.folder).absolute()
    per_node = processes_per_node(settings, processes)
    if settings.mode == "one_job":
        run = 'run_nodes ""'
    else:
        names = " ".join(shlex.quote(name) for name in stages)
        run = f'for stage in {names}; do\n    run_nodes "-$stage" --stage="$stage"\n    [ "$code" = 0 ] || break\ndone'
    python = settings.python or ("python" if settings.container else sys.executable)
    before = [f"module load {shlex.quote(name)}" for name in settings.modules] + settings.setup
    values = {
        "JOB_NAME": settings.job_name,
        "DIRECTIVES": "\n".join(_directives(settings, folder)),
        "DIRECTORY": shlex.quote(str(Path.cwd())),
        "BEFORE": "".join(f"{line}\n" for line in before),
        "SRUN": " ".join(_srun_options(settings)),
        "PYTHON": shlex.quote(python),
        "NODES": settings.nodes,
        "PROCESSES": per_node,
        "GRACE": settings.grace_seconds,
        "SIGNALS": FORWARDED_SIGNALS,
        "CONFIG": shlex.quote(str(config_path.absolute())),
        "WORDS": " \\\n        ".join(shlex.quote(word) for word in words) or '""',
        "RUN": run,
        "FOLDER": shlex.quote(str(folder)),
        "JOB_FILES": JOB_FILES,
        "NODES_VARIABLE": NODES,
        "FAILURES": FAILURES,
        "COMPLETE": COMPLETE,
        "PREEMPTED": EXIT_PREEMPTED,
        "USER_ERROR": EXIT_USER_ERROR,
        "MAX_FAILURES": settings.max_failures,
        "MAX_REQUEUES": settings.max_requeues,
    }
    return re.sub(r"@([A-Z_]+)@", lambda match: str(values[match[1]]), TEMPLATE.read_text(encoding="utf-8"))


def _directives(settings: SlurmSettings, folder: Path) -> list[str]:
    options: dict[str, object] = {
        "job-name": settings.job_name,
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "gpus-per-node": settings.gpus_per_node,
        "cpus-per-task": settings.cpus_per_task,
        "partition": settings.partition,
        "account": settings.account,
        "time": settings.time,
        "signal": f"B:USR1@{settings.grace_seconds + SIGNAL_SLACK_SECONDS}",
        "output": f"{folder}/%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    if settings.exclusive:
        lines += ["#SBATCH --exclusive", "#SBATCH --mem=0"]
    lines.append("#SBATCH --no-requeue" if settings.rehearse else "#SBATCH --requeue")
    return [*lines, *(f"#SBATCH {line}" for line in settings.sbatch)]


def _srun_options(settings: SlurmSettings) -> list[str]:
    options = [f"--nodes={settings.nodes}", f"--ntasks={settings.nodes}", "--ntasks-per-node=1"]
    options += [f"--wait={SIGNAL_SLACK_SECONDS}", "--kill-on-bad-exit=0"]
    if settings.cpus_per_task:
        options.append(f"--cpus-per-task={settings.cpus_per_task}")  # since 22.05 srun does not take sbatch's
    else:
        options.append("--cpu-bind=none")  # a task that names no number of CPUs may be bound to one
    if settings.container:
        options.append(f"--container-image={shlex.quote(settings.container)}")
        options.append('--container-workdir="$PWD"')  # folders on the command line may be relative
        if settings.container_mounts:
            options.append(f"--container-mounts={shlex.quote(','.join(settings.container_mounts))}")
    return options
