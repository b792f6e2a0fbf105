"""A composed configuration as a chain of stages: what each reads and writes, and its final recipe.

Everything that can be wrong with a chain before it runs is found here or in ``checks``.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bard.base.paths import find_recipe
from nemo_bard.base.settings import from_mapping
from nemo_bard.launch.exits import PREEMPTION_SIGNALS
from nemo_bard.launch.launchers import LAUNCHERS, LaunchSettings
from nemo_bard.train.recipe_file import read_yaml

KEYS = (
    "name", "run_dir", "order", "keep_last", "overrides", "allow_version_change", "evaluation", "model", "data",
    "launch", "stage",
)  # fmt: skip
EVALUATION_KEYS = ("data", "limit", "batch_size", "scorer", "warm_up", "generation", "pictures")
MODEL_KEYS = ("name", "source", "mask_token_id", "context_attention", "recipe")
RECIPE_STAGE_KEYS = (
    "kind", "recipe", "init", "anchor", "output", "evaluate", "data", "block_size", "max_steps", "global_batch_size",
    "local_batch_size", "learning_rate", "warmup_steps", "ckpt_every_steps", "overrides",
)  # fmt: skip
STAGE_KEYS = {
    "recipe": RECIPE_STAGE_KEYS,  # "anchor" marks distillation
    "convert": ("kind", "init", "output", "evaluate", "block_size"),
    "tiny": ("kind", "output", "evaluate", "seed"),
}
SHORT_KEYS = {
    "block_size": "model.block_size",
    "max_steps": "step_scheduler.max_steps",
    "global_batch_size": "step_scheduler.global_batch_size",
    "local_batch_size": "step_scheduler.local_batch_size",
    "ckpt_every_steps": "step_scheduler.ckpt_every_steps",
    "learning_rate": "optimizer.lr",
    "warmup_steps": "lr_scheduler.lr_warmup_steps",
}
"""Keys of a stage -> keys of its recipe."""
INIT_KEY = "model.pretrained_model_name_or_path"
ANCHOR_KEY = "anchor.pretrained_model_name_or_path"
OWN_KEYS = (
    INIT_KEY, ANCHOR_KEY, "checkpoint.checkpoint_dir", "checkpoint.enabled", "checkpoint.restore_from",
    "checkpoint.save_consolidated", "checkpoint.max_recent_checkpoints", "checkpoint.is_async",
    "step_scheduler.preemption_signal",
)  # fmt: skip
"""Keys of a recipe that the chain itself sets; ``overrides`` must not."""
RUN_DIR = "<run_dir>"
"""Stands for the run directory in what is compared between runs, so that a run directory can be moved."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a chain."""

    name: str
    kind: str
    """``tiny``, ``convert`` or ``recipe``."""
    folder: Path
    evaluate: bool
    inputs: dict[str, str] = field(default_factory=dict)
    """What it reads, by use (``init``, ``anchor``): the name of an earlier stage, a folder, or a Hugging Face name."""
    block_size: int | None = None
    recipe: dict[str, Any] | None = None
    """Final recipe of a training stage as it stands in ``stage.yaml``: environment variables not filled in."""
    recipe_path: Path | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    """What else the result depends on, of stages without a recipe."""

    @property
    def export(self) -> Path:
        """The Hugging Face folder that the stage hands on."""
        return self.folder / "export"

    @property
    def checkpoints(self) -> Path:
        """Folder of training checkpoints and metrics."""
        return self.folder / "checkpoints"


@dataclass(frozen=True, kw_only=True)
class Job:
    """A chain, ready to be checked and run."""

    name: str
    run_dir: Path
    stages: tuple[Stage, ...]
    keep_last: int
    allow_version_change: bool
    evaluation: dict[str, Any]
    model: dict[str, Any]
    launch: LaunchSettings
    config: dict[str, Any]
    """The composed configuration."""

    def stage(self, name: str) -> Stage:
        """Return the stage ``name``; ValueError if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage {name!r} in this chain; stages: {', '.join(s.name for s in self.stages)}")

    def input_path(self, value: str) -> Path | str:
        """Turn an input of a stage into a folder: an earlier stage's export, else what it is."""
        names = {stage.name: stage for stage in self.stages}
        if value in names:
            return names[value].export
        return Path(value) if Path(value).is_dir() else value


def make_job(config: Mapping[str, Any]) -> Job:
    """Read a composed configuration.

    Raises:
        ValueError: One line naming the key, its value and what is allowed.
    """
    _check_keys("", config, KEYS)
    order, stages = config["order"], config["stage"]
    if not isinstance(order, list) or not order:
        raise ValueError(f"order must be a list of stages, got {order!r}")
    if not isinstance(config["run_dir"], str) or not config["run_dir"]:
        raise ValueError(f"run_dir must name a folder, got {config['run_dir']!r}")
    for name in order:
        if name not in stages:
            near = difflib.get_close_matches(str(name), stages, n=1)
            raise ValueError(
                f"order: no stage {name!r}{f', did you mean {near[0]}?' if near else ''}; stages: {', '.join(stages)}"
            )
        if order.count(name) > 1:
            raise ValueError(f"order: stage {name} is there twice, and would write one directory twice")
    _check_sections(config)
    run_dir = Path(config["run_dir"]).absolute()
    built: list[Stage] = []
    for index, name in enumerate(order):
        built.append(_make_stage(name, stages[name], config, run_dir, built, order[index + 1 :]))
    _check_outputs(built, run_dir)
    return Job(
        name=config["name"],
        run_dir=run_dir,
        stages=tuple(built),
        keep_last=config["keep_last"],
        allow_version_change=config["allow_version_change"],
        evaluation=config["evaluation"],
        model=config["model"],
        launch=_launch_settings(config["launch"]),
        config=dict(config),
    )


def _check_sections(config: Mapping[str, Any]) -> None:
    _count("keep_last", config["keep_last"])
    for key in ("allow_version_change",):
        _flag(key, config[key])
    _check_keys("model", config["model"], MODEL_KEYS)
    _check_keys("evaluation", config["evaluation"], EVALUATION_KEYS)
    for key in ("limit", "batch_size", "pictures"):
        if config["evaluation"][key] is not None:
            _count(f"evaluation.{key}", config["evaluation"][key], least=0 if key == "pictures" else 1)


def _launch_settings(section: Mapping[str, Any]) -> LaunchSettings:
    launcher = LAUNCHERS.get(section.get("name"))
    settings = from_mapping(launcher.Settings, section, "launch")
    launcher().check(settings)
    return settings


def _make_stage(
    name: str,
    section: Mapping[str, Any],
    config: Mapping[str, Any],
    run_dir: Path,
    before: list[Stage],
    after: list[str],
) -> Stage:
    where = f"stage.{name}"
    kind = section.get("kind")
    if kind not in STAGE_KEYS:
        raise ValueError(f"{where}.kind must be one of {', '.join(STAGE_KEYS)}, got {kind!r}")
    _check_keys(where, section, STAGE_KEYS[kind])
    for key in ("block_size", "max_steps", "global_batch_size", "local_batch_size", "ckpt_every_steps"):
        if section.get(key) is not None:
            _count(f"{where}.{key}", section[key])
    _flag(f"{where}.evaluate", section["evaluate"])
    folder = run_dir / (section.get("output") or name)
    common = {"name": name, "kind": kind, "folder": folder, "evaluate": section["evaluate"]}
    if kind == "tiny":
        return Stage(**common, settings={"seed": section["seed"]})
    if kind == "convert":
        source = section["init"] or config["model"]["source"]
        inputs = {"init": source} if source else {"init": _previous(where, before)}
        block_size = section["block_size"] or _first_block_size(where, config, after)
        settings = {key: config["model"][key] for key in ("mask_token_id", "context_attention")}
        return Stage(**common, inputs=inputs, block_size=block_size, settings={**settings, "block_size": block_size})
    inputs = {"init": section["init"] or _previous(where, before)}
    if "anchor" in section:
        inputs["anchor"] = section["anchor"] or _smallest_blocks(where, before)
    path = find_recipe(section["recipe"])
    stage = Stage(**common, inputs=inputs, block_size=section["block_size"], recipe_path=path)
    return Stage(**{**stage.__dict__, "recipe": _final_recipe(stage, section, config, before)})


def _previous(where: str, before: list[Stage]) -> str:
    if not before:
        raise ValueError(f"{where} is the first stage and needs a start: set model.source or {where}.init")
    return before[-1].name


def _first_block_size(where: str, config: Mapping[str, Any], after: list[str]) -> int:
    for name in after:
        size = config["stage"][name].get("block_size")
        if size is not None:
            return size
    raise ValueError(f"{where}.block_size must be set: no later stage has one")


def _smallest_blocks(where: str, before: list[Stage]) -> str:
    trained = [stage for stage in before if stage.kind == "recipe" and stage.block_size]
    if not trained:
        raise ValueError(f"{where}.anchor must be set: no earlier stage can be the anchor")
    return min(trained, key=lambda stage: stage.block_size).name


def _final_recipe(
    stage: Stage, section: Mapping[str, Any], config: Mapping[str, Any], before: list[Stage]
) -> dict[str, Any]:
    """The recipe file with what the model, the data, the user and the chain say, in this order."""
    recipe = copy.deepcopy(read_yaml(stage.recipe_path))
    where = f"stage.{stage.name}"
    _merge(recipe, config["model"].get("recipe") or {})
    if section["data"]:
        _merge(recipe, config["data"].get("recipe") or {})
        validation = recipe.get("validation_dataset")
        if isinstance(validation, Mapping) and "path" in validation and validation["path"] is None:
            recipe.pop("validation_dataset")
            recipe.pop("validation_dataloader", None)
    for key, dotted in SHORT_KEYS.items():
        if section.get(key) is not None:
            _merge(recipe, _nested(dotted, section[key]))
    for origin, extra in (("overrides", config["overrides"]), (f"{where}.overrides", section["overrides"])):
        for dotted in _leaves(extra):
            if dotted in OWN_KEYS or dotted == "recipe":
                raise ValueError(f"{origin}.{dotted}: the chain sets this key itself; remove it")
        _merge(recipe, extra)
    exports = {earlier.name: str(earlier.export) for earlier in before}
    own: dict[str, Any] = {
        INIT_KEY: exports.get(stage.inputs["init"], stage.inputs["init"]),
        "checkpoint.enabled": True,
        "checkpoint.checkpoint_dir": str(stage.checkpoints),
        "checkpoint.save_consolidated": "final",
        "checkpoint.is_async": False,
        "checkpoint.max_recent_checkpoints": config["keep_last"],
        "step_scheduler.preemption_signal": list(PREEMPTION_SIGNALS),
    }
    packing = recipe.get("packing") or {}
    if packing.get("max_length") is not None and packing.get("cache_dir") is None:
        own["packing.cache_dir"] = str(Path(config["run_dir"]).absolute() / "lengths")  # one file serves all stages
    if "anchor" in stage.inputs:
        own[ANCHOR_KEY] = exports.get(stage.inputs["anchor"], stage.inputs["anchor"])
    for dotted, value in own.items():
        _merge(recipe, _nested(dotted, value))
    return recipe


def _merge(recipe: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Merge ``extra`` into ``recipe``, in place: a section with ``_target_`` replaces, null removes a section."""
    for key, value in extra.items():
        old = recipe.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict) and "_target_" not in value:
            _merge(old, value)
        elif value is None and isinstance(old, Mapping):
            recipe.pop(key)
        else:
            recipe[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)


def _nested(dotted: str, value: object) -> dict[str, Any]:
    for name in reversed(dotted.split(".")):
        value = {name: value}
    return value


def _leaves(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    names = []
    for name, value in node.items():
        names += _leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [f"{prefix}{name}"]
    return names


def _check_outputs(stages: list[Stage], run_dir: Path) -> None:
    for index, stage in enumerate(stages):
        if run_dir not in stage.folder.resolve().parents and run_dir.resolve() not in stage.folder.resolve().parents:
            raise ValueError(f"stage.{stage.name}.output: {stage.folder} is not below run_dir {run_dir}")
        for other in stages[:index]:
            a, b = stage.folder.resolve(), other.folder.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise ValueError(f"stages {other.name} and {stage.name} would write one directory: {a}")


def _check_keys(section: str, keys: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise ValueError(f"unknown key {section}{'.' if section else ''}{key}; {hint}")
    missing = [key for key in known if key not in keys and key != "anchor"]
    if missing:
        raise ValueError(f"{section or 'the configuration'} lacks the key {missing[0]}")


def _count(key: str, value: object, *, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{key} must be an integer >= {least}, got {value!r}")


def _flag(key: str, value: object) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{key} must be true or false, got {value!r}")
