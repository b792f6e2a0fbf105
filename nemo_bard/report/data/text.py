"""A survey for the terminal: tables, and histograms of one line per source."""

from __future__ import annotations

import numpy as np

from nemo_bard.data.survey.survey import Survey, distributions, quantiles
from nemo_bard.report.data.histogram import ASCII, BLOCKS, edges, short_number, spark
from nemo_bard.report.data.tables import Table, all_tables


def render(survey: Survey, *, plain: bool = False) -> str:
    """Return the survey as text.

    Args:
        survey: What to tell.
        plain: Draw histograms with ASCII alone.
    """
    parts = [render_table(table) for table in all_tables(survey)]
    parts.append(render_histograms(survey, ASCII if plain else BLOCKS))
    if survey.block_size is None:
        parts.append("Lengths are in words: tokens, max_length and padding need --model FOLDER.\n")
    return "\n".join(parts)


def render_table(table: Table) -> str:
    """Title, columns (the first to the left, numbers to the right) and remarks."""
    cells = [table.header, *table.rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(table.header))]
    lines = [table.title]
    for row in cells:
        first, *others = (
            cell.ljust(w) if not i else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join(["", first, *others]).rstrip())
    return "\n".join([*lines, *(f"  {remark}" for remark in table.remarks)]) + "\n"


def render_histograms(survey: Survey, signs: str) -> str:
    """One block of lines for each distribution, one line per source; sources share the classes."""
    by_source = [(one.source.name, distributions(survey, one)) for one in survey.sources if len(one.measured.glances)]
    if not by_source:
        return "No row that was looked at can be used.\n"
    titles = list(dict.fromkeys(title for _, found in by_source for title in found))
    width = max(len(name) for name, _ in by_source)
    parts = []
    for title in titles:
        values = [(name, found[title]) for name, found in by_source if title in found]
        if not any(len(of_source) for _, of_source in values):
            continue
        bounds = edges([of_source for _, of_source in values])
        if len(bounds) == 2:
            parts.append(f"{title}: always {short_number(bounds[0])}\n")
            continue
        low, high = short_number(bounds[0]), short_number(bounds[-1] - 1)
        lines = [f"{title} ({low} to {high}{'' if _even(bounds) else ', logarithmic'})"]
        for name, of_source in values:
            facts = "  ".join(f"{key} {short_number(value)}" for key, value in quantiles(of_source).items())
            lines.append(f"  {name:<{width}}  |{spark(of_source, bounds, signs)}|  {facts or 'nothing'}")
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _even(bounds: np.ndarray) -> bool:
    return bool((np.diff(bounds) == 1).all())
