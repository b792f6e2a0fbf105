"""Metrics files of training: one JSON object a line, one line a step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def read_lines(file: Path) -> list[dict[str, Any]]:
    """Return the entries of a metrics file by step, the last one of each; a line cut off by a crash is left out."""
    entries: dict[int, dict[str, Any]] = {}
    if file.is_file():
        for line in file.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
                entries[entry["step"]] = entry
            except (ValueError, KeyError, TypeError):
                continue
    return [entries[step] for step in sorted(entries)]


def tail_loss(steps: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean loss over the last tenth of the steps, at least one."""
    if not steps:
        return None
    last = steps[-max(1, len(steps) // 10) :]
    return statistics.fmean(entry["loss"] for entry in last)


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, numbers to the right."""
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
