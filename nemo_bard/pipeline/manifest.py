"""What a run directory says about itself: digests, manifests written last, checkpoints worth going on from.

A stage is finished when its ``manifest.json`` is there; it is written after everything else, whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nemo_bard.base.files import link_or_copy, read_json, sync_folder, sync_tree, write_json, write_text, write_whole
from nemo_bard.checkpoints.folder import read_header
from nemo_bard.pipeline.job import OWN_KEYS, RUN_DIR, Job, Stage
from nemo_bard.train.recipe_file import translate

logger = logging.getLogger(__name__)

MANIFEST, STARTED, STAGE_YAML, PROGRESS, EVAL = (
    "manifest.json", "started.json", "stage.yaml", "progress.json", "eval.json",
)  # fmt: skip
IDENTITY, COMPOSED = "pipeline.json", "pipeline.yaml"
EXPORTED = Path("model/consolidated")
INCOMPLETE = ".incomplete"
"""Upstream's mark of a checkpoint that is being written (components/checkpoint/utils.py, 0.7.0)."""
PACKAGES = ("nemo-bard", "nemo-automodel", "torch", "transformers")
NOT_COMPARED = (
    *(key for key in OWN_KEYS if not key.endswith("pretrained_model_name_or_path")),
    "checkpoint.max_recent_checkpoints", "dist_env", "wandb", "mlflow", "dataloader.num_workers",
    "dataloader.pin_memory", "dataloader.persistent_workers", "dataloader.prefetch_factor",
    "validation_dataloader.num_workers", "step_scheduler.ckpt_every_steps", "step_scheduler.log_remote_every_steps",
    "step_scheduler.gc_every_steps", "step_scheduler.loss_average_window_steps",
    "on_bad_sample",
)  # fmt: skip
"""Keys of a recipe that change how a stage runs but not what comes out; they may differ when a run goes on."""


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


def versions() -> dict[str, str]:
    """Installed versions of what a result depends on."""
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def compared_config(stage: Stage, job: Job) -> dict[str, Any]:
    """What decides the result of a stage, with the run directory as a placeholder."""
    config: dict[str, Any] = {"kind": stage.kind, **stage.settings}
    names = {s.name for s in job.stages}
    config["named"] = {  # what cannot be compared by its content
        use: value for use, value in stage.inputs.items() if value not in names and not Path(value).is_dir()
    }
    if stage.recipe is not None:
        config["recipe"] = translate(stage.recipe)
        for dotted in NOT_COMPARED:
            *parents, leaf = dotted.split(".")
            node = config["recipe"]
            for name in parents:
                node = node.get(name) or {}
            if isinstance(node, dict):
                node.pop(leaf, None)
    return json.loads(json.dumps(config, sort_keys=True, default=str).replace(str(job.run_dir), RUN_DIR))


def external_inputs(stage: Stage, job: Job) -> dict[str, Path]:
    """Files and folders that a stage reads and that no stage of the chain writes, by use."""
    found: dict[str, Path] = {}
    for use, value in stage.inputs.items():
        path = job.input_path(value)
        if value not in {s.name for s in job.stages} and isinstance(path, Path):
            found[use] = path
    for section in ("dataset", "validation_dataset"):
        path = ((stage.recipe or {}).get(section) or {}).get("path")
        if isinstance(path, str) and Path(path).exists():
            found[section] = Path(path)
    return found


def input_digests(stage: Stage, job: Job, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Digests of everything a stage reads: ``{use: {"content": ..., "files": ...}}``.

    Args:
        stage: The stage; earlier stages that it reads from are finished.
        job: Its chain.
        known: The result of an earlier run, to save reading unchanged files.
    """
    result: dict[str, Any] = {}
    for use, value in stage.inputs.items():
        if value in {s.name for s in job.stages}:
            manifest = read_json(job.stage(value).folder / MANIFEST)
            if manifest is None:
                raise ValueError(f"stage {stage.name} needs the export of stage {value}, which is not finished")
            result[use] = {"content": manifest["content"]}
    for use, path in external_inputs(stage, job).items():
        files = fingerprint(path, ((known or {}).get(use) or {}).get("files"))
        result[use] = {"content": content(files), "files": files}
    return result


def describe(stage: Stage, job: Job, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What a stage would be made from now: configuration, versions and inputs."""
    return {
        "config": compared_config(stage, job),
        "versions": versions(),
        "inputs": input_digests(stage, job, (known or {}).get("inputs")),
    }


def check_same(stage: Stage, job: Job, old: Mapping[str, Any], new: Mapping[str, Any], state: str) -> None:
    """Refuse to go on from something that was made from something else.

    Raises:
        ValueError: Names the first key, version or input that differs.
    """
    advice = f"use another run_dir, or delete {stage.folder} to train this stage again"
    difference = first_difference(old["config"], new["config"])
    if difference:
        key, before, now = difference
        raise ValueError(f"stage {stage.name} was {state} with {key}={before!r}, now it is {now!r}; {advice}")
    if not job.allow_version_change:
        for package, version in new["versions"].items():
            if old["versions"].get(package) != version:
                raise ValueError(
                    f"stage {stage.name} was {state} with {package} {old['versions'].get(package)}, now {version};"
                    f" set allow_version_change=true, {advice}"
                )
    for use in sorted(old["inputs"].keys() | new["inputs"].keys()):
        before, now = old["inputs"].get(use, {}), new["inputs"].get(use, {})
        if before.get("content") != now.get("content"):
            name = stage.inputs.get(use) or external_inputs(stage, job).get(use) or use
            raise ValueError(f"stage {stage.name} was {state} with another content of its {use} {name}; {advice}")


def first_difference(old: object, new: object, prefix: str = "") -> tuple[str, object, object] | None:
    """Return the first dotted key at which two nested values differ, with both values."""
    if isinstance(old or {}, Mapping) and isinstance(new or {}, Mapping) and (old or new):
        old, new = old or {}, new or {}
        for key in [*new, *(key for key in old if key not in new)]:
            found = first_difference(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
            if found:
                return found
        return None
    same = old == new or (old in (None, {}) and new in (None, {}))  # a section may have lost all its compared keys
    return None if same else (prefix.removeprefix("recipe."), old, new)


# ------------------ finished stages ------------------
def finished(stage: Stage, job: Job) -> dict[str, Any] | None:
    """Return the manifest of a finished stage after checking it, or None if the stage is not finished.

    Raises:
        ValueError: If the stage was made from something else, or its export is damaged.
    """
    manifest = read_json(stage.folder / MANIFEST)
    if manifest is None:
        return None
    check_same(stage, job, manifest, describe(stage, job, manifest), "finished")
    export = export_of(stage, job, manifest)
    if not export.is_dir():
        raise ValueError(f"stage {stage.name} is finished, but its export {export} is missing; delete {stage.folder}")
    now = fingerprint(export, manifest["files"])
    for name, entry in manifest["files"].items():
        if name not in now or now[name]["sha256"] != entry["sha256"]:
            state = "missing" if name not in now else "not what the stage wrote"
            raise ValueError(
                f"stage {stage.name} is finished, but {export / name} is {state}; delete {stage.folder} to make it again"
            )
    return manifest


def export_of(stage: Stage, job: Job, manifest: Mapping[str, Any]) -> Path:
    """The folder that a finished stage hands on: its own, or the start point that it was given."""
    return job.run_dir / manifest["export"]


def finish(stage: Stage, job: Job, started: Mapping[str, Any], **facts: Any) -> dict[str, Any]:
    """Write the manifest of a stage whose export is complete, last of all its files."""
    files = fingerprint(stage.export)
    manifest = {
        "stage": stage.name,
        "export": stage.export.relative_to(job.run_dir).as_posix(),
        "content": content(files),
        **started,
        **facts,
        "files": files,
    }
    write_json(stage.folder / MANIFEST, manifest)
    return manifest


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
    candidates = [path for path in folder.glob("epoch_*_step_*") if path.is_dir() and _step_of(path) is not None]
    wrong = []
    for path in sorted(candidates, key=_step_of, reverse=True):
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
    for needed in (path / "step_scheduler.pt", path / "config.yaml", path / "optim" / ".metadata"):
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
