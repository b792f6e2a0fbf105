"""Where the checkpoint lies in what a user names: a run, a stage, a checkpoint of training, or a Hugging Face folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from nemo_bard.base.errors import not_one_of, one_line
from nemo_bard.base.files import read_json
from nemo_bard.base.folders import CONFIG
from nemo_bard.checkpoints.folder import WEIGHTS, WEIGHTS_INDEX
from nemo_bard.checkpoints.merge import ADAPTER_CONFIG

IDENTITY, COMPOSED, MANIFEST, STAGE_YAML, STARTED = (
    "pipeline.json", "pipeline.yaml", "manifest.json", "stage.yaml", "started.json",
)  # fmt: skip
"""Files of a chain's run, as ``nemo_bard.pipeline.manifest`` writes them."""
TRAINING_CONFIG = "config.yaml"
METADATA = ".hf_metadata"
"""Where NeMo AutoModel keeps configuration and tokenizer beside sharded weights."""
INCOMPLETE = ".incomplete"
FOLDER, SHARDS, DISTRIBUTED, ADAPTERS = "folder", "shards", "distributed", "adapters"
"""Kinds of checkpoints: a Hugging Face folder; shards of safetensors; torch's own ``.distcp`` files; LoRA adapters alone."""
ALLOWED = (
    "a chain's run folder, a stage, a checkpoint of a training run (or the folder around it), or a Hugging Face folder"
)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A checkpoint that was found."""

    kind: str
    folder: Path
    """Holds the weights."""
    checkpoint: Path | None = None
    """The training checkpoint that it belongs to, with ``config.yaml`` in it."""
    stage: Path | None = None
    """Folder of its stage, if a chain made it."""
    run: Path | None = None
    """The chain's run folder."""

    @property
    def metrics(self) -> Path | None:
        """Folder with ``training.jsonl``."""
        if self.checkpoint is not None:
            return self.checkpoint.parent
        return None if self.stage is None else self.stage / "checkpoints"


def find(source: Path, stage: str | None = None) -> Place:
    """Find the checkpoint that ``source`` stands for.

    Args:
        source: A run folder (its last finished stage counts), a stage folder, a training checkpoint, the folder around
            several (the latest counts), or a Hugging Face folder.
        stage: Name of a stage; ``source`` must be a run folder then.

    Returns:
        The checkpoint, and the run that it is of, as far as its folder tells.

    Raises:
        FileNotFoundError: If there is no checkpoint.
        ValueError: If it is not finished, half-written, or there is no such stage.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; SRC must be {ALLOWED}")
    if (source / IDENTITY).is_file():
        return _of_stage(_stage_folder(source, stage))
    if stage is not None:
        raise ValueError(f"--stage {stage}: {source} is no run folder of a chain (it has no {IDENTITY})")
    if (source / STARTED).is_file() or ((source / MANIFEST).is_file() and (source / "export").is_dir()):
        return _of_stage(source)
    if not (source / CONFIG).is_file():
        for folder in (source, source.parent):  # a checkpoint, or its folder `model`
            if (source == folder or source.name == "model") and (folder / "model").is_dir():
                return _of_checkpoint(folder)
    if (source / ADAPTER_CONFIG).is_file():
        return with_run(ADAPTERS, source)
    if (source / CONFIG).is_file():
        return with_run(FOLDER, source)
    latest = latest_checkpoint(source)
    if latest is None and (source / "checkpoints").is_dir():
        latest = latest_checkpoint(source / "checkpoints")
    if latest is None:
        raise FileNotFoundError(f"{source}: holds no checkpoint; SRC must be {ALLOWED}")
    return _of_checkpoint(latest)


def latest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that ``LATEST`` names, else the one of the last step that is not half-written, if any."""
    latest = folder / "LATEST"
    if latest.is_file():  # where the file system has no symbolic links
        latest = folder / latest.read_text(encoding="utf-8").strip()
    if (latest / "model").is_dir() and not (latest.resolve() / INCOMPLETE).exists():
        return latest.resolve()
    found = [
        path for path in folder.glob("epoch_*_step_*") if (path / "model").is_dir() and not (path / INCOMPLETE).exists()
    ]
    steps = [(int(number), path) for path in found if (number := path.name.rpartition("_")[2]).isdigit()]
    return max(steps)[1] if steps else None


def stage_folders(run: Path) -> dict[str, Path]:
    """Names of a chain's stages, in order, and their folders."""
    names = (read_json(run / IDENTITY) or {}).get("stages") or []
    sections = read_yaml(run / COMPOSED).get("stage") or {}
    outputs = {name: (section or {}).get("output") for name, section in sections.items()}
    return {name: run / (outputs.get(name) or name) for name in names}


def read_yaml(file: Path) -> dict[str, Any]:
    """Return the section that a YAML file holds, an empty one if there is no such file.

    Raises:
        ValueError: If it cannot be read, or holds anything else.
    """
    if not file.is_file():
        return {}
    try:
        value = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: not a YAML file: {one_line(error)}") from error
    if not isinstance(value, dict | None):
        raise ValueError(f"{file}: must hold a section, got {type(value).__name__}")
    return value or {}


def _stage_folder(run: Path, wanted: str | None) -> Path:
    folders = stage_folders(run)
    if wanted is not None:
        if wanted not in folders:
            raise not_one_of("--stage", wanted, folders)
        return folders[wanted]
    finished = [folder for folder in folders.values() if (folder / MANIFEST).is_file()]
    if not finished:
        begun = [folder for folder in folders.values() if (folder / STARTED).is_file()]
        raise ValueError(f"{run}: no stage is finished{_hint(begun[-1]) if begun else ''}")
    return finished[-1]


def _hint(stage: Path) -> str:
    latest = latest_checkpoint(stage / "checkpoints") if (stage / "checkpoints").is_dir() else None
    return (
        f"; to export what it has so far, name its checkpoint {latest}" if latest else ", and it has no checkpoint yet"
    )


def _of_stage(folder: Path) -> Place:
    record = read_json(folder / MANIFEST)
    if record is None:
        what = "is not finished" if (folder / STARTED).is_file() else "has not begun"
        raise ValueError(f"stage {folder.name} of {folder.parent} {what}{_hint(folder)}")
    run = _run_of(folder.absolute())
    export = folder / "export" if run is None else export_of(folder, record, run)
    if not (export / CONFIG).is_file():
        raise FileNotFoundError(f"{export}: has no {CONFIG}, though the stage is finished; run the chain again")
    return replace(with_run(FOLDER, export), stage=folder.resolve(), run=run)


def export_of(stage: Path, record: Mapping[str, Any], run: Path) -> Path:
    """The folder that a finished stage hands on: its own, or a start point that lies elsewhere."""
    named = record.get("export")
    return stage / "export" if named is None else run / named


def _run_of(stage: Path) -> Path | None:
    return next((path for path in stage.parents if (path / IDENTITY).is_file()), None)


def _of_checkpoint(checkpoint: Path) -> Place:
    if (checkpoint.resolve() / INCOMPLETE).exists():
        raise ValueError(f"{checkpoint}: half-written, its save was interrupted; name an earlier checkpoint")
    model = checkpoint / "model"
    if (model / "consolidated" / CONFIG).is_file():
        return with_run(FOLDER, model / "consolidated")
    if (model / ADAPTER_CONFIG).is_file():
        return with_run(ADAPTERS, model)
    if any(model.glob("*.safetensors")):
        whole = (model / WEIGHTS).is_file() or (model / WEIGHTS_INDEX).is_file()
        return with_run(FOLDER if whole and (model / CONFIG).is_file() else SHARDS, model)
    if (model / ".metadata").is_file():
        return with_run(DISTRIBUTED, model)
    raise FileNotFoundError(f"{model}: holds no model weights (*.safetensors, {ADAPTER_CONFIG} or .metadata)")


def with_run(kind: str, folder: Path) -> Place:
    """Describe a checkpoint with the run that the folders around it are of.

    Args:
        kind: What it is.
        folder: Holds its weights.
    """
    resolved = folder.resolve()
    checkpoint = next((path for path in resolved.parents[:2] if (path / TRAINING_CONFIG).is_file()), None)
    stage = None
    for path in (resolved.parent, *([] if checkpoint is None else [checkpoint.parent.parent])):
        if (path / STARTED).is_file() or (path / STAGE_YAML).is_file():
            stage = path
    run = None if stage is None else _run_of(stage)
    return Place(kind=kind, folder=folder, checkpoint=checkpoint, stage=stage, run=run)
