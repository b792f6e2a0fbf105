"""What a run directory says about itself: digests, manifests written last, checkpoints worth going on from.

A stage is finished when its ``manifest.json`` is there; it is written after everything else, whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.files import link_or_copy, sync_folder, sync_tree, write_json, write_text, write_whole
from nemo_bard.checkpoints.folder import read_header
from nemo_bard.pipeline.job import Job, Stage

logger = logging.getLogger(__name__)

MANIFEST, STARTED, STAGE_YAML, PROGRESS, EVAL = (
    "manifest.json", "started.json", "stage.yaml", "progress.json", "eval.json",
)  # fmt: skip
IDENTITY, COMPOSED = "pipeline.json", "pipeline.yaml"
EXPORTED = Path("model/consolidated")
INCOMPLETE = ".incomplete"
"""Upstream's mark of a checkpoint that is being written (components/checkpoint/utils.py, 0.7.0)."""


# ------------------ digests ------------------
def digest(value: object) -> str:
    """SHA-256 of a plain value, independent of the order of keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def hash_file(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(path: Path, known: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Size, time and SHA-256 of a file, or of every file in a folder, by relative name.

    Args:
        path: File or folder; hidden files are left out.
        known: An earlier fingerprint: files with its size and time are not read again.

    Raises:
        FileNotFoundError: If ``path`` does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file() and p.name[0] != ".")
    found = {}
    for file in files:
        name = file.name if path.is_file() else file.relative_to(path).as_posix()
        stat = file.stat()
        old = (known or {}).get(name, {})
        same = (old.get("size"), old.get("mtime_ns")) == (stat.st_size, stat.st_mtime_ns)
        found[name] = {
            "size": stat.st_size,
            "mtime_ns": stat.st_mtime_ns,
            "sha256": old["sha256"] if same else hash_file(file),
        }
    return found


def content(prints: Mapping[str, Mapping[str, Any]]) -> str:
    """One digest of a fingerprint: names and contents, no times."""
    return digest({name: entry["sha256"] for name, entry in prints.items()})


# ------------------ finished stages ------------------
def export_of(job: Job, record: Mapping[str, Any]) -> Path:
    """The folder that a finished stage hands on: its own, or the start point that it was given."""
    return job.run_dir / record["export"]


def finish(stage: Stage, job: Job, started: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Write the manifest of a stage whose export is complete, last of all its files."""
    files = fingerprint(stage.export)
    record = {
        "stage": stage.name,
        "export": stage.export.relative_to(job.run_dir).as_posix(),
        "content": content(files),
        **started,
        **facts,
        "files": files,
    }
    write_json(stage.folder / MANIFEST, record)
    return record


def link_export(source: Path, target: Path) -> None:
    """Make ``target`` of the files of ``source``, hard-linked where possible, whole or not at all."""
    with write_whole(target) as folder:
        for file in sorted(p for p in source.rglob("*") if p.is_file()):
            place = folder / file.relative_to(source)
            place.parent.mkdir(parents=True, exist_ok=True)
            link_or_copy(file, place)
        sync_tree(folder)
    sync_folder(target.parent)


# ------------------ checkpoints ------------------
def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """Find the newest checkpoint that is whole.

    Args:
        folder: ``checkpoint_dir`` of a recipe.

    Returns:
        The checkpoint or None, and what is wrong with newer ones, one line each.
    """
    found = [(_step_of(path), path) for path in folder.glob("epoch_*_step_*") if path.is_dir()]
    wrong = []
    for _, path in sorted(((step, path) for step, path in found if step is not None), reverse=True):
        problem = checkpoint_problem(path)
        if problem is None:
            return path, wrong
        wrong.append(f"{path}: {problem}")
    return None, wrong


def _step_of(path: Path) -> int | None:
    number = path.name.rpartition("_")[2]
    return int(number) if number.isdigit() else None


def checkpoint_problem(path: Path) -> str | None:
    """Say why a checkpoint of NeMo AutoModel cannot be gone on from, or return None if it can."""
    if (path / INCOMPLETE).exists():
        return "half-written, its save was interrupted"
    shards = list((path / "model").glob("*.safetensors"))
    stream = path / "data_stream.pt"  # not in checkpoints of earlier versions
    state = (path / "step_scheduler.pt", path / "config.yaml", path / "optim" / ".metadata")
    for needed in (*state, stream) if stream.exists() else state:
        if not needed.is_file() or needed.stat().st_size == 0:
            return f"{needed.relative_to(path)} is missing or empty"
    if not shards:
        return "it holds no model weights"
    for shard in shards:
        try:
            read_header(shard)
        except ValueError as error:
            return str(error).removeprefix(f"{shard}: ")
    empty = [file for file in (path / "optim").glob("*.distcp") if file.stat().st_size == 0]
    return f"{empty[0].relative_to(path)} is empty" if empty else None


def set_aside(paths: Iterable[str]) -> None:
    """Mark damaged checkpoints as half-written, so that the recipe neither reads nor protects them."""
    for line in paths:
        (Path(line.partition(": ")[0]) / INCOMPLETE).touch()


def keep_steps(file: Path, steps: int) -> None:
    """Cut a metrics file (JSON lines) back to the first ``steps`` steps, those that a checkpoint knows."""
    if not file.is_file():
        return
    kept: dict[int, str] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line that was being written when the run was cut off
        if step < steps:
            kept[step] = line
    write_text(file, "".join(f"{line}\n" for line in kept.values()))
