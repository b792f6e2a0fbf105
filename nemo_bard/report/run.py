"""The report of a pipeline's run directory: tables, curves, and pages that hold everything (``report.md``, ``report.html``)."""

from __future__ import annotations

import base64
import html
import json
import logging
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nemo_bard.base.files import write_text
from nemo_bard.base.metrics import markdown_table, read_lines, tail_loss

logger = logging.getLogger(__name__)

INK, QUIET, ACCENT, SECOND = "#1b1f24", "#8a939e", "#2f6f4f", "#b5542b"
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1b1f24; max-width: 1080px; margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.5rem; margin-bottom: .2rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sub { color: #5c6670; margin-top: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; } div.wide { overflow-x: auto; }
th { text-align: right; font-weight: 600; border-bottom: 2px solid #1b1f24; padding: .3rem .8rem; white-space: nowrap; }
td { text-align: right; border-bottom: 1px solid #dfe3e8; padding: .3rem .8rem; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
img { max-width: 100%; height: auto; } pre { background: #f4f6f8; padding: .8rem; overflow-x: auto; font-size: 13px; }
"""


AS_SOURCE = "token by token"
"""How a model is decoded that has no strategies."""


@dataclass(frozen=True, kw_only=True)
class StageRecord:
    """What a run directory says of one stage."""

    name: str
    block_size: int | None
    manifest: dict[str, Any]
    steps: list[dict[str, Any]] = field(default_factory=list)
    """``training.jsonl``, one entry per step."""
    validation: list[dict[str, Any]] = field(default_factory=list)
    progress: dict[str, Any] = field(default_factory=dict)
    evaluation: dict[str, Any] | None = None


def read_run(run_dir: Path) -> list[StageRecord]:
    """Read the finished stages of a run directory, in order.

    Raises:
        ValueError: If it is no run of a pipeline.
    """
    identity = run_dir / "pipeline.json"
    if not identity.is_file():
        raise ValueError(f"{run_dir} is no run directory of a pipeline: it has no pipeline.json")
    found = {}
    for file in run_dir.rglob("manifest.json"):
        manifest = json.loads(file.read_text())
        folder = file.parent
        read = {name: folder / f"{name}.json" for name in ("progress", "eval")}
        found[manifest["stage"]] = StageRecord(
            name=manifest["stage"],
            block_size=((manifest["config"].get("recipe") or {}).get("model") or {}).get("block_size"),
            manifest=manifest,
            steps=read_lines(folder / "checkpoints" / "training.jsonl"),
            validation=read_lines(folder / "checkpoints" / "validation.jsonl"),
            progress=json.loads(read["progress"].read_text()) if read["progress"].is_file() else {},
            evaluation=json.loads(read["eval"].read_text()) if read["eval"].is_file() else None,
        )
    return [found[name] for name in json.loads(identity.read_text())["stages"] if name in found]


# ------------------ tables ------------------
def duration(seconds: float | None) -> str:
    """``95`` -> ``1 min 35 s``; ``?`` if not known."""
    if seconds is None:
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def training_rows(records: Sequence[StageRecord]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of what training took."""
    header = ["stage", "B", "steps", "time", "loss", "tokens/s", "memory"]
    rows = []
    for record in records:
        loss = tail_loss(record.steps)
        speeds = [entry["tps"] for entry in record.steps[1:] or record.steps if "tps" in entry]
        device, host = (record.progress.get(f"{kind}_memory_gib", 0.0) for kind in ("device", "host"))
        rows.append(
            [
                record.name,
                str(record.block_size or "-"),
                str(len(record.steps) or "-"),
                duration(record.manifest.get("seconds")),
                "-" if loss is None else f"{loss:.3f}",
                f"{statistics.median(speeds):.0f}" if speeds else "-",
                f"{device:.1f} GiB GPU" if device else f"{host:.1f} GiB" if host else "-",
            ]
        )
    return header, rows


def score_rows(scored: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Header and cells of the table of what stages read.

    Args:
        scored: One entry per stage: ``stage``, ``block_size``, ``scores`` by name, ``tpf``, ``tokens_per_second``.
    """
    names = list(scored[0]["scores"])
    decoded = [_decoded(row) for row in scored]
    differ = len({how for how in decoded if how != AS_SOURCE}) > 1
    header = ["stage", "block size", *(n.replace("_", " ") for n in names), "tokens per forward", "tokens/s"]
    if differ:
        header.insert(2, "decoding")
    rows = [
        [
            str(row["stage"]),
            str(row["block_size"] or 1),
            *([how] if differ else []),
            *(f"{100 * row['scores'][name]:.1f} %" if name in row["scores"] else "-" for name in names),
            f"{row['tpf']:.2f}",
            f"{row['tokens_per_second']:.0f}",
        ]
        for row, how in zip(scored, decoded, strict=True)
    ]
    return header, rows


def _decoded(row: Mapping[str, Any]) -> str:
    generation = row.get("settings", {}).get("generation", {})
    return generation.get("remasking_strategy", AS_SOURCE).replace("_", " ")


def scores_of(records: Sequence[StageRecord]) -> list[dict[str, Any]]:
    """What ``score_rows`` takes, of the stages that were scored."""
    return [
        {"stage": record.name, "block_size": record.block_size or _block_size(record.evaluation), **record.evaluation}
        for record in records
        if record.evaluation is not None
    ]


def _block_size(evaluation: Mapping[str, Any]) -> int | None:
    return evaluation.get("settings", {}).get("generation", {}).get("block_size")


def html_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same as HTML."""

    def cells(tag: str, values: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values) + "</tr>"

    body = "\n".join(cells("td", row) for row in rows)
    return f"<div class=wide><table>\n{cells('th', header)}\n{body}\n</table></div>"


# ------------------ curves ------------------
def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last ``window`` values at each place."""
    return [statistics.fmean(values[max(0, i - window + 1) : i + 1]) for i in range(len(values))]


def draw_losses(records: Sequence[StageRecord], path: Path) -> None:
    """One panel per trained stage: loss of every step, its running mean, and the validation loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    trained = [record for record in records if record.steps]
    columns = min(3, len(trained))
    rows = -(-len(trained) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.5 * rows), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    for index, record in enumerate(trained):
        axes = figure.add_subplot(rows, columns, index + 1)
        x, y = [entry["step"] + 1 for entry in record.steps], [entry["loss"] for entry in record.steps]
        axes.plot(x, y, color=QUIET, linewidth=0.7, alpha=0.7, marker="." if len(x) < 3 else None)
        axes.plot(x, smooth(y, max(1, len(y) // 20)), color=ACCENT, linewidth=1.8, label="training, running mean")
        if record.validation:
            axes.plot(
                [entry["step"] + 1 for entry in record.validation],
                [entry["val_loss"] for entry in record.validation],
                "o",
                color=SECOND,
                markersize=4,
                clip_on=False,
                label="validation",
            )
            axes.legend(frameon=False, fontsize=7)
        title = record.name + (f" (B = {record.block_size})" if record.block_size else "")
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ed", linewidth=0.7)
        axes.set_axisbelow(True)
        if index >= len(trained) - columns:
            axes.set_xlabel("step", fontsize=8)
        if index % columns == 0:
            axes.set_ylabel("loss", fontsize=8)
    figure.savefig(path, dpi=150)


def draw_scores(scored: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Quality and tokens per forward of every scored stage."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10.8, 3.0), layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    places, labels = range(len(scored)), [row["stage"] for row in scored]
    for name, colour in zip(scored[0]["scores"], (ACCENT, SECOND, INK, QUIET), strict=False):
        values = [100 * row["scores"].get(name, float("nan")) for row in scored]
        left.plot(places, values, "o-", color=colour, label=name.replace("_", " "), linewidth=1.6, markersize=5)
    left.set_ylim(0, 105)
    left.set_title("right answers, %", loc="left", fontsize=10)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    bars = right.bar(places, [row["tpf"] for row in scored], color=ACCENT, width=0.55)
    right.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
    right.set_title("tokens per forward", loc="left", fontsize=10)
    right.margins(y=0.15)
    for axes in (left, right):
        axes.set_xticks(list(places), labels, fontsize=8)
        axes.tick_params(axis="y", labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e6e9ed", linewidth=0.7)
        axes.set_axisbelow(True)
    figure.savefig(path, dpi=150)


def draw_curves(records: Sequence[StageRecord], folder: Path) -> list[tuple[str, Path]]:
    """Draw what there is to draw; titles and files. Without matplotlib there is a warning and nothing else."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        logger.warning("the report has no curves: matplotlib is not installed (pip install nemo-bard[demo])")
        return []
    folder.mkdir(exist_ok=True)
    pictures = []
    if any(record.steps for record in records):
        draw_losses(records, folder / "losses.png")
        pictures.append(("Losses", folder / "losses.png"))
    scored = scores_of(records)
    if scored:
        draw_scores(scored, folder / "scores.png")
        pictures.append(("Along the chain", folder / "scores.png"))
    return pictures


# ------------------ pages ------------------
def write_report(run_dir: Path) -> Path:
    """Write ``report.md``, its pictures, and ``report.html``, which holds everything in one file.

    Args:
        run_dir: Run directory of a pipeline.

    Returns:
        The HTML page.

    Raises:
        ValueError: If it is no run directory, or no stage is finished.
    """
    records = read_run(run_dir)
    if not records:
        raise ValueError(f"{run_dir}: no stage is finished, there is nothing to report")
    name = json.loads((run_dir / "pipeline.json").read_text())["pipeline"]
    pictures = draw_curves(records, run_dir / "report")
    answers = run_dir / "answers.png"
    seconds = sum(record.manifest.get("seconds", 0.0) for record in records)
    subtitle = f"{len(records)} stages, {duration(seconds)} of training. {where_it_ran(records)}"
    sections: list[tuple[str, tuple[list[str], list[list[str]]] | None, Path | None]] = []
    scored = scores_of(records)
    if scored:
        sections.append((f"Reading {scored[0]['num_samples']} held-out samples", score_rows(scored), None))
    sections.append(("Training", training_rows(records), None))
    sections += [(title, None, path) for title, path in pictures]
    if answers.is_file():
        sections.append(("Answers of the last stage", None, answers))
    last = run_dir / records[-1].manifest["export"]
    command = f"nemo-bard generate --model {last} --image YOUR.png --prompt 'YOUR QUESTION'"
    markdown, page = [f"# {name}\n\n{subtitle}\n"], []
    for title, table, picture in sections:
        markdown.append(f"## {title}\n")
        page.append(f"<h2>{html.escape(title)}</h2>")
        if table is not None:
            markdown.append(markdown_table(*table) + "\n")
            page.append(html_table(*table))
        if picture is not None:
            markdown.append(f"![{title}]({picture.relative_to(run_dir).as_posix()})\n")
            data = base64.b64encode(picture.read_bytes()).decode()
            page.append(f'<img alt="{html.escape(title)}" src="data:image/png;base64,{data}">')
    markdown.append(f"## Try it\n\n```\n{command}\n```\n")
    page.append(f"<h2>Try it</h2><pre>{html.escape(command)}</pre>")
    write_text(run_dir / "report.md", "\n".join(markdown))
    write_text(
        run_dir / "report.html",
        f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{html.escape(name)}</title><style>{STYLE}</style>\n<h1>{html.escape(name)}</h1>"
        f"<p class=sub>{html.escape(subtitle)}</p>\n" + "\n".join(page) + "</html>\n",
    )
    return run_dir / "report.html"


def where_it_ran(records: Sequence[StageRecord]) -> str:
    """Versions and processes of the last stage, as a sentence."""
    manifest = records[-1].manifest
    processes = manifest.get("processes", 1)
    known = ", ".join(f"{package} {version}" for package, version in manifest["versions"].items())
    return f"{processes} process{'es' if processes > 1 else ''}; {known}."
