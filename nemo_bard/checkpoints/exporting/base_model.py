"""What is known of the model that training began with: its name on the hub, its licence."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CARD = "README.md"
LICENSES = {
    "apache-2.0": re.compile(r"\s*Apache License\s+Version 2\.0, January 2004"),
    "mit": re.compile(r"\s*(The )?MIT License"),
}
"""Name on the hub -> how its text begins."""
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")
_FRONT = re.compile(r"\A---\n(.*?)\n---\n", re.DOTALL)


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML head of a folder's model card; empty if there is none, or it cannot be read."""
    file = folder / CARD
    match = _FRONT.match(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
    if match is None:
        return {}
    try:
        head = yaml.safe_load(match[1])
    except yaml.YAMLError:
        return {}
    return head if isinstance(head, dict) else {}


def base_names(started: str | None, card: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """Name the model that training began with.

    Args:
        started: The folder, or the name on the hub, that the first stage began with.
        card: Head of the model card of that folder.

    Returns:
        Its name on the hub, and the name of its folder; one of them, or neither.
    """
    named = card.get("base_model")
    named = named[0] if isinstance(named, list) and named else named
    if isinstance(named, str):
        return named, None
    if started is None:
        return None, None
    cached = _CACHED.search(started)
    if cached is not None:
        return f"{cached[1]}/{cached[2]}", None
    name = started.partition("@")[0]
    if _HUB.fullmatch(name) and not Path(started).exists():
        return name, None
    return None, Path(started).name


def license_of(folder: Path) -> str | None:
    """The hub's name of the licence whose text lies in a folder, None if it is not known."""
    for file in sorted(folder.glob("LICENSE*")):
        text = file.read_text(encoding="utf-8", errors="replace")
        for name, beginning in LICENSES.items():
            if beginning.match(text):
                return name
    return None
