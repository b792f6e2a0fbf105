"""The findings of a rehearsal as text."""

from __future__ import annotations

from collections.abc import Sequence

from nemo_bard.pipeline.rehearse.findings import Findings, StageFindings
from nemo_bard.pipeline.rehearse.probes import OK, PROBED_MIB
from nemo_bard.report.run import duration

HEADER = ("stage", "longest", "typical", "GiB", "plan", "s/step", "plan", "rows/s", "loader", "to the end")


def render(found: Findings) -> str:
    """Render what was found: a line per training stage, the machines, and what to change."""
    nodes = len(found.nodes)
    where = (
        f"{nodes} nodes, {found.ranks} processes" if nodes > 1 else f"{found.ranks} process" + "es" * (found.ranks > 1)
    )
    lines = [f"rehearsal of {found.pipeline}: {where}, {found.device}, took {duration(found.seconds)}", ""]
    lines += _table([HEADER, *(_row(stage) for stage in found.stages if stage.step_seconds is not None)])
    lines += [
        "  longest, typical: tokens of a row; GiB: peak of a rank; rows/s: what steps take, and what the loaders give"
    ]
    partly = [stage for stage in found.stages if stage.rows is not None and stage.rows.measured < stage.rows.total]
    if partly and (rows := partly[0].rows) is not None:
        known = f"measured {rows.measured} of {rows.total} samples" if rows.measured else "lengths cannot be measured"
        lines.append(f"  {', '.join(stage.name for stage in partly)}: {known}; there may be longer ones")
    cut = [s for s in found.stages if (s.rehearsed_microbatches or 0) < (s.microbatches or 0)]
    lines += [
        f"  {stage.name}: {stage.rehearsed_microbatches} of {stage.microbatches} microbatches of a step were run"
        for stage in cut
    ]
    lines += ["", *_machines(found)]
    if resumed := [stage.name for stage in found.stages if stage.resumed]:
        lines.append(f"resume    {', '.join(resumed)}: stopped after the first step, went on from its checkpoint")
    total = "unknown" if found.days is None else f"{_time(found.days)} to the end of the chain, without evaluation"
    lines += [f"time      {total}"]
    if found.changes:
        lines += ["", "change", *(f"  - {line}" for line in found.changes)]
    return "\n".join(lines) + "\n"


def _row(stage: StageFindings) -> tuple[str, ...]:
    rows = stage.rows
    typical = rows.typical if rows is not None and rows.typical is not None else stage.row_tokens
    return (
        stage.name,
        _number(stage.longest_row, 0),
        _number(typical, 0),
        _number(stage.memory_gib, 1),
        _number(stage.predicted_memory_gib, 1),
        _number(stage.step_seconds, 2),
        _number(stage.predicted_step_seconds, 2),
        _number(stage.rows_needed, 1),
        _number(stage.rows_given, 1),
        "-" if stage.days is None else _time(stage.days),
    )


def _machines(found: Findings) -> list[str]:
    lines = []
    for one in found.files:
        if not one.sees_folder:
            lines.append(f"files     {one.node}: does not see the folder")
            continue
        parts = [f"{name} {'works' if word == OK else f'FAILS ({word})'}" for name, word in
                 (("lock", one.lock), ("rename", one.rename), ("hard links", one.hard_links))]  # fmt: skip
        parts.append(f"fsync {one.fsync_ms:.1f} ms, {one.write_mib_s:.0f} MiB/s")
        lines.append(f"files     {one.node}: {', '.join(parts)}")
    if found.needed_gib is not None and found.files:
        free = min(one.free_gib for one in found.files)
        lines.append(f"disk      the chain will write {found.needed_gib:.2f} GiB, {free:.1f} GiB are free")
    if (net := found.network) is not None:
        lines.append(
            f"network   {net.backend}, {net.ranks} ranks: all-reduce of {PROBED_MIB} MiB {net.allreduce_ms:.1f} ms"
            f" ({net.bus_gb_s:.1f} GB/s), latency {net.latency_ms:.2f} ms"
        )
    return lines


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{max(digits, 2) if digits and abs(value) < 1 else digits}f}"


def _time(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else duration(86400 * days)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
