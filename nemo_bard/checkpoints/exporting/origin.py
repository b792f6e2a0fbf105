"""A checkpoint that was found, opened: its weights, its configuration, and the files that travel with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.folders import CONFIG, check_model_type, read_object
from nemo_bard.base.names import MODEL_TYPE, SOURCE_MODEL_TYPE
from nemo_bard.checkpoints.exporting import places
from nemo_bard.checkpoints.exporting.places import Place
from nemo_bard.checkpoints.exporting.weights import DistributedWeights, FolderWeights, MergedWeights, Weights
from nemo_bard.checkpoints.folder import copy_companions
from nemo_bard.checkpoints.merge import Adapters, read_adapters, read_overrides


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What an export is made of."""

    place: Place
    weights: Weights
    config: dict[str, Any]
    config_file: Path
    companions: tuple[Path, ...]
    """Folders with tokenizer, processor, template and licence; the first one that has a file counts."""
    base: Path | None = None
    """What training began with, where its files were needed."""


def open_origin(place: Place, base: Path | None = None) -> Origin:
    """Open a checkpoint.

    Args:
        place: Where it is.
        base: What the user says that it was trained on; None takes what the run says.

    Raises:
        FileNotFoundError: If the base or a file is missing.
        ValueError: If something is damaged, of another architecture, or does not fit.
    """
    if place.kind == places.ADAPTERS:
        return _open_adapters(place, base)
    config_folder = place.folder
    if place.kind == places.SHARDS and (place.folder / places.METADATA / CONFIG).is_file():
        config_folder = place.folder / places.METADATA
    began = base if base is not None else _began_with(place)
    overrides: dict[str, Any] = {}
    if not (config_folder / CONFIG).is_file():
        config_folder = _existing_base(began, place.folder)
        overrides = read_overrides(place.folder)
    config = _read_config(config_folder)
    weights = FolderWeights(place.folder) if place.kind == places.FOLDER else DistributedWeights(place.folder)
    around = [] if began is None or not began.is_dir() else [began]
    return Origin(
        place=place,
        weights=weights,
        config={**config, **overrides},
        config_file=config_folder / CONFIG,
        companions=tuple(dict.fromkeys([config_folder, *around])),
        base=began,
    )


def _open_adapters(place: Place, base: Path | None) -> Origin:
    adapters = read_adapters(place.folder)
    named = Path(adapters.base)
    base = _existing_base(named if base is None else base, place.folder)
    config = _read_config(base)
    weights = FolderWeights(base)
    merged = MergedWeights(weights, adapters, base)
    if (named / CONFIG).is_file() and named.resolve() != base.resolve():
        _check_same_base(adapters, merged, weights, base, named)
    return Origin(
        place=place,
        weights=merged,
        config={**config, **adapters.overrides},
        config_file=base / CONFIG,
        companions=(base,),
        base=base,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a BARD model; ValueError if it is of another."""
    config = read_object(folder / CONFIG)
    if config.get("model_type") == SOURCE_MODEL_TYPE:
        raise ValueError(
            f"{folder / CONFIG}: is an autoregressive Qwen3-VL, which needs no export; `nemo-bard convert` makes a BARD"
            " folder of it"
        )
    check_model_type(config, folder / CONFIG, [MODEL_TYPE])
    return config


def _check_same_base(adapters: Adapters, merged: MergedWeights, weights: Weights, base: Path, named: Path) -> None:
    """Compare a layer that has an adapter with the base that the adapters name, where that is still there."""
    name = f"{adapters.modules[0]}.weight"
    merged.read(name)  # tells shapes that do not fit
    own = FolderWeights(named)
    if name not in own.tensors or not own.read(name).equal(weights.read(name)):
        raise ValueError(f"{adapters.folder}: was trained on {named}, --base {base} has other weights")


def _existing_base(base: Path | None, where: Path) -> Path:
    if base is None or not (base / CONFIG).is_file():
        told = "" if base is None else f" {base}"
        raise FileNotFoundError(
            f"{where}: the checkpoint that it was trained on{told} has no {CONFIG} here; name its folder with --base"
        )
    return base


def _began_with(place: Place) -> Path | None:
    """The folder that a training run says it began with."""
    if place.checkpoint is None:
        return None
    recipe = places.read_yaml(place.checkpoint / places.TRAINING_CONFIG)
    name = (recipe.get("model") or {}).get("pretrained_model_name_or_path")
    return None if name is None else Path(name)


def take_companions(origin: Origin, folder: Path, before: Iterable[Path] = ()) -> None:
    """Copy tokenizer, processor and template, and the licence from where there is one.

    Args:
        origin: Says where they are.
        folder: Gets them.
        before: Folders that the stages before began with, where a licence may be.

    Raises:
        ValueError: If there is no tokenizer or no processor.
    """
    for place in origin.companions:
        if (place / "tokenizer_config.json").is_file():
            copy_companions(place, folder)
            break
    for what, pattern in (("tokenizer", "tokenizer_config.json"), ("processor", "*processor_config.json")):
        if not any(folder.glob(pattern)):
            raise ValueError(
                f"{origin.companions[0]}: has no {what} ({pattern.removeprefix('*')}), and neither has what it was trained on;"
                " name a folder that has with --base"
            )
    for place in (*origin.companions, *before):
        if not any(folder.glob("LICENSE*")):
            for file in place.glob("LICENSE*"):
                (folder / file.name).write_bytes(file.read_bytes())
