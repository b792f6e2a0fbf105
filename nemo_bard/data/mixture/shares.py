"""How much of each source a mixture takes: what users write, checked against what a prepared folder holds."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.errors import nearest, short
from nemo_bard.data.mixture.order import MOST_SOURCES
from nemo_bard.data.prepared.layout import Manifest, SourceEntry

KEYS = ("weight", "repetitions")


@dataclass(frozen=True, kw_only=True)
class Shares:
    """What a mixture takes of its sources."""

    sources: list[SourceEntry]
    """Those that are drawn from, in the folder's order."""
    weights: list[float]
    """Of each, in any unit."""
    samples: int
    """Draws."""
    asked: dict[str, dict[str, float]]
    """By source, ``weight`` or ``repetitions``."""

    @property
    def by_weight(self) -> bool:
        """Whether weights were given; else repetitions."""
        return any("weight" in one for one in self.asked.values())


def read_shares(manifest: Manifest, folder: Path, sources: object, samples: object) -> Shares:
    """Check what a mixture asks for.

    Args:
        manifest: What the folder holds.
        folder: For errors.
        sources: Name -> ``{weight: number}`` or ``{repetitions: number}``; every source as it was prepared, or once, if None.
        samples: Draws of the run; all that the repetitions give if None.

    Returns:
        What is to be drawn.

    Raises:
        ValueError: If a key, a value or a name is not as it must be, or there are too few rows.
    """
    if samples is not None and (isinstance(samples, bool) or not isinstance(samples, int) or samples < 1):
        raise ValueError(f"samples must be an integer >= 1 or null, got {samples!r}")
    asked = _asked(manifest, folder, sources)
    entries = [manifest.source(name) for name in asked]
    if len(entries) > MOST_SOURCES:
        raise ValueError(f"sources must be at most {MOST_SOURCES}, got {len(entries)}")
    if any("weight" in one for one in asked.values()):
        if samples is None:
            raise ValueError("samples must be given where sources have a weight: with weights there is no natural end")
        for entry in entries:
            if entry.rows == 0:
                raise ValueError(f"sources.{entry.name} has a weight but no rows in {folder}; leave it out")
        weights = [one["weight"] for one in asked.values()]
        return Shares(sources=entries, weights=weights, samples=samples, asked=asked)
    counts = [round(entry.rows * one["repetitions"]) for entry, one in zip(entries, asked.values(), strict=True)]
    total = sum(counts)
    if total == 0:
        raise ValueError(f"the repetitions of {_listed(list(asked))} give no sample of {folder}")
    if samples is not None and samples > total:
        raise ValueError(
            f"samples must be at most {total}, which is what the repetitions give"
            f" ({', '.join(f'{entry.name}: {count}' for entry, count in zip(entries, counts, strict=True))}), got {samples}"
        )
    drawn = [(entry, float(count)) for entry, count in zip(entries, counts, strict=True) if count]
    kept = [entry for entry, _ in drawn]
    return Shares(sources=kept, weights=[count for _, count in drawn], samples=samples or total, asked=asked)


def _asked(manifest: Manifest, folder: Path, sources: object) -> dict[str, dict[str, float]]:
    """Checked ``sources``, with what is not said filled in."""
    if sources is None:
        given = {one.name: {key: one.settings[key] for key in KEYS if key in one.settings} for one in manifest.sources}
    elif isinstance(sources, Mapping) and sources:
        given = {str(name): _section(str(name), one) for name, one in sources.items()}
    else:
        raise ValueError(
            f"sources must be a section such as {{charts: {{weight: 2}}, docs: {{weight: 1}}}}, or null for all of"
            f" {_listed(manifest.names)}, got {short(sources)}"
        )
    for name, section in given.items():
        if name not in manifest.names:
            raise _unknown(name, manifest.names, folder)
        for key, value in section.items():
            _check_number(f"sources.{name}.{key}", value)
    given = {name: given[name] for name in manifest.names if name in given}
    weighted = [name for name, one in given.items() if "weight" in one]
    if not weighted:
        return {name: {"repetitions": float(one.get("repetitions", 1))} for name, one in given.items()}
    if len(weighted) < len(given):
        other = next(name for name in given if name not in weighted)
        has = "repetitions" if given[other] else "neither"
        raise ValueError(
            f"sources must all have a weight or all have repetitions; {weighted[0]} has a weight, {other} has {has}"
        )
    return {name: {"weight": float(one["weight"])} for name, one in given.items()}


def _section(name: str, section: object) -> dict[str, Any]:
    if section is None:
        return {}
    if not isinstance(section, Mapping):
        raise ValueError(f"sources.{name} must be a section such as {{weight: 2}}, got {short(section)}")
    for key in section:
        if key not in KEYS:
            near = nearest(key, KEYS)
            hint = f"; did you mean sources.{name}.{near}?" if near else f"; it may have {' or '.join(KEYS)}"
            raise ValueError(f"unknown key sources.{name}.{key}{hint}")
    if len(section) > 1:
        raise ValueError(f"sources.{name} must have a weight or repetitions, not both")
    return dict(section)


def _check_number(key: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ValueError(f"{key} must be a finite number > 0, got {value!r}")


def _unknown(name: str, known: Sequence[str], folder: Path) -> ValueError:
    near = nearest(name, known)
    hint = f"; did you mean {near}?" if near else ""
    return ValueError(f"sources: {folder} has no source {name}{hint}; it has {_listed(known)}")


def _listed(names: Sequence[str], most: int = 12) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
