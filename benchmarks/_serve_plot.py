"""The plot of ``serve.py``: clients against tokens/s and time to the first block."""

from __future__ import annotations

from pathlib import Path

from _report import Row

PANELS = {"tokens_per_second": "response tokens/s", "first_p50_ms": "ms to the first block (rival: token), median"}


def plot(rows: list[Row], path: Path) -> bool:
    """Draw a line for each server; False without matplotlib or without anything to draw."""
    measured = [row for row in rows if "tokens_per_second" in row]
    try:
        import matplotlib
    except ModuleNotFoundError:
        return False
    if not measured:
        return False
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 4.5))
    for axis, (key, title) in zip(axes, PANELS.items(), strict=True):
        for name in dict.fromkeys(row["server"] for row in measured):
            points = sorted((row["clients"], row[key]) for row in measured if row["server"] == name and key in row)
            axis.plot([x for x, _ in points], [y for _, y in points], marker="o", label=name)
        levels = sorted({row["clients"] for row in measured})
        axis.set_xscale("log", base=2)
        axis.set_xticks(levels, [str(level) for level in levels])
        axis.set(title=title, xlabel="clients", ylim=(0, 1.1 * max([row.get(key, 0) for row in measured]) or 1))
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True
