"""``export``: a training checkpoint as a Hugging Face folder, written whole or not at all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bard.base.errors import not_one_of
from nemo_bard.base.files import sync_tree, write_whole
from nemo_bard.base.folders import CONFIG, read_object
from nemo_bard.base.names import MODEL_CLASS
from nemo_bard.checkpoints.convert import check_loads
from nemo_bard.checkpoints.exporting import older, places, writing
from nemo_bard.checkpoints.exporting.base_model import CARD, license_of
from nemo_bard.checkpoints.exporting.card import write_card
from nemo_bard.checkpoints.exporting.facts import RunFacts, calibration_folder, read_facts
from nemo_bard.checkpoints.exporting.origin import Origin, open_origin, take_companions
from nemo_bard.checkpoints.exporting.weights import check_complete, expected_shapes
from nemo_bard.checkpoints.folder import DTYPES, check_target
from nemo_bard.checkpoints.self_contained import write_code
from nemo_bard.generation.adapter_folders import adapter_names

GENERATION_CONFIG = "generation_config.json"
EMBEDDING = "model.language_model.embed_tokens.weight"


class ExportReport(NamedTuple):
    """What ``export`` wrote; ``str`` gives text for people."""

    target: Path
    source: Path
    kind: str
    files: int
    tensors: int
    size: int
    """Bytes of the weights."""
    dtype: str
    notes: list[str]

    def __str__(self) -> str:
        files = "1 weight file" if self.files == 1 else f"{self.files} weight files"
        lines = [
            f"wrote {self.target}: {MODEL_CLASS} from {self.source} ({self.kind})",
            f"{files}, {self.tensors} tensors, {self.size / 1e9:.3g} GB, {self.dtype}",
        ]
        return "\n".join([*lines, *self.notes])


def export(
    source: Path,
    target: Path,
    *,
    stage: str | None = None,
    base: Path | None = None,
    dtype: str = "auto",
    max_shard_size: str = "5GB",
    self_contained: bool = False,
    overwrite: bool = False,
    finish: Callable[[Path], list[str]] | None = None,
) -> ExportReport:
    """Write the Hugging Face folder of a training checkpoint to ``target``; it appears whole or not at all.

    Weights are read and written one tensor at a time.

    Args:
        source: A chain's run folder, a stage, a checkpoint of a training run or the folder around it, or a BARD folder.
        target: Folder to make.
        stage: Of a run folder: which stage; None takes the last finished one.
        base: Checkpoint that LoRA adapters were trained on, or that a training run without a configuration of its own began
            with; None takes the one that the run names.
        dtype: ``auto`` (each tensor as it is), ``float32``, ``bfloat16`` or ``float16``.
        max_shard_size: Most bytes of a weight file, such as ``5GB``.
        self_contained: Put the code of model and decoder in, for those who have transformers alone.
        overwrite: Replace ``target`` if it is a BARD checkpoint or an empty folder.
        finish: Called with the folder when all is in it, before it gets its name; returns further lines of the report.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If there is no checkpoint, or a file of it is missing.
        FileExistsError: If ``target`` exists and may not be replaced.
        ValueError: If the checkpoint is damaged, unfinished or of another architecture, or an argument is not allowed.
        OSError: If the disk is full.
    """
    source, target = Path(source), Path(target)
    if dtype not in DTYPES:
        raise not_one_of("--dtype", dtype, DTYPES)
    writing.check_shard_size(max_shard_size)
    check_target(source, target, overwrite=overwrite)
    if source.resolve() in target.resolve().parents:
        raise ValueError(f"{target}: DST must not lie inside SRC")
    origin = open_origin(places.find(source, stage), base)
    config = exported_config(origin)
    with write_whole(target) as folder:
        write_object(folder / CONFIG, config)
        left_out = check_complete(origin.weights, expected_shapes(folder), origin.place.folder)
        names = [name for name in origin.weights.tensors if name not in left_out]
        plan = writing.plan(origin.weights, names, dtype=dtype, max_shard_size=max_shard_size)
        check_room(folder, plan.total_size, target)
        stored = str(plan.dtypes[EMBEDDING]).removeprefix("torch.")
        write_object(folder / CONFIG, with_dtype(config, stored))
        facts = read_facts(origin.place, base)
        take_companions(origin, folder, facts.folders)
        older.spell_companions(folder)
        write_generation(origin, folder)
        check_loads(folder)
        notes = [f"not taken over: {', '.join(left_out)} (tied to the embedding)"] if left_out else []
        if self_contained:
            notes.append(f"with its own code: {', '.join(write_code(folder))}")
        write_readme(facts, origin, folder, target.resolve().name, self_contained=self_contained)
        with progress(plan.total_size) as bar:
            writing.write_weights(origin.weights, plan, folder, bar.update)
        notes += [] if finish is None else finish(folder)
        kept = adapter_names(origin.place.folder)
        if kept:
            notes.append(f"not taken over: the adapters {', '.join(kept)} of {origin.place.folder}")
        sync_tree(folder)
    return ExportReport(
        target, origin.place.folder, origin.place.kind, len(plan.files), len(names), plan.total_size, stored, notes
    )


def write_readme(facts: RunFacts, origin: Origin, folder: Path, name: str, *, self_contained: bool) -> None:
    """Write the model card; one that a folder without a run has is kept.

    Args:
        facts: What the run knows.
        origin: What is exported.
        folder: Gets the card; holds everything but the weights.
        name: Of the folder to come.
        self_contained: Whether the folder has its own code.
    """
    own = origin.place.folder / CARD
    if not facts.stages and own.is_file():
        shutil.copyfile(own, folder / CARD)
        return
    facts = replace(facts, license=facts.license or license_of(folder))
    card = write_card(name, facts, read_object(folder / CONFIG), self_contained=self_contained)
    (folder / CARD).write_text(card, encoding="utf-8")


def progress(total: int) -> Any:
    """A bar over bytes, on a terminal."""
    from tqdm import tqdm

    return tqdm(total=total, desc="exporting", unit="B", unit_scale=True, disable=None)


def write_object(path: Path, value: dict[str, Any]) -> None:
    """Write JSON as checkpoints have it."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def exported_config(origin: Origin) -> dict[str, Any]:
    """The configuration, without paths of this machine, and as transformers 4.57 reads it too.

    Raises:
        ValueError: If a section is missing.
    """
    config = json.loads(json.dumps(origin.config))
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{origin.config_file}: {section}: missing; a BARD configuration has one")
        config[section].pop("_name_or_path", None)
    for key in ("_name_or_path", "auto_map"):
        config.pop(key, None)
    config["architectures"] = [MODEL_CLASS]
    older.spell_config(config)
    return config


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The configuration of weights of a type."""
    parts = {name: {**config[name], "dtype": dtype} for name in ("text_config", "vision_config")}
    whole = {**config, **parts, "dtype": dtype}
    for section in (whole, *parts.values()):
        section.pop("torch_dtype", None)
    return whole


def check_room(folder: Path, size: int, target: Path) -> None:
    """Raise ValueError if the file system of ``folder`` has less than ``size`` bytes left."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"{target}: needs {size / 1e9:.3g} GB, its file system has {free / 1e9:.3g} GB left")


def write_generation(origin: Origin, folder: Path) -> None:
    """Write ``generation_config.json``: a calibration's, the checkpoint's, or BARD's defaults."""
    from nemo_bard.generation.settings import BardGenerationConfig

    calibrated = calibration_folder(origin.place)
    for place in (*([] if calibrated is None else [calibrated]), *origin.companions):
        if (place / GENERATION_CONFIG).is_file():
            BardGenerationConfig.from_pretrained(place).save_pretrained(folder)
            return
    BardGenerationConfig(pad_token_id=origin.config.get("pad_token_id")).save_pretrained(folder)
