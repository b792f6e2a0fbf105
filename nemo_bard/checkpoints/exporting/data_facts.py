"""What a recipe's section ``dataset`` says of its data, with the counts of a prepared folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nemo_bard.base.files import read_json

PATHS = ("path", "spec", "path_or_dataset", "root_dir", "image_dir")
"""Settings that name places; only the last part of one is told."""


@dataclass(frozen=True, kw_only=True)
class SourceFacts:
    """One source of a mixture."""

    name: str
    layout: str | None = None
    rows: int | None = None
    read: int | None = None
    filtered: int = 0
    rejected: int = 0
    share: str | None = None
    """``weight 2`` or ``1.5 times``, as the recipe says."""


@dataclass(frozen=True, kw_only=True)
class DataFacts:
    """The data set of a stage."""

    name: str
    settings: tuple[tuple[str, str], ...] = ()
    sources: tuple[SourceFacts, ...] = ()


def read_data(section: Any) -> DataFacts | None:
    """Read a section; None if it is none.

    Args:
        section: ``dataset`` of a recipe.
    """
    if not isinstance(section, Mapping):
        return None
    target = str(section.get("_target_") or "").rpartition(".")[2]
    place = next((str(section[key]) for key in PATHS if section.get(key) is not None), None)
    settings = tuple(
        (key, _last_part(value) if key in PATHS else str(value))
        for key, value in section.items()
        if key not in ("_target_", "sources") and value is not None and not isinstance(value, Mapping)
    )
    return DataFacts(
        name=target or "data set",
        settings=settings,
        sources=_sources(Path(place) if place else None, section.get("sources")),
    )


def _last_part(value: object) -> str:
    return Path(str(value)).name or str(value)


def _sources(folder: Path | None, chosen: Any) -> tuple[SourceFacts, ...]:
    """Sources of a prepared folder that the recipe takes; empty where it is none, or is gone."""
    manifest = read_json(folder / "manifest.json") if folder is not None and folder.is_dir() else None
    entries = {
        entry.get("name"): entry for entry in (manifest or {}).get("sources") or [] if isinstance(entry, Mapping)
    }
    chosen = chosen if isinstance(chosen, Mapping) else {}
    found = []
    for name in chosen or entries:
        entry, share = entries.get(name) or {}, chosen.get(name) or {}
        parts, kept = entry.get("parts"), entry.get("kept")
        found.append(
            SourceFacts(
                name=str(name),
                layout=entry.get("layout"),
                rows=kept["rows"] if kept else sum(part["rows"] for part in parts) if parts is not None else None,
                read=entry.get("read"),
                filtered=sum((entry.get("filtered") or {}).values()),
                rejected=sum((entry.get("rejected") or {}).values()),
                share=_share(share),
            )
        )
    return tuple(found)


def _share(share: Any) -> str | None:
    if not isinstance(share, Mapping):
        return None
    if share.get("weight") is not None:
        return f"weight {share['weight']:g}"
    return None if share.get("repetitions") is None else f"{share['repetitions']:g} times"
