"""Find the fastest decoding setting of a checkpoint within a tolerated loss of accuracy."""

from __future__ import annotations

import json
import logging
import platform
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import cycle, product
from pathlib import Path
from typing import Any

from tqdm import tqdm

from nemo_bard.base.settings import check_keys
from nemo_bard.evaluation.evaluate import EvalResult, Scorer, evaluate
from nemo_bard.generation.adapters import trained_block_size
from nemo_bard.generation.parameters import GENERAL, STRATEGIES, calibrated_strategies, strategy_fields
from nemo_bard.generation.settings import BardGenerationConfig

logger = logging.getLogger(__name__)

OBJECTIVES: dict[str, str] = {"tokens_per_second": "tokens per second", "tpf": "tokens per forward"}
"""What is maximised: measured on this machine, or counted (the same on every machine)."""
DEFAULT_STRATEGY = GENERAL["remasking_strategy"].default
MARKERS = "osD^vP*X"
BACKUP_NAME = "generation_config.before-calibration.json"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One point of the sweep."""

    block_size: int
    denoising_steps: int
    strategy: str
    parameters: tuple[tuple[str, Any], ...] = ()
    """Names and values of the strategy's parameters that are swept."""

    def apply(self, base: BardGenerationConfig, trained_block_size: int | None) -> BardGenerationConfig:
        """Return ``base`` with this setting; the checkpoint's own block size stays in its ``config.json`` alone."""
        return base.updated(
            block_size=None if self.block_size == trained_block_size else self.block_size,
            denoising_steps=None if self.denoising_steps == self.block_size else self.denoising_steps,
            remasking_strategy=self.strategy,
            **dict(self.parameters),
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, the parameters beside the rest."""
        own = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "parameters"}
        return {**own, **dict(self.parameters)}

    def __str__(self) -> str:
        words = [f"B = {self.block_size}", f"{self.denoising_steps} step{'s' * (self.denoising_steps > 1)}"]
        if self.strategy != DEFAULT_STRATEGY and self.strategy not in dict(self.parameters):
            words.append(self.strategy.removeprefix("low_confidence_"))
        words += [f"{name.removeprefix('confidence_')} {_plain(value)}" for name, value in self.parameters]
        return ", ".join(words)


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True, kw_only=True)
class Point:
    """What a setting reached."""

    setting: Setting
    score: float
    """Mean of the metric, in [0, 1]."""
    tokens_per_second: float
    tpf: float
    """Tokens per denoising forward."""
    tpf_with_commits: float
    seconds: float

    def speed(self, objective: str) -> float:
        """Value of an objective."""
        return getattr(self, objective)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is chosen."""

    tolerance: float = 0.5
    """Tolerated loss in percentage points of the score, >= 0."""
    objective: str = "tokens_per_second"
    """One of ``OBJECTIVES``: what is maximised."""
    baseline: float | None = None
    """Score in [0, 1] that the loss is counted from; the best score of the sweep if None."""

    def __post_init__(self) -> None:
        if not self.tolerance >= 0:
            raise ValueError(f"tolerance must be a number of percentage points >= 0, got {self.tolerance!r}")
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}")
        if self.baseline is not None and not 0 <= self.baseline <= 1:
            raise ValueError(f"baseline must be a score in [0, 1], got {self.baseline!r}")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A finished sweep."""

    points: list[Point]
    chosen: Point
    reference: float
    """Score that the loss is counted from."""
    goal: Goal
    metric: str
    num_samples: int
    config: BardGenerationConfig
    """The chosen setting."""
    environment: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values."""
        plain = {item.name: getattr(self, item.name) for item in fields(self)}
        plain["points"] = [_as_dict(point) for point in self.points]
        plain["chosen"] = _as_dict(self.chosen)
        plain["goal"] = asdict(self.goal)
        plain["config"] = self.config.to_diff_dict()
        return plain


def _as_dict(point: Point) -> dict[str, Any]:
    return {**asdict(point), "setting": point.setting.to_dict()}


def make_grid(
    block_sizes: Sequence[int],
    *,
    steps: Sequence[int] | None = None,
    values: Mapping[str, Sequence[Any]] | None = None,
    strategies: Sequence[str] | None = None,
) -> list[Setting]:
    """List the settings to try.

    Args:
        block_sizes: Block sizes.
        steps: Denoising steps per block; a number above a block size means the block size. If None, a strategy whose
            parameters are swept gets the block size, another one the block size and its halves down to 1.
        values: Values of strategies' parameters; what a strategy itself names (``Strategy.swept``) where there are none.
        strategies: Names; those that are ``calibrated`` if None.

    Returns:
        Settings without repetition: block sizes as given, each with every strategy, number of steps and parameters.

    Raises:
        ValueError: For an empty list, a parameter that no strategy has, or a value that is not allowed.
    """
    values = values or {}
    for name, given in (("block_sizes", block_sizes), ("steps", steps), ("strategies", strategies), *values.items()):
        if given is not None and not given:
            raise ValueError(f"{name} must not be empty")
    strategies = calibrated_strategies() if strategies is None else strategies
    check_keys("", values, parameter_names([*STRATEGIES, *strategies]), "parameter of a strategy")
    grid: dict[Setting, None] = {}
    for size in block_sizes:
        BardGenerationConfig(block_size=size)
        for strategy in strategies:
            swept = swept_values(strategy, values)
            halves = not swept and not STRATEGIES.get(strategy).by_next_token
            for count in steps if steps is not None else _default_steps(size, halves=halves):
                for point in product(*swept.values()):
                    parameters = tuple(zip(swept, point, strict=True))
                    BardGenerationConfig(denoising_steps=count, remasking_strategy=strategy, **dict(parameters))
                    setting = Setting(
                        block_size=size,
                        denoising_steps=min(count, size),
                        strategy=strategy,
                        parameters=parameters,
                    )
                    grid[setting] = None
    return list(grid)


def parameter_names(strategies: Iterable[str]) -> list[str]:
    """Return the names of all parameters of these strategies."""
    return list(dict.fromkeys(name for strategy in strategies for name in strategy_fields(strategy)))


def swept_values(strategy: str, values: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
    """Return what is tried for the parameters of a strategy: ``values`` where given, else its own; others stay as they are."""
    own = {**STRATEGIES.get(strategy).swept, **values}
    return {name: own[name] for name in strategy_fields(strategy) if name in own}


def _default_steps(size: int, *, halves: bool) -> list[int]:
    return [size >> shift for shift in range(size.bit_length())] if halves else [size]


def current_setting(base: BardGenerationConfig, trained_block_size: int | None) -> Setting:
    """Return the setting that a checkpoint decodes with now.

    Raises:
        ValueError: If neither the settings nor the checkpoint name a block size.
    """
    given, strategy = base.resolve()
    size = given.block_size if given.block_size is not None else trained_block_size
    if size is None:
        raise ValueError("block_size is set neither in generation_config.json nor in config.json; pass --block-sizes")
    swept = swept_values(given.remasking_strategy, {})
    return Setting(
        block_size=size,
        denoising_steps=min(given.denoising_steps or size, size),
        strategy=given.remasking_strategy,
        parameters=tuple((name, getattr(strategy, name)) for name in swept),
    )


def choose(points: Sequence[Point], goal: Goal) -> tuple[Point, float]:
    """Pick the fastest point within the tolerated loss.

    Args:
        points: What was measured.
        goal: What to choose.

    Returns:
        The point, and the score that the loss was counted from. Of equally fast points the more accurate one.

    Raises:
        ValueError: If no point is within the tolerance of the baseline.
    """
    best = max(point.score for point in points)
    reference = best if goal.baseline is None else goal.baseline
    # 1e-9: 100 * (0.9 - 0.895) must not exceed 0.5 by rounding.
    admitted = [point for point in points if 100 * (reference - point.score) <= goal.tolerance + 1e-9]
    if not admitted:
        raise ValueError(
            f"no setting is within {goal.tolerance:g} points of the baseline {100 * reference:.2f} %;"
            f" the best reaches {100 * best:.2f} %"
        )
    return max(admitted, key=lambda point: (point.speed(goal.objective), point.score)), reference


def calibrate(
    model: Any,
    processor: Any,
    dataset: Sequence[dict[str, Any]],
    grid: Sequence[Setting],
    goal: Goal | None = None,
    *,
    base: BardGenerationConfig | None = None,
    max_new_tokens: int | None = None,
    batch_size: int = 8,
    scorer: str | Scorer | None = None,
    repeats: int = 2,
) -> Calibration:
    """Measure every setting and choose one; the present setting of ``base`` is measured too.

    Every setting decodes the whole data set ``repeats`` times, in rounds over all settings, and its fastest round counts:
    what else a machine does can only slow a round down. An untimed batch comes first, for compilation.

    Args:
        model: A BARD model.
        processor: Its processor.
        dataset: See ``nemo_bard.evaluation.evaluate.evaluate``.
        grid: What ``make_grid`` returned.
        goal: What to choose; half a point of loss for the most tokens per second if None.
        base: Everything that is not swept; the model's generation config if None.
        max_new_tokens: Most response tokens while measuring; those of ``base`` if None.
        batch_size: Prompts decoded together: speed is measured at this size.
        scorer: See ``nemo_bard.evaluation.evaluate.resolve_scorer``; the first score it returns counts, and it must be in [0, 1].
        repeats: Rounds.

    Returns:
        All points and the choice.

    Raises:
        ValueError: For an argument that is not allowed, a score outside [0, 1], or a baseline out of reach.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be an integer >= 1, got {repeats!r}")
    goal = goal if goal is not None else Goal()
    start: BardGenerationConfig = base if base is not None else model.generation_config
    measured = start if max_new_tokens is None else start.updated(max_new_tokens=max_new_tokens)
    trained = trained_block_size(model, start.adapter)
    present = current_setting(start, trained)
    settings = list(dict.fromkeys([present, *grid]))
    results: dict[Setting, EvalResult] = {}
    with tqdm(total=repeats * len(settings), desc="calibrating", unit="run", disable=None) as bar, _quiet_block_sizes():
        for number in range(repeats):
            for setting in settings:
                bar.set_postfix_str(str(setting))
                result = evaluate(
                    model,
                    processor,
                    dataset,
                    generation_config=setting.apply(measured, trained),
                    batch_size=batch_size,
                    scorer=scorer,
                    progress=False,
                    warm_up=number == 0,
                )
                if setting not in results or result.seconds < results[setting].seconds:
                    results[setting] = result
                bar.update()
    points = [_point(setting, result) for setting, result in results.items()]
    one = next(iter(results.values()))
    if goal.tolerance < 100 / one.num_samples:
        logger.warning(
            "with %d samples one answer is %.2f points, more than the tolerance of %g; use more samples",
            one.num_samples,
            100 / one.num_samples,
            goal.tolerance,
        )
    if not any(point.score for point in points):
        logger.warning("every setting has %s 0: there is no accuracy to keep, only speed was compared", one.metric)
    chosen, reference = choose(points, goal)
    return Calibration(
        points=points,
        chosen=chosen,
        reference=reference,
        goal=goal,
        metric=one.metric,
        num_samples=one.num_samples,
        config=chosen.setting.apply(start, trained),
        environment={**_environment(model, batch_size), "repeats": repeats},
    )


@contextmanager
def _quiet_block_sizes() -> Iterator[None]:
    """Trying other block sizes is the purpose here, so ``generate`` need not warn about each."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="block_size=.* differs from")
        yield


def _point(setting: Setting, result: EvalResult) -> Point:
    if not 0 <= result.score <= 1:
        raise ValueError(f"calibration needs a score in [0, 1], {result.metric} is {result.score!r}")
    return Point(
        setting=setting,
        score=result.score,
        tokens_per_second=result.tokens_per_second,
        tpf=result.tpf,
        tpf_with_commits=result.tpf_with_commits,
        seconds=result.seconds,
    )


def _environment(model: Any, batch_size: int) -> dict[str, Any]:
    import torch
    import transformers

    from nemo_bard import __version__

    device = model.device
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu ({platform.machine()})",
        "dtype": str(model.dtype).removeprefix("torch."),
        "batch_size": batch_size,
        "threads": torch.get_num_threads(),
        "nemo_bard": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def write_results(calibration: Calibration, folder: str | Path) -> list[Path]:
    """Write ``calibration.json``, ``calibration.png`` and ``generation_config.json`` into a folder.

    Args:
        calibration: The sweep.
        folder: Made if absent; files of these names are replaced.

    Returns:
        The files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    table = folder / "calibration.json"
    table.write_text(json.dumps(calibration.to_dict(), indent=2) + "\n", encoding="utf-8")
    picture = folder / "calibration.png"
    draw_curve(calibration, picture)
    calibration.config.save_pretrained(folder)
    return [table, picture, folder / "generation_config.json"]


def write_into_model(calibration: Calibration, folder: str | Path) -> Path | None:
    """Put the chosen setting into a model folder, or of an adapter into its own; the file that was there is kept.

    Args:
        calibration: The sweep.
        folder: Checkpoint folder, or the adapter's.

    Returns:
        Where the earlier file is now (``BACKUP_NAME``, with a number if that name is taken), None if there was none.
    """
    folder = Path(folder)
    file, backup = folder / "generation_config.json", None
    if file.exists():
        backup = next(path for path in _backup_names(folder) if not path.exists())
        backup.write_bytes(file.read_bytes())
        file.unlink()  # a hard link to another checkpoint's file must not be written through
    calibration.config.updated(adapter=None).save_pretrained(folder)  # an adapter's folder says which it is
    return backup


def _backup_names(folder: Path) -> Iterable[Path]:
    stem, suffix = BACKUP_NAME.rsplit(".", 1)
    yield folder / BACKUP_NAME
    number = 2
    while True:
        yield folder / f"{stem}-{number}.{suffix}"
        number += 1


def pareto(points: Sequence[Point], speed: Callable[[Point], float]) -> list[Point]:
    """Return the points that no other beats in both speed and score, from slow to fast."""
    best, front = float("-inf"), []
    for point in sorted(points, key=lambda p: (speed(p), p.score), reverse=True):
        if point.score > best:
            front.append(point)
            best = point.score
    return front[::-1]


def draw_curve(calibration: Calibration, path: str | Path) -> None:
    """Draw score over tokens per second and over tokens per forward, with the chosen point marked (needs matplotlib)."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colormap = matplotlib.colormaps["viridis"]
    sizes = sorted({point.setting.block_size for point in calibration.points})
    colors = {size: colormap(0.85 * order / max(1, len(sizes) - 1)) for order, size in enumerate(sizes)}
    floor = 100 * calibration.reference - calibration.goal.tolerance
    shown, bottom = _visible(calibration, floor)
    figure = Figure(figsize=(12, 5.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, objective in zip(axes, OBJECTIVES, strict=True):
        _draw_points(axis, shown, objective, colors)
        axis.axhspan(bottom, floor, color="0.92", zorder=0)
        axis.axhline(
            floor, color="0.55", linewidth=1, linestyle="--", label=f"tolerance {calibration.goal.tolerance:g} points"
        )
        chosen = calibration.chosen
        axis.scatter(
            [chosen.speed(objective)],
            [100 * chosen.score],
            s=280,
            facecolors="none",
            edgecolors="tab:red",
            linewidths=2,
            label=f"chosen: {chosen.setting}",
            zorder=4,
        )
        optimised = " (optimised)" if objective == calibration.goal.objective else ""
        axis.set_xlabel(f"{OBJECTIVES[objective]}{optimised}")
        axis.set_xlim(0, 1.12 * max(p.speed(objective) for p in shown))
        axis.grid(alpha=0.3)
    top = max(100 * p.score for p in shown)
    axes[0].set_ylim(bottom, top + 0.08 * (top - bottom))
    hidden = len(calibration.points) - len(shown)
    below = f"\n{hidden} less accurate settings lie below" if hidden else ""
    axes[0].set_ylabel(f"{calibration.metric.replace('_', ' ')} (%){below}")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False)
    environment = calibration.environment
    where = f", {environment['device']}, batch size {environment['batch_size']}" if environment else ""
    figure.suptitle(
        f"Accuracy and speed of {len(calibration.points)} settings, {calibration.num_samples} samples{where}"
    )
    figure.savefig(path, dpi=130)


def _visible(calibration: Calibration, floor: float) -> tuple[list[Point], float]:
    """Points to draw and the lower end of the axis: far below the tolerated loss, differences are of no interest."""
    bottom = floor - max(8.0, 5 * calibration.goal.tolerance)
    shown = [point for point in calibration.points if 100 * point.score >= bottom]
    lowest = min(100 * point.score for point in shown)
    if len(shown) == len(calibration.points):
        bottom = min(lowest, floor) - 0.5
    return shown, bottom


def _draw_points(axis: Any, points: list[Point], objective: str, colors: dict[int, Any]) -> None:
    """Draw points by block size and strategy, and the line through those that no other beats, with their settings."""
    strategies = dict.fromkeys(point.setting.strategy for point in points)
    for size, color in colors.items():
        for strategy, marker in zip(strategies, cycle(MARKERS), strict=False):
            found = [p for p in points if (p.setting.block_size, p.setting.strategy) == (size, strategy)]
            if found:
                axis.scatter(
                    [p.speed(objective) for p in found],
                    [100 * p.score for p in found],
                    color=color,
                    marker=marker,
                    s=48,
                    label=f"B = {size}, {strategy.removeprefix('low_confidence_')}",
                    zorder=3,
                )
    front = pareto(points, lambda point: point.speed(objective))
    xs, ys = [p.speed(objective) for p in front], [100 * p.score for p in front]
    axis.plot(xs, ys, color="0.5", linewidth=1, label="best trade-off (parameters or steps beside it)", zorder=2)
    for point, x, y in zip(front, xs, ys, strict=True):
        values = [_plain(value) for _, value in point.setting.parameters]
        note = ", ".join(values) or f"{point.setting.denoising_steps} st."
        axis.annotate(note, (x, y), xytext=(7, 5), textcoords="offset points", fontsize=8, color="0.25", zorder=5)
