"""The model card of an export: what the run knows of itself, in the words of the hub; what it does not know is left out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import yaml

from nemo_bard.base.metrics import markdown_table
from nemo_bard.checkpoints.exporting.data_facts import DataFacts
from nemo_bard.checkpoints.exporting.facts import RunFacts, StageFacts
from nemo_bard.checkpoints.exporting.usage import generate_section, serve_section

PAPER = "https://arxiv.org/abs/2604.16514"
PACKAGES = ("nemo-bard", "nemo-automodel", "torch", "transformers")


def write_card(name: str, facts: RunFacts, config: Mapping[str, Any], *, self_contained: bool = False) -> str:
    """Write a model card.

    Args:
        name: Title: the folder's.
        facts: What the run knows.
        config: The exported ``config.json``.
        self_contained: Whether the folder carries its own code.

    Returns:
        Markdown with a YAML head.
    """
    parts = [
        f"---\n{yaml.safe_dump(head(facts, self_contained=self_contained), sort_keys=False)}---\n",
        f"# {name}\n",
        _summary(facts, config),
        _training(facts),
        _data(facts),
        _scores(facts),
        _calibration(facts.calibration),
        generate_section(name, self_contained=self_contained),
        serve_section(name),
        _limits(facts, config),
        _versions(facts),
    ]
    return "\n".join(part for part in parts if part)


def head(facts: RunFacts, *, self_contained: bool = False) -> dict[str, Any]:
    """The card's YAML head; keys that the run does not know are not there."""
    known: dict[str, Any] = {}
    if facts.license is not None:
        known["license"] = facts.license
    if facts.base_model is not None:
        known |= {"base_model": facts.base_model, "base_model_relation": "finetune"}
    return {
        **known,
        "library_name": "transformers" if self_contained else "nemo_bard",
        "pipeline_tag": "image-text-to-text",
        "tags": ["bard", "block-diffusion", "diffusion-language-model", "vision-language-model"],
    }


def _summary(facts: RunFacts, config: Mapping[str, Any]) -> str:
    size = config.get("block_size")
    blocks = "" if size is None else f" It denoises blocks of {size} tokens together."
    lines = [
        "A vision-language model with the architecture and weight names of Qwen3-VL that decodes by block diffusion"
        f" ([BARD]({PAPER})).{blocks}\n"
    ]
    base = facts.base_model or facts.base_folder
    if base is not None:
        link = f"[{base}](https://huggingface.co/{base})" if facts.base_model else f"`{base}`"
        lines.append(f"Base model: {link}.\n")
    elif facts.stages and facts.stages[0].kind == "random weights":
        lines.append("Base model: none, training began with random weights.\n")
    return "\n".join(lines)


# ------------------ training ------------------
def _training(facts: RunFacts) -> str:
    if not facts.stages:
        return ""
    columns = {
        "stage": [stage.name for stage in facts.stages],
        "kind": [stage.kind for stage in facts.stages],
        "block size": [_number(stage.block_size) for stage in facts.stages],
        "steps": [_number(stage.steps) for stage in facts.stages],
        "learning rate": [_number(stage.learning_rate) for stage in facts.stages],
        "batch size": [_number(stage.batch_size) for stage in facts.stages],
        "samples": [_number(stage.samples) for stage in facts.stages],
        "supervised tokens": [_number(stage.tokens) for stage in facts.stages],
        "loss": [_loss(stage.loss) for stage in facts.stages],
        "validation loss": [_loss(stage.validation_loss) for stage in facts.stages],
        "anchor": [stage.anchor or "-" for stage in facts.stages],
        "adapters": [stage.adapters or "-" for stage in facts.stages],
    }
    table = _table(columns)
    pipeline = f" of the pipeline `{facts.pipeline}`" if facts.pipeline else ""
    return (
        f"## Training\n\nStages{pipeline}, in order; the loss is the mean of the last tenth of the steps.\n\n{table}\n"
    )


def _table(columns: Mapping[str, Sequence[str]]) -> str:
    """A Markdown table without the columns that nothing is known of."""
    kept = {name: cells for name, cells in columns.items() if any(cell != "-" for cell in cells)}
    return markdown_table(list(kept), [list(row) for row in zip(*kept.values(), strict=True)])


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# ------------------ data ------------------
def _data(facts: RunFacts) -> str:
    sets: dict[DataFacts, list[str]] = {}
    for stage in facts.stages:
        if stage.data is not None:
            sets.setdefault(stage.data, []).append(stage.name)
    if not sets:
        return ""
    return "## Data\n\n" + "\n".join(_data_set(data, stages) for data, stages in sets.items())


def _data_set(data: DataFacts, stages: Sequence[str]) -> str:
    settings = "".join(f", {key} {value}" for key, value in data.settings)
    text = f"{', '.join(stages)}: `{data.name}`{settings}.\n"
    if not data.sources:
        return text
    table = _table(
        {
            "source": [source.name for source in data.sources],
            "layout": [source.layout or "-" for source in data.sources],
            "samples": [_number(source.rows) for source in data.sources],
            "rows read": [_number(source.read) for source in data.sources],
            "filtered": [_number(source.filtered) for source in data.sources],
            "rejected": [_number(source.rejected) for source in data.sources],
            "share": [source.share or "-" for source in data.sources],
        }
    )
    return f"{text}\n{table}\n"


# ------------------ scores ------------------
def _scores(facts: RunFacts) -> str:
    scored = [stage for stage in facts.stages if stage.scores is not None and stage.scores.get("scores")]
    if not scored:
        return ""
    names = list(dict.fromkeys(name for stage in scored for name in _of(stage)["scores"]))
    columns = {"stage": [stage.name for stage in scored]}
    for name in names:
        columns[name.replace("_", " ")] = [_percent(_of(stage)["scores"].get(name)) for stage in scored]
    columns["tokens per forward"] = [_two(_of(stage).get("tpf")) for stage in scored]
    columns["tokens/s"] = [_whole(_of(stage).get("tokens_per_second")) for stage in scored]
    last = _of(scored[-1])
    where = f" of `{facts.evaluated_on}`" if facts.evaluated_on else ""
    count = f"{last['num_samples']:,} samples" if last.get("num_samples") else "The samples"
    return f"## Scores\n\n{count}{where}{_how(last)}.\n\n{_table(columns)}\n"


def _of(stage: StageFacts) -> dict[str, Any]:
    return stage.scores or {}


def _how(scores: Mapping[str, Any]) -> str:
    settings = scores.get("settings") or {}
    words = [f"{key.replace('_', ' ')} {settings[key]}" for key in ("device", "dtype", "batch_size") if key in settings]
    decoding = settings.get("generation") or {}
    if decoding.get("remasking_strategy") is not None:
        words.append(f"`{decoding['remasking_strategy']}`")
    if decoding.get("confidence_threshold") is not None:
        words.append(f"confidence threshold {decoding['confidence_threshold']}")
    return f" ({', '.join(words)})" if words else ""


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _two(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _whole(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"


def _calibration(calibration: Mapping[str, Any] | None) -> str:
    chosen = (calibration or {}).get("chosen")
    if not isinstance(chosen, Mapping):
        return ""
    setting = ", ".join(f"{key} {value}" for key, value in (chosen.get("setting") or {}).items())
    metric = str((calibration or {}).get("metric", "score")).replace("_", " ")
    return (
        f"## Decoding\n\n`generation_config.json` holds the setting that `nemo-bard calibrate` chose: {setting}; {metric}"
        f" {_percent(chosen.get('score'))}, {_two(chosen.get('tpf'))} tokens per forward,"
        f" {_whole(chosen.get('tokens_per_second'))} tokens/s.\n"
    )


# ------------------ the rest ------------------
def _limits(facts: RunFacts, config: Mapping[str, Any]) -> str:
    lines = []
    trained = sorted({stage.block_size for stage in facts.stages if stage.block_size and stage.steps})
    if trained:
        lines.append(f"Trained with blocks of {', '.join(map(str, trained))} tokens; larger ones were not trained.")
    if config.get("context_attention") == "block":
        lines.append("Prompts attend within blocks: next-token decoding with these weights is not what was trained.")
    if not any(stage.scores for stage in facts.stages):
        lines.append("No scores are known of this checkpoint.")
    if facts.calibration is None:
        lines.append("The decoding settings are not calibrated for this checkpoint.")
    if facts.base_model is not None:
        lines.append("What the base model's card says of its limits and intended use holds here too.")
    return "## Limits\n\n" + "\n".join(f"- {line}" for line in lines) + "\n" if lines else ""


def _versions(facts: RunFacts) -> str:
    trained = facts.stages[-1].versions if facts.stages else {}
    rows = []
    if trained:
        rows.append("Trained with " + ", ".join(f"{name} {found}" for name, found in trained.items()) + ".")
    here = {name: found for name in PACKAGES if (found := _installed(name)) is not None}
    rows.append("Exported with " + ", ".join(f"{name} {found}" for name, found in here.items()) + ".")
    return "## Versions\n\n" + "\n".join(rows) + "\n"


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
