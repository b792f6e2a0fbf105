"""The histograms of a survey as one PNG, for a light or a dark page."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any

import numpy as np

from nemo_bard.data.survey.survey import Survey, distributions
from nemo_bard.report.data.histogram import edges, short_number

MOST_LINES = 8
"""Sources that have a line of their own; those with fewer draws share the last one."""
COLORS = ("#4477aa", "#cc6677", "#228833", "#b8860b", "#66a5c4", "#aa3377", "#8a6fb0", "#7f8790")
"""After Paul Tol's bright scheme: told apart by the colour-blind, and visible on light and dark."""


@dataclass(frozen=True, kw_only=True)
class Shades:
    """Colours of a page."""

    paper: str
    ink: str
    line: str


LIGHT = Shades(paper="#ffffff", ink="#1b1e23", line="#d5d8dd")
DARK = Shades(paper="#1d2026", ink="#eceef1", line="#3a404a")


def draw_histograms(survey: Survey, shades: Shades = LIGHT) -> bytes:
    """Draw a panel for each distribution, with a line per source, in percent of its samples.

    Args:
        survey: What to draw.
        shades: Colours of paper, text and lines.

    Returns:
        A PNG file.

    Raises:
        ValueError: If matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("pictures need matplotlib, which is not installed (pip install nemo-bard[demo])") from error

    lines = _lines(survey)
    everything = list(dict.fromkeys(title for found in lines.values() for title in found if len(found[title])))
    titles = [title for title in everything if _differs(lines, title)] or everything
    rows = max(-(-len(titles) // 2), 1)
    figure = Figure(figsize=(10.8, 2.9 * rows), layout="constrained", facecolor=shades.paper)
    FigureCanvasAgg(figure)
    for number, title in enumerate(titles):
        axes = figure.add_subplot(rows, 2, number + 1, facecolor=shades.paper)
        _draw_panel(axes, title, {name: found[title] for name, found in lines.items() if title in found}, shades)
        if number == 0 and len(lines) > 1:
            axes.legend(frameon=False, fontsize=8, labelcolor=shades.ink)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=130, format="png", metadata={"Software": None})
    return stream.getvalue()


def _differs(lines: dict[str, dict[str, np.ndarray]], title: str) -> bool:
    """Whether a distribution has more than one value; otherwise the text says it all."""
    values = np.concatenate([found[title] for found in lines.values() if title in found])
    return bool(len(values)) and values.min() < values.max()


def _lines(survey: Survey) -> dict[str, dict[str, np.ndarray]]:
    """Distributions by the name of a line."""
    by_draws = sorted(survey.sources, key=lambda one: -one.draws.samples)
    own = by_draws if len(by_draws) <= MOST_LINES else by_draws[: MOST_LINES - 1]
    lines = {one.source.name: distributions(survey, one) for one in own if len(one.measured.glances)}
    if rest := by_draws[len(own) :]:
        found = [distributions(survey, one) for one in rest if len(one.measured.glances)]
        titles = dict.fromkeys(title for of_source in found for title in of_source)
        name = f"{len(rest)} others"
        lines[name] = {title: np.concatenate([f[title] for f in found if title in f]) for title in titles}
    return lines


def _draw_panel(panel: Any, title: str, values: dict[str, np.ndarray], shades: Shades) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullFormatter

    bounds = edges(list(values.values()))
    even = bool((np.diff(bounds) == 1).all())
    places = bounds - 0.5 if even else np.maximum(bounds, 0.5)
    for color, of_source in zip(COLORS, values.items(), strict=False):
        name, numbers = of_source
        counts, _ = np.histogram(numbers, bounds)
        share = 100 * counts / max(counts.sum(), 1)
        panel.stairs(share, places, color=color, linewidth=1.6, label=name, fill=len(values) == 1, alpha=0.9)
    panel.set_title(title, loc="left", fontsize=10, color=shades.ink)
    if not even:
        panel.set_xscale("log")
        panel.xaxis.set_minor_formatter(NullFormatter())
    else:
        panel.xaxis.set_major_locator(MaxNLocator(9, integer=True) if len(bounds) > 2 else FixedLocator([bounds[0]]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short_number(value)))
    panel.set_ylim(bottom=0)
    panel.set_ylabel("% of samples", fontsize=8, color=shades.ink)
    panel.tick_params(which="both", labelsize=8, colors=shades.ink)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(shades.line)
    panel.grid(axis="y", color=shades.line, linewidth=0.7)
    panel.set_axisbelow(True)
