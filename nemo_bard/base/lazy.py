"""Public names of a package that are loaded when they are first used."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from nemo_bard.base.moved import find_export


def lazy(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: ``__name__`` of the package.
        names: Public name -> module that holds it, relative to the package unless it begins with ``nemo_bard.``.

    Returns:
        The three, to be assigned at module level.
    """

    def load(name: str) -> Any:
        if name in names:
            module = names[name] if names[name].startswith("nemo_bard.") else f"{package}.{names[name]}"
            value = getattr(importlib.import_module(module), name)
        else:
            value = find_export(package, name)
        setattr(sys.modules[package], name, value)
        return value

    def listed() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return load, listed, sorted(names)
