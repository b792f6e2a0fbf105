"""What to change before the real run, and what would make it fail."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

from nemo_bard.pipeline.rehearse.derive import Rehearsed
from nemo_bard.pipeline.rehearse.findings import Findings, StageFindings
from nemo_bard.pipeline.rehearse.probes import OK

FULL = 0.92
"""Share of a GPU's memory from which on it is short."""
SHORT_ROWS = 0.5
"""Rows of less than this share of the longest allowed waste GPUs."""
SPARE = 1.2
"""How much faster than the steps a loader should be."""
WAITING = 0.2
"""Share of a step that ranks may wait for the one with the longest rows."""
SAVING = 0.1
"""Share of the time that checkpoints may take."""
FAILS = 0.5
"""Share of a step that the others wait for a slow rank from which on the run is not worth its time."""


def find_error(found: Findings) -> str | None:
    """The first thing that makes the real run fail, as one line; None if nothing does."""
    for one in found.files:
        if not one.sees_folder:
            return f"node {one.node} does not see the folder of run_dir {found.run_dir}; use one that all nodes share"
        if one.rename != OK:
            return f"the file system of run_dir cannot replace a file at once ({one.rename}, node {one.node})"
    free = min((one.free_gib for one in found.files), default=math.inf)
    if found.needed_gib is not None and found.needed_gib > free:
        return (
            f"disk too small: the chain will write {found.needed_gib:.1f} GiB, the file system of run_dir"
            f" {found.run_dir} has {free:.1f} GiB free; make room or lower keep_last"
        )
    for stage in found.stages:
        if stage.slow_rank is not None and stage.slow_rank.share >= FAILS:
            return f"stage {stage.name}: {slow_line(stage)}"
    return None


def slow_line(stage: StageFindings) -> str:
    """Name a slow rank."""
    slow = stage.slow_rank
    assert slow is not None
    return (
        f"rank {slow.rank} (node {slow.node}) is too slow: the others wait {slow.share:.0%} of a step for it, it takes"
        f" {slow.factor:.1f} times as long for a token"
    )


def find_changes(found: Findings, facts: Sequence[Rehearsed]) -> list[str]:
    """What to change, one line each; the same line of several stages is one."""
    lines = list(_machines(found))
    recipes = {one.name: one.recipe for one in facts}
    for stage in found.stages:
        if stage.name in recipes:
            lines += [f"{line}|{stage.name}" for line in _stage(stage, recipes[stage.name], found)]
    merged: dict[str, list[str]] = {}
    for line in lines:
        text, _, name = line.partition("|")
        merged.setdefault(text, []).extend([name] if name else [])
    return [f"{', '.join(names)}: {text}" if names else text for text, names in merged.items()]


def _machines(found: Findings) -> list[str]:
    lines = []
    for one in found.files[:1]:
        if one.lock != OK:
            lines.append(
                f"no lock ({one.lock}): nothing keeps two commands from one run_dir; see to that yourself, or mount its"
                " file system with flock"
            )
        if one.hard_links != OK:
            lines.append(f"no hard links ({one.hard_links}): exports are copies and take their room twice")
    unseen = [one.node for one in found.files if one.lock_is_shared is False]
    if unseen:
        lines.append(
            f"locks of other nodes are not seen on {', '.join(unseen)}: mount run_dir's file system with flock"
        )
    return lines


def _stage(stage: StageFindings, recipe: Mapping[str, Any], found: Findings) -> list[str]:
    lines = []
    if stage.slow_rank is not None and stage.slow_rank.share < FAILS:
        lines.append(slow_line(stage))
    if found.device != "CPU" and (stage.memory_gib or 0) > FULL * found.memory_gib:
        lines.append(
            f"memory is short ({stage.memory_gib:.0f} of {found.memory_gib:.0f} GiB): {less_memory(recipe, found.ranks)}"
        )
    packed, rows = (recipe.get("packing") or {}).get("max_length"), stage.rows
    if not packed and rows is not None and rows.typical is not None:
        longest = recipe["dataloader"]["collate_fn"].get("max_length")
        if longest and rows.typical < SHORT_ROWS * longest:
            lines.append(
                f"a row is {rows.typical:.0f} of {longest} tokens on average: overrides.packing.max_length={longest}, with"
                " a smaller global_batch_size, which then counts rows"
            )
        elif (stage.waiting or 0.0) > WAITING:
            lines.append(f"ranks wait {stage.waiting:.0%} of a step for the longest row: overrides.packing.max_length")
    if stage.rows_given is not None and stage.rows_given < SPARE * (stage.rows_needed or 0.0):
        lines.append(_more_workers(stage, recipe, found))
    replicas = (recipe.get("distributed") or {}).get("dp_replicate_size")
    if len(found.nodes) > 1 and found.ranks > len(found.nodes) and (replicas or 1) == 1:
        lines.append(
            "weights are gathered across nodes: overrides.distributed.dp_replicate_size=auto keeps that inside a node, if"
            " the model fits one"
        )
    every = recipe["step_scheduler"].get("ckpt_every_steps")
    if stage.save_seconds and stage.step_seconds and every:
        share = stage.save_seconds / (stage.save_seconds + every * stage.step_seconds)
        if share > SAVING:
            lines.append(f"checkpoints take {share:.0%} of the time: ckpt_every_steps={2 * every} or more")
    return lines


def less_memory(recipe: Mapping[str, Any], ranks: int) -> str:
    """What lowers the memory of a stage, the cheapest first."""
    distributed, steps = recipe.get("distributed") or {}, recipe["step_scheduler"]
    options = []
    if steps["local_batch_size"] > 1:
        options.append(f"step_scheduler.local_batch_size below {steps['local_batch_size']}")
    several = steps["global_batch_size"] > steps["local_batch_size"] * ranks
    if ranks > 1 and several and distributed.get("defer_fsdp_grad_sync", True):
        options.append("distributed.defer_fsdp_grad_sync: false")
    if not distributed.get("activation_checkpointing"):
        options.append("distributed.activation_checkpointing: true")
    packed = (recipe.get("packing") or {}).get("max_length")
    options.append("shorter rows (" + ("packing" if packed else "dataloader.collate_fn") + ".max_length)")
    return ", ".join(options)


def _more_workers(stage: StageFindings, recipe: Mapping[str, Any], found: Findings) -> str:
    workers = (recipe.get("dataloader") or {}).get("num_workers") or 0
    assert stage.rows_given is not None
    assert stage.rows_needed is not None
    wanted = math.ceil(max(workers, 1) * SPARE * stage.rows_needed / max(stage.rows_given, 1e-9))
    cores = max(len(os.sched_getaffinity(0)) * len(found.nodes) // found.ranks, 1)
    words = f"the loader gives {stage.rows_given:.1f} rows/s, the steps take {stage.rows_needed:.1f}"
    if wanted <= max(cores, workers):
        return f"{words}: overrides.dataloader.num_workers={wanted}"
    return f"{words}: a rank would need {wanted} workers and has {cores} cores; smaller images, or more CPUs per rank"
