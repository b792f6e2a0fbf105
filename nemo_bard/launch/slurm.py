"""One Slurm job for a chain: the script that it is, and its submission.

The job starts one torchrun per node in one ``srun`` and looks at the exit code: 0 ends it, a user's mistake ends it, a
preemption signal or a failure puts it back into the queue, where the next go resumes the chain.
"""

from __future__ import annotations

import difflib
import json
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nemo_bard.launch.local import COMPLETE, EXIT_PREEMPTED, EXIT_USER_ERROR, FAILURES, FORWARDED_SIGNALS, JOB_FILES

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
LISTS = ("modules", "setup", "container_mounts", "sbatch")

ENVIRONMENT = ("export PYTHONUNBUFFERED=1", "export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}")

TRAP = """
# USR1 comes before the time limit, TERM before preemption. Workers take either as: save and stop.
stopped=no
step=
stop() {
    stopped=yes
    [ -z "$step" ] || kill -USR1 "$step" 2>/dev/null
}
trap stop USR1 TERM
"""
BODY = r"""
# This go. A worker removes the record of failures when there is a new checkpoint, and says when the chain is complete.
export @JOB_FILES@=@FOLDER@/$SLURM_JOB_ID
restarts=${SLURM_RESTART_COUNT:-0}
[ "$restarts" != 0 ] || rm -f "$@JOB_FILES@@FAILURES@" "$@JOB_FILES@@COMPLETE@"  # of an earlier job of this number
echo "slurm: job $SLURM_JOB_ID, go $((restarts + 1)), $(date '+%F %T'), $SLURM_JOB_NODELIST, @NODES@ x @PROCESSES@ processes"

# The first node of the allocation is the meeting point. Slurm's address of it, as its name need not be in the DNS.
first_node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first_node" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
port=$((20000 + $(cksum <<<"$@JOB_FILES@" | cut -d " " -f 1) % 12000))

# One torchrun per node, which passes the signal on to its workers; sets code. When the first node has ended, the others
# have a minute.
run_nodes() {
    code=@PREEMPTED@
    [ "$stopped" = no ] || return
    srun @SRUN@ \
        @PYTHON@ -m nemo_bard.launch \
        --nnodes=@NODES@ --nproc-per-node=@PROCESSES@ --max-restarts=0 \
        --rdzv-backend=c10d --rdzv-endpoint="$address:$port" --rdzv-id="$SLURM_JOB_ID$1" \
        --shutdown-timeout=@GRACE@ --signals-to-handle=@SIGNALS@ \
        -m nemo_bard.cli finetune --config @CONFIG@ \
        @WORDS@ "${@:2}" &
    step=$!
    [ "$stopped" = no ] || kill -USR1 "$step"  # it came just now
    wait "$step"
    code=$?
    while kill -0 "$step" 2>/dev/null; do  # a trap ended the wait, not the step
        wait "$step"
        code=$?
    done
    step=
}

@RUN@

# What now? 0: complete, also if a signal came when everything was done. @USER_ERROR@: a mistake in the command or its files,
# which would be there again.
if [ "$code" = 0 ] || [ -f "$@JOB_FILES@@COMPLETE@" ]; then
    echo "slurm: the chain is complete after $restarts requeues"
    exit 0
fi
if [ "$code" = @USER_ERROR@ ]; then
    echo "slurm: not requeued, see the error above"
    exit "$code"
fi
if [ "$stopped" = no ] && [ "$code" != @PREEMPTED@ ]; then
    echo "go $((restarts + 1)): exit code $code" >>"$@JOB_FILES@@FAILURES@"
    if [ "$(wc -l <"$@JOB_FILES@@FAILURES@")" -ge @MAX_FAILURES@ ]; then
        echo "slurm: not requeued, @MAX_FAILURES@ failures without a new checkpoint in between (launch.max_failures);" \
            "the last exit code is $code"
        exit "$code"
    fi
fi
if [ "$restarts" -ge @MAX_REQUEUES@ ]; then
    echo "slurm: not requeued, $restarts requeues (launch.max_requeues); the last exit code is $code"
    exit "$code"
fi
for pause in 5 15 40 0; do  # the controller may be busy
    state=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T) && break
    sleep $pause
done
if [ "$state" != RUNNING ]; then  # cancelled by a person, or being requeued by Slurm
    echo "slurm: stopped with exit code $code, not requeued; Slurm says ${state:-nothing}"
    exit "$code"
fi
echo "slurm: stopped with exit code $code, back into the queue (requeue $((restarts + 1)))"
scontrol requeue "$SLURM_JOB_ID" || exit "$code"
"""


def submit(
    settings: Mapping[str, Any], stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> int:
    """Write the script of a chain into ``settings["folder"]`` and submit it.

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
    folder = Path(settings["folder"]).absolute()
    number, state = find_job(folder) or (None, None)
    if settings["submit"] and state is not None:
        raise ValueError(
            f"{folder}: job {number} of an earlier command is {state}; wait for it, or scancel {number} first"
        )
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "job.sbatch"
    path.write_text(text)
    path.chmod(0o755)
    sys.stdout.write(f"script: {path}\n")
    if settings["submit"]:
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


def check(settings: Mapping[str, Any]) -> None:
    """Check the values of the ``launch`` section.

    Raises:
        ValueError: One line naming the key, its value and what is allowed.
    """
    for key in ("nodes", "max_failures", "max_requeues", "gpus_per_node", "cpus_per_task"):
        value, least = settings[key], 0 if key == "max_requeues" else 1
        if value is None and key in ("gpus_per_node", "cpus_per_task"):
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"launch.{key} must be an integer >= {least}, got {value!r}")
    if not isinstance(settings["submit"], bool):
        raise ValueError(f"launch.submit must be true or false, got {settings['submit']!r}")
    for key in ("partition", "account", "job_name"):
        value = settings[key]
        if (value is not None or key == "job_name") and not (
            isinstance(value, str) and re.fullmatch(r"[\w.,+-]+", value)
        ):
            raise ValueError(f"launch.{key} must be a name without spaces, got {value!r}")
    for key in ("python", "container", "folder"):
        value = settings[key]
        if (value is not None or key == "folder") and not (isinstance(value, str) and value and "\n" not in value):
            raise ValueError(f"launch.{key} must be one line of text, got {value!r}")
    if re.search(r"[\s%\\]", str(Path(settings["folder"]).absolute())):
        raise ValueError(f"launch.folder must not have spaces, % or backslashes in it, got {settings['folder']!r}")
    for key in LISTS:
        value = settings[key]
        if not isinstance(value, list) or not all(
            isinstance(line, str) and line and "\n" not in line for line in value
        ):
            raise ValueError(f"launch.{key} must be a list of lines, got {value!r}")
    if settings["container_mounts"] and settings["container"] is None:
        raise ValueError("launch.container_mounts needs launch.container")
    for line in settings["sbatch"]:
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


def _check_time(settings: Mapping[str, Any]) -> None:
    text = settings["time"]
    if text is None:
        return
    match = TIME.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        raise ValueError(f'launch.time must be "HH:MM:SS" or "D-HH:MM:SS", in quotes, got {text!r}')
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    limit = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if limit <= settings["grace_seconds"] + SIGNAL_SLACK_SECONDS:
        raise ValueError(
            f"launch.time {text} must be longer than launch.grace_seconds and a minute"
            f" ({settings['grace_seconds']} + {SIGNAL_SLACK_SECONDS} s), or the job would stop as soon as it starts"
        )


def check_cluster(settings: Mapping[str, Any]) -> None:
    """Compare with the cluster, where its commands are here.

    Raises:
        ValueError: If the job is to be submitted and Slurm is not here, if there is no such partition, or if none is
            named and the cluster has no default.
    """
    if settings["submit"] and shutil.which("sbatch") is None:
        raise ValueError(
            "launch=slurm: no sbatch here; run this where Slurm is, or only write the script: launch.submit=false"
        )
    if shutil.which("sinfo") is None:
        return
    told = subprocess.run(["sinfo", "--noheader", "--format=%P"], capture_output=True, text=True, check=False)
    if told.returncode:
        if settings["submit"]:
            raise ValueError(f"launch=slurm: sinfo says: {' '.join(told.stderr.split())}")
        return
    names = list(dict.fromkeys(told.stdout.split()))
    known = [name.rstrip("*") for name in names]
    if settings["partition"] is None:
        if not any(name.endswith("*") for name in names):
            raise ValueError(
                f"launch.partition must be set: this cluster has no default partition; known: {', '.join(known)}"
            )
        return
    for name in settings["partition"].split(","):
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            raise ValueError(
                f"launch.partition: no partition {name!r} in this cluster;"
                f" {f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(known)}"
            )


def processes_per_node(settings: Mapping[str, Any], processes: int | None) -> int:
    """Return how many processes a node runs: ``processes``, else the section's, else one per GPU, else 1.

    Raises:
        ValueError: If that is below 1 or above the GPUs asked for.
    """
    gpus = settings["gpus_per_node"]
    per_node = next(number for number in (processes, settings["processes"], gpus, 1) if number is not None)
    if per_node < 1 or (gpus and per_node > gpus):
        allowed = f"1 to {gpus} (launch.gpus_per_node)" if gpus else ">= 1"
        raise ValueError(f"launch.processes (--nproc-per-node) must be {allowed}, got {per_node}")
    return per_node


def script(
    settings: Mapping[str, Any], stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
) -> str:
    """Return the text of the script; arguments as ``submit``."""
    folder = Path(settings["folder"]).absolute()
    per_node = processes_per_node(settings, processes)
    if settings["mode"] == "one_job":
        run = 'run_nodes ""'
    else:
        names = " ".join(shlex.quote(name) for name in stages)
        run = f'for stage in {names}; do\n    run_nodes "-$stage" --stage="$stage"\n    [ "$code" = 0 ] || break\ndone'
    python = settings["python"] or ("python" if settings["container"] else sys.executable)
    values = {
        "SRUN": " ".join(_srun_options(settings)),
        "PYTHON": shlex.quote(python),
        "NODES": settings["nodes"],
        "PROCESSES": per_node,
        "GRACE": settings["grace_seconds"],
        "SIGNALS": FORWARDED_SIGNALS,
        "CONFIG": shlex.quote(str(config_path.absolute())),
        "WORDS": " \\\n        ".join(shlex.quote(word) for word in words) or '""',
        "RUN": run,
        "FOLDER": shlex.quote(str(folder)),
        "JOB_FILES": JOB_FILES,
        "FAILURES": FAILURES,
        "COMPLETE": COMPLETE,
        "PREEMPTED": EXIT_PREEMPTED,
        "USER_ERROR": EXIT_USER_ERROR,
        "MAX_FAILURES": settings["max_failures"],
        "MAX_REQUEUES": settings["max_requeues"],
    }
    body = re.sub(r"@([A-Z_]+)@", lambda match: str(values[match[1]]), BODY)
    before = [f"module load {shlex.quote(name)}" for name in settings["modules"]] + settings["setup"]
    lines = ["#!/bin/bash", f"# Chain {settings['job_name']}: nodes x processes = {settings['nodes']} x {per_node};"]
    lines += ["# written by nemo-bard, and written anew by the same command.", *_directives(settings, folder)]
    lines += [TRAP, f"cd {shlex.quote(str(Path.cwd()))} || exit {EXIT_USER_ERROR}", *ENVIRONMENT, *before]
    return "\n".join(lines) + "\n" + body


def _directives(settings: Mapping[str, Any], folder: Path) -> list[str]:
    options: dict[str, object] = {
        "job-name": settings["job_name"],
        "nodes": settings["nodes"],
        "ntasks-per-node": 1,
        "gpus-per-node": settings["gpus_per_node"],
        "cpus-per-task": settings["cpus_per_task"],
        "partition": settings["partition"],
        "account": settings["account"],
        "time": settings["time"],
        "signal": f"B:USR1@{settings['grace_seconds'] + SIGNAL_SLACK_SECONDS}",
        "output": f"{folder}/%j.log",
        "open-mode": "append",
    }
    lines = [f"#SBATCH --{name}={value}" for name, value in options.items() if value is not None]
    return [*lines, "#SBATCH --requeue", *(f"#SBATCH {line}" for line in settings["sbatch"])]


def _srun_options(settings: Mapping[str, Any]) -> list[str]:
    options = [f"--nodes={settings['nodes']}", f"--ntasks={settings['nodes']}", "--ntasks-per-node=1"]
    options += [f"--wait={SIGNAL_SLACK_SECONDS}", "--kill-on-bad-exit=0"]
    if settings["cpus_per_task"]:
        options.append(f"--cpus-per-task={settings['cpus_per_task']}")  # since 22.05 srun does not take sbatch's
    if settings["container"]:
        options.append(f"--container-image={shlex.quote(settings['container'])}")
        options.append('--container-workdir="$PWD"')  # folders on the command line may be relative
        if settings["container_mounts"]:
            options.append(f"--container-mounts={shlex.quote(','.join(settings['container_mounts']))}")
    return options
