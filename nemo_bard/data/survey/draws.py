"""What a run draws from each source, as ``data.mixture`` does it, without planning the draws one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from nemo_bard.base.errors import one_line
from nemo_bard.data.mixture.shares import read_shares
from nemo_bard.data.prepared.layout import Manifest
from nemo_bard.data.survey.sources import Source


@dataclass(frozen=True, kw_only=True)
class Draws:
    """What a run takes from a source."""

    weight: float
    """Part of the run's samples, the sources' together 1."""
    samples: int
    epochs: float
    """How often each row is seen, on average."""


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What a recipe or a data section of a chain says of a run."""

    path: str | None = None
    sources: Any = None
    samples: Any = None
    max_length: int | None = None


def read_run(file: Path) -> RunSection:
    """Read what is to be drawn from a recipe (its ``dataset``) or from a data section of a chain (``conf/data/*.yaml``).

    Args:
        file: YAML.

    Raises:
        ValueError: If it cannot be read, or a value that is needed is written as a reference to another one.
    """
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config {file} cannot be read as YAML ({one_line(error)})") from error
    if not isinstance(raw, Mapping):
        raise ValueError(f"--config {file} must hold a section, got {type(raw).__name__}")
    section = raw.get("dataset", raw)
    if not isinstance(section, Mapping) or not {"path", "sources", "samples"} & set(section):
        raise ValueError(f"--config {file} has neither a dataset nor path, sources and samples of one")
    collate = (raw.get("dataloader") or {}).get("collate_fn") or {}
    values = {
        "path": section.get("path"),
        "sources": section.get("sources"),
        "samples": section.get("samples"),
        "max_length": collate.get("max_length", raw.get("max_length")),
    }
    for key, value in values.items():
        if isinstance(value, str) and "${" in value:
            raise ValueError(
                f"--config {file}: {key} is the reference {value}; write its value, or give it as an option"
            )
    return RunSection(**values)


def plan_draws(sources: Sequence[Source], folder: Path, *, asked: Any = None, samples: Any = None) -> dict[str, Draws]:
    """How many samples of each source a run takes.

    Args:
        sources: All there are.
        folder: Where they are, for errors.
        asked: Name -> ``{weight: number}`` or ``{repetitions: number}``, as ``MixtureDataset`` takes it; None means every
            source, as it was prepared, or once. Sources outside of prepared folders take no part in mixtures.
        samples: Of the run; what the repetitions give if None, or with weights as many as there are rows.

    Returns:
        For each source, also for those that nothing is drawn from; every count is less than one off its share.

    Raises:
        ValueError: As ``shares.read_shares``.
    """
    entries = [source.entry for source in sources if source.entry is not None]
    if len(entries) < len(sources):
        if asked is not None:
            raise ValueError("weights and repetitions need a prepared folder; see `nemo-bard data prepare --help`")
        only = sources[0]
        return {only.name: _draws(1.0, only.rows if samples is None else samples, only.rows)}
    manifest = Manifest(sources=entries)
    given = [entry.settings for entry in entries] if asked is None else list(asked.values())
    if samples is None and any(isinstance(one, Mapping) and "weight" in one for one in given):
        samples = sum(entry.rows for entry in entries)
    shares = read_shares(manifest, folder, asked, samples)
    total = sum(shares.weights)
    weights = {entry.name: weight / total for entry, weight in zip(shares.sources, shares.weights, strict=True)}
    counts = _whole_counts(weights, shares.samples)
    return {e.name: _draws(weights.get(e.name, 0.0), counts.get(e.name, 0), e.rows) for e in entries}


def _draws(weight: float, samples: int, rows: int) -> Draws:
    return Draws(weight=weight, samples=samples, epochs=samples / rows if rows else 0.0)


def _whole_counts(weights: Mapping[str, float], samples: int) -> dict[str, int]:
    """Counts in proportion to weights that sum up to 1, by largest remainders."""
    counts = {name: int(samples * weight) for name, weight in weights.items()}
    order = sorted(weights, key=lambda name: counts[name] - samples * weights[name])
    for name in order[: samples - sum(counts.values())]:
        counts[name] += 1
    return counts
