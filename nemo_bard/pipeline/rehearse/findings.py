"""What a rehearsal found, as plain values: the content of ``RUN_DIR.rehearsal.json``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from nemo_bard.pipeline.rehearse.derive import Rehearsed
from nemo_bard.pipeline.rehearse.probes import FileFindings, NetworkFindings
from nemo_bard.pipeline.rehearse.rows import Rows
from nemo_bard.pipeline.rehearse.watch import Measured, Step

FORMAT = 1
"""Version of the JSON."""
SLOW_SHARE, SLOW_FACTOR, SLOW_SECONDS = 0.25, 1.5, 0.2
"""A rank is slow if the others wait for it for this share of a step, and so many seconds, and it takes so many times as
long per token as they do."""


@dataclass(frozen=True, kw_only=True)
class SlowRank:
    """A rank that the others wait for although it has no more to do."""

    rank: int
    node: str
    share: float
    """Of a step that the others wait for it."""
    factor: float
    """How many times as long as the others it takes for a token."""


@dataclass(frozen=True, kw_only=True)
class StageFindings:
    """One stage; a stage that does not train has name and seconds only."""

    name: str
    seconds: float
    """The whole rehearsal of the stage took, its evaluation included."""
    rows: Rows | None = None
    predicted_memory_gib: float | None = None
    """By ``plan``; None where it cannot tell, as on a CPU."""
    memory_gib: float | None = None
    """Peak of the rank that took most: allocated on the GPU, else resident."""
    predicted_step_seconds: float | None = None
    """Of a real step, by ``plan``."""
    step_seconds: float | None = None
    """Of a real step: of typical rows, as the second step's, with as many microbatches as a real one."""
    longest_row: int | None = None
    """Longest row that was trained on, in tokens."""
    row_tokens: float | None = None
    """Mean length of the rows of the second step, padding included."""
    microbatches: int | None = None
    """Of a real step and rank."""
    rehearsed_microbatches: int | None = None
    """Of a rehearsed one."""
    rows_needed: float | None = None
    """Rows a second that the steps take, over all ranks."""
    rows_given: float | None = None
    """Rows a second that the loaders give: the slowest rank's times the ranks."""
    rows_read: int = 0
    """Rows that were read to know that, over all ranks."""
    waiting: float | None = None
    """Share of the second step that a rank waits at most for one with more to do."""
    slow_rank: SlowRank | None = None
    save_seconds: float | None = None
    """Of a checkpoint."""
    checkpoint_gib: float | None = None
    export_gib: float | None = None
    resumed: bool = False
    """Whether it was stopped after its first step, and went on."""
    max_steps: int | None = None
    """Optimizer steps of the real stage."""
    days: float | None = None
    """That these take, with their checkpoints."""


@dataclass(kw_only=True)
class Findings:
    """Everything."""

    pipeline: str
    run_dir: str
    ranks: int
    nodes: list[str]
    device: str
    memory_gib: float
    """Of a GPU, or of the machine."""
    format: int = FORMAT
    seconds: float = 0.0
    """The rehearsal took."""
    stages: list[StageFindings] = field(default_factory=list)
    files: list[FileFindings] = field(default_factory=list)
    network: NetworkFindings | None = None
    needed_gib: float | None = None
    """What the chain will write, less what is in ``run_dir``."""
    changes: list[str] = field(default_factory=list)
    """What to change."""
    error: str | None = None
    """Why the real run would fail; None if it would not."""

    @property
    def days(self) -> float | None:
        """To the end of the real chain; None if it cannot be told."""
        days = [stage.days for stage in self.stages if stage.checkpoint_gib is not None]
        known = [value for value in days if value is not None]
        return sum(known) if known and len(known) == len(days) else None

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**asdict(self), "days": self.days}


def waits(steps: Sequence[Step]) -> list[float] | None:
    """Seconds that each rank waited for the slowest in one step; None if that was not recorded.

    The time that all spend in collectives, waiting or not, is that of the rank that waits for nobody.
    """
    times = [step.waiting for step in steps if step.waiting is not None]
    if len(times) < len(steps) or not steps:
        return None
    return [time - min(times) for time in times]


def find_slow(steps: Sequence[Step], nodes: Sequence[str]) -> SlowRank | None:
    """The rank that is slow, if one is: by its time per token without waiting, so that longer rows do not count.

    Args:
        steps: The same step on every rank.
        nodes: The node of each.
    """
    lost = waits(steps)
    if lost is None or len(steps) < 2:
        return None
    busy = [max(step.whole_seconds - wait, 1e-9) / max(step.tokens, 1) for step, wait in zip(steps, lost, strict=True)]
    rank = max(range(len(busy)), key=busy.__getitem__)
    others = [other for other in range(len(steps)) if other != rank]
    waited, whole = median(lost[other] for other in others), max(step.whole_seconds for step in steps)
    factor = busy[rank] / median(busy[other] for other in others)
    if waited < max(SLOW_SECONDS, SLOW_SHARE * whole) or factor < SLOW_FACTOR:
        return None
    return SlowRank(rank=rank, node=nodes[rank], share=waited / whole, factor=factor)


def trained(
    name: str,
    told: Sequence[Measured],
    facts: Rehearsed,
    *,
    rows: Rows | None,
    nodes: Sequence[str],
    seconds: float,
) -> StageFindings:
    """Put together what the ranks measured of a training stage.

    Args:
        name: The stage's.
        told: What each rank measured.
        facts: The stage.
        rows: What is known of its rows.
        nodes: The node of each rank.
        seconds: The rehearsal of the stage took.
    """
    last = [one.steps[-1] for one in told]
    scale = facts.microbatches / facts.rehearsed
    step_seconds = scale * max(step.seconds for step in last)
    save = max(max(one.save_seconds, default=0.0) for one in told)
    slow, lost = find_slow(last, nodes), waits(last)
    given = [one.rows_per_second for one in told if one.rows_per_second]
    days = None
    if facts.max_steps is not None:
        saves = facts.max_steps // (facts.ckpt_every_steps or facts.max_steps)
        days = (facts.max_steps * step_seconds + saves * save) / 86400
    return StageFindings(
        name=name,
        seconds=seconds,
        rows=rows,
        memory_gib=max(step.memory_gib for one in told for step in one.steps),
        step_seconds=step_seconds,
        longest_row=max(step.row_length for one in told for step in one.steps),
        row_tokens=sum(step.tokens for step in last) / (len(told) * facts.rehearsed * facts.local_batch_size),
        microbatches=facts.microbatches,
        rehearsed_microbatches=facts.rehearsed,
        rows_needed=facts.global_batch_size / step_seconds,
        rows_given=min(given) * len(told) if len(given) == len(told) else None,
        rows_read=sum(one.loaded for one in told),
        waiting=None if lost is None or slow else max(lost) / max(step.whole_seconds for step in last),
        slow_rank=slow,
        save_seconds=save,
        max_steps=facts.max_steps,
        days=days,
    )


def needed_gib(stages: Sequence[StageFindings], facts: Sequence[Rehearsed], *, keep_last: int, links: bool) -> float:
    """What a chain writes: kept checkpoints of all stages, one more while it is written, and exports.

    Args:
        stages: What was found.
        facts: The training stages.
        keep_last: Checkpoints kept per stage.
        links: Whether an export shares its files with the final checkpoint.
    """
    known = {one.name: one for one in facts}
    total = largest = 0.0
    for stage in stages:
        checkpoint, export = stage.checkpoint_gib or 0.0, stage.export_gib or 0.0
        if stage.name in known:
            steps, every = known[stage.name].max_steps, known[stage.name].ckpt_every_steps
            count = keep_last if steps is None or not every else min(keep_last, -(-steps // every))
            total += count * checkpoint + export * (1 if links else 2)
            largest = max(largest, checkpoint)
        else:
            total += export
    return total + largest
