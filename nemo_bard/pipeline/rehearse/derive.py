"""From a chain to its rehearsal: the same stages in a scratch folder, two steps each, on chosen samples."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.registry import import_dotted
from nemo_bard.data.rejects import check_on_bad_sample
from nemo_bard.pipeline.job import Job, make_job
from nemo_bard.pipeline.recipe_stage import RecipeStage, merge
from nemo_bard.train.recipe_file import translate

STEPS = 2
SAMPLES_SCORED = 2
MICROBATCHES = 8
"""Most microbatches of a step where nothing predicts its time."""
STEP_SECONDS = 60.0
"""Longest step, by prediction; a longer one gets fewer microbatches, never fewer than two."""


@dataclass(frozen=True, kw_only=True)
class Rehearsed:
    """A training stage: what it really takes, and what is rehearsed of it."""

    name: str
    max_steps: int | None
    """Real optimizer steps; None if only the number of epochs is known."""
    ckpt_every_steps: int | None
    global_batch_size: int
    local_batch_size: int
    microbatches: int
    """Of a real step and rank."""
    rehearsed: int
    """Of a rehearsed one."""
    recipe: dict[str, Any]
    """The real recipe, environment variables filled in."""

    @property
    def samples(self) -> int:
        """Samples (with packing: rows) of the rehearsal's steps."""
        return STEPS * self.global_batch_size * self.rehearsed // self.microbatches


def rehearsed_stage(stage: RecipeStage, processes: int, step_seconds: float | None) -> Rehearsed:
    """How much of a training stage is rehearsed.

    Args:
        stage: A stage of the real chain.
        processes: Of all nodes.
        step_seconds: Predicted time of a real step; None if nothing predicts it.
    """
    recipe = translate(stage.recipe)
    steps = recipe["step_scheduler"]
    total, local = steps["global_batch_size"], steps["local_batch_size"]
    microbatches = max(total // (local * processes), 1)
    most = MICROBATCHES if step_seconds is None else int(STEP_SECONDS / max(step_seconds / microbatches, 1e-9))
    return Rehearsed(
        name=stage.name,
        max_steps=steps.get("max_steps"),
        ckpt_every_steps=steps.get("ckpt_every_steps"),
        global_batch_size=total,
        local_batch_size=local,
        microbatches=microbatches,
        rehearsed=min(microbatches, max(most, 2)),
        recipe=recipe,
    )


def indices_file(scratch: Path, stage: str, split: str = "train") -> Path:
    """Where the choice of a stage's samples is kept."""
    return scratch / "rows" / f"{stage}-{split}.json"


def rehearsal_job(job: Job, scratch: Path, stages: Mapping[str, Rehearsed]) -> Job:
    """Make the rehearsal's chain.

    Args:
        job: The real chain.
        scratch: Its run directory.
        stages: The training stages, by name.

    Raises:
        ValueError: If the chain cannot be rehearsed.
    """
    config = copy.deepcopy(job.config)
    config["run_dir"] = str(scratch)
    evaluation = config.get("evaluation") or {}
    if evaluation.get("data") is not None:
        limit = evaluation.get("limit") or SAMPLES_SCORED
        config["evaluation"] = {**evaluation, "limit": min(limit, SAMPLES_SCORED), "pictures": 0}
    for name, facts in stages.items():
        section = config["stage"][name]
        section["overrides"] = section.get("overrides") or {}
        merge(section["overrides"], _overrides(facts, scratch))
    return make_job(config)


def _overrides(facts: Rehearsed, scratch: Path) -> dict[str, Any]:
    recipe = facts.recipe
    steps: dict[str, Any] = {
        "max_steps": STEPS,
        "ckpt_every_steps": 1,
        "global_batch_size": facts.samples // STEPS,
    }
    own: dict[str, Any] = {"step_scheduler": steps}
    if recipe.get("dataset"):
        own["dataset"] = _chosen(recipe, "dataset", indices_file(scratch, facts.name))
        own["dataloader"] = {"shuffle": False}  # the longest rows come first
    if recipe.get("validation_dataset"):
        steps["val_every_steps"] = STEPS
        own["validation_dataset"] = _chosen(
            recipe, "validation_dataset", indices_file(scratch, facts.name, "validation")
        )
    if ((recipe.get("lr_scheduler") or {}).get("lr_warmup_steps") or 0) > 1:
        own["lr_scheduler"] = {"lr_warmup_steps": 1}
    if (recipe.get("packing") or {}).get("max_length"):
        own["packing"] = {"cache_dir": str(scratch / "lengths")}
    return {**own, **{tracker: None for tracker in ("wandb", "mlflow") if recipe.get(tracker)}}


def _chosen(recipe: Mapping[str, Any], key: str, indices: Path) -> dict[str, Any]:
    """The section of a data set that is to be chosen from."""
    section = dict(recipe[key])
    own = {name: section.pop(name) for name in ("chat_template",) if name in section}
    if check_on_bad_sample(recipe.get("on_bad_sample")).drops:
        target = section["_target_"]
        reader = import_dotted(target) if isinstance(target, str) else target
        if "validate" in inspect.signature(reader).parameters:
            section["validate"] = False  # as the real run does
    return {"_target_": "nemo_bard.data.chosen.make_chosen", "dataset": section, "indices_file": str(indices), **own}
