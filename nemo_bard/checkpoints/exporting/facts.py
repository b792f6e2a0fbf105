"""What a run's own files say of how a checkpoint came about; what they do not say stays None or empty."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nemo_bard.base.files import read_json
from nemo_bard.base.folders import CONFIG
from nemo_bard.base.metrics import read_lines, tail_loss
from nemo_bard.checkpoints.exporting import places
from nemo_bard.checkpoints.exporting.base_model import base_names, front_matter
from nemo_bard.checkpoints.exporting.data_facts import DataFacts, read_data
from nemo_bard.checkpoints.exporting.places import Place

KINDS = {
    "PBMRecipe": "block diffusion (PBM)",
    "SWDRecipe": "distillation (SWD)",
    "FinetuneRecipeForVLM": "autoregressive",
}
"""Recipe class -> what it does."""
START_KINDS = {"convert": "conversion, weights unchanged", "tiny": "random weights"}
"""Kind of a stage without training -> what it does."""


@dataclass(frozen=True, kw_only=True)
class StageFacts:
    """One step on the way to the checkpoint."""

    name: str
    kind: str
    block_size: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    batch_size: int | None = None
    samples: int | None = None
    """Over all steps."""
    tokens: int | None = None
    """That the loss was computed on, over all steps."""
    loss: float | None = None
    """Mean of the last tenth of the steps."""
    validation_loss: float | None = None
    anchor: str | None = None
    adapters: str | None = None
    scores: dict[str, Any] | None = None
    """``eval.json`` without its samples."""
    data: DataFacts | None = None
    versions: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RunFacts:
    """How a checkpoint came about."""

    stages: tuple[StageFacts, ...] = ()
    """From the first to the one that made it."""
    base_model: str | None = None
    """Name on the hub."""
    base_folder: str | None = None
    """Name of the folder that it began with, where no name on the hub is known."""
    license: str | None = None
    pipeline: str | None = None
    evaluated_on: str | None = None
    calibration: dict[str, Any] | None = None
    """``calibration.json``."""
    folders: tuple[Path, ...] = ()
    """What each stage began with, the last stage's first, as far as it is still there."""


def read_facts(place: Place, base: Path | None = None) -> RunFacts:
    """Read what is known of a checkpoint.

    Args:
        place: Where it is.
        base: The folder that it began with, if the user named it.
    """
    stages: list[StageFacts] = []
    composed: dict[str, Any] = {}
    started: str | None = None
    card: dict[str, Any] = front_matter(place.folder)
    here: Place | None = place
    seen: list[Path] = []
    while here is not None:
        stage, before = _read_stage(here)
        if stage is None:
            break
        composed = composed or ({} if here.run is None else places.read_yaml(here.run / places.COMPOSED))
        started = str(base) if base is not None and not stages else before
        stages.append(stage)
        folder, here = None if started is None else Path(started), None
        if folder is not None and (folder / CONFIG).is_file() and folder.resolve() not in seen:
            seen.append(folder.resolve())
            card = card or front_matter(folder)
            here = places.with_run(places.FOLDER, folder)
    hub, local = base_names(started, card)
    evaluation = (composed.get("evaluation") or {}).get("data")
    return RunFacts(
        stages=tuple(reversed(stages)),
        base_model=hub,
        base_folder=local,
        license=card.get("license") if isinstance(card.get("license"), str) else None,
        pipeline=composed.get("name"),
        evaluated_on=None if evaluation is None else public_name(evaluation),
        calibration=_calibration(place),
        folders=tuple(seen),
    )


def public_name(value: str) -> str:
    """A data set, or its file, without the folders of this machine."""
    return value if "/" not in value or not value.startswith(("/", ".", "~")) else Path(value).name


# ------------------ one stage ------------------
def began_with(place: Place) -> str | None:
    """What the step that made a checkpoint began with: a folder, or a name on the hub; None if no file says."""
    return _read_stage(place)[1]


def _read_stage(place: Place) -> tuple[StageFacts | None, str | None]:
    """What is known of the step that made a checkpoint, and what it began with: a folder, or a name on the hub."""
    record = {} if place.stage is None else read_json(place.stage / places.MANIFEST) or {}
    started = {} if place.stage is None else read_json(place.stage / places.STARTED) or {}
    recipe = {}
    if place.checkpoint is not None:
        recipe = places.read_yaml(place.checkpoint / places.TRAINING_CONFIG)
    elif place.stage is not None:
        recipe = places.read_yaml(place.stage / places.STAGE_YAML)
    versions = record.get("versions") or started.get("versions") or {}
    before = _before(place, record or started, recipe)
    if not recipe:
        kind = ((record or started).get("config") or {}).get("kind")
        if kind is None or place.stage is None:
            return None, None
        text = START_KINDS.get(kind, str(kind))
        size = record["config"].get("block_size") if kind == "convert" and record else None
        return StageFacts(name=place.stage.name, kind=text, block_size=size, versions=versions), before
    facts = _read_recipe(recipe, place)
    scores = read_json(place.stage / "eval.json") if place.stage is not None and _is_final(place) else None
    if scores is not None:
        scores = {key: value for key, value in scores.items() if key != "samples"}
    return replace(facts, versions=versions, scores=scores), before


def _is_final(place: Place) -> bool:
    """Whether a checkpoint is what its stage has been scored with: its export, or the checkpoint that was made of."""
    if place.checkpoint is None or place.stage is None:
        return True
    finished = (place.stage / places.MANIFEST).is_file()
    return finished and place.checkpoint == places.latest_checkpoint(place.checkpoint.parent)


def _read_recipe(recipe: Mapping[str, Any], place: Place) -> StageFacts:
    name = place.stage.name if place.stage is not None else None
    if name is None:
        name = place.metrics.name if place.metrics is not None else "training"
    last = _last_step(place)
    lines = [line for line in _lines(place, "training.jsonl") if last is None or line["step"] <= last]
    validation = [line for line in _lines(place, "validation.jsonl") if last is None or line["step"] <= last]
    anchor = (recipe.get("anchor") or {}).get("pretrained_model_name_or_path")
    peft = recipe.get("peft") or {}
    target = str(recipe.get("recipe") or "").rpartition(".")[2]
    return StageFacts(
        name=name,
        kind=KINDS.get(target, target or "training"),
        block_size=(recipe.get("model") or {}).get("block_size"),
        steps=None if not lines else lines[-1]["step"] + 1,
        learning_rate=(recipe.get("optimizer") or {}).get("lr"),
        batch_size=(recipe.get("step_scheduler") or {}).get("global_batch_size"),
        samples=_sum(lines, "num_samples"),
        tokens=_sum(lines, "num_loss_tokens"),
        loss=tail_loss(lines) if all("loss" in line for line in lines) else None,
        validation_loss=validation[-1].get("val_loss") if validation else None,
        anchor=None if anchor is None else _name_of(anchor),
        adapters=f"LoRA of rank {peft['dim']}" if peft.get("dim") else "LoRA" if peft else None,
        data=read_data(recipe.get("dataset")),
    )


def _lines(place: Place, name: str) -> list[dict[str, Any]]:
    return [] if place.metrics is None else read_lines(place.metrics / name)


def _sum(lines: list[dict[str, Any]], key: str) -> int | None:
    """Sum over all steps; None unless every step says it, and none is missing."""
    whole = lines and len(lines) == lines[-1]["step"] + 1 and all(isinstance(line.get(key), int) for line in lines)
    return sum(line[key] for line in lines) if whole else None


def _last_step(place: Place) -> int | None:
    number = "" if place.checkpoint is None else place.checkpoint.name.rpartition("_")[2]
    return int(number) if number.isdigit() else None


def _name_of(folder: str) -> str:
    """The stage that made a folder, else its own name."""
    path = Path(folder)
    if path.name == "export":
        return path.parent.name
    if path.name == "consolidated":
        found = places.with_run(places.FOLDER, path)
        return found.metrics.name if found.metrics is not None else path.name
    return path.name


def _before(place: Place, record: Mapping[str, Any], recipe: Mapping[str, Any]) -> str | None:
    """What a stage began with."""
    wanted = ((record.get("inputs") or {}).get("init") or {}).get("content")
    if place.run is not None and wanted is not None:
        for folder in places.stage_folders(place.run).values():  # by content: the run may have been moved
            other = read_json(folder / places.MANIFEST)
            if folder != place.stage and other is not None and other.get("content") == wanted:
                return str(places.export_of(folder, other, place.run))
    name = (recipe.get("model") or {}).get("pretrained_model_name_or_path")
    if name is not None:
        return str(name)
    if place.run is not None and place.stage is not None and ((record.get("config") or {}).get("kind")) == "convert":
        composed = places.read_yaml(place.run / places.COMPOSED)
        section = (composed.get("stage") or {}).get(record.get("stage") or place.stage.name) or {}
        return section.get("init") or (composed.get("model") or {}).get("source")
    return None


def _calibration(place: Place) -> dict[str, Any] | None:
    folder = calibration_folder(place)
    return None if folder is None else read_json(folder / "calibration.json")


def calibration_folder(place: Place) -> Path | None:
    """Where the run keeps a calibration of the checkpoint (``nemo-bard calibrate --output STAGE/calibration``)."""
    around = [place.folder, place.folder.parent, *([] if place.stage is None else [place.stage])]
    if place.metrics is not None:
        around.append(place.metrics)
    for folder in around:
        for found in (folder, folder / "calibration"):
            if (found / "calibration.json").is_file() and (found / "generation_config.json").is_file():
                return found
    return None
