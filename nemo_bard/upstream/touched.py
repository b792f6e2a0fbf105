"""What we touch of other packages beyond their public interfaces, as data that a test can compare with the installed ones.

Each module of this room has a table ``TOUCHED`` of what it touches. ``tests/unit/test_upstream_names.py`` goes through the
tables and names what has moved since it was read.
"""

from __future__ import annotations

import importlib
import inspect
from dataclasses import dataclass
from types import ModuleType
from typing import Any


@dataclass(frozen=True)
class Touched:
    """A name of another package that we use, override or replace."""

    name: str
    """Dotted; the last part may be an attribute that instances of a class get in their methods."""
    reason: str
    until: str
    """When we can do without."""
    parameters: str | None = None
    """Of a function, as ``parameters_of`` writes them; None where nobody depends on them."""
    source: str = ""
    """What its source must hold for our use of it to mean something."""
    version: str = ""
    """Distribution and version that it was read in."""


def parameters_of(function: Any) -> str:
    """The parameters of a function in one line, without types and defaults: ``self, path, *, mode, **kwargs``."""
    written: list[str] = []
    keyword_only = False
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            written.append("*")
        keyword_only |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        written.append(stars + parameter.name)
    return ", ".join(written)


def what_moved(touched: Touched) -> str | None:
    """Say in one line what about a name is not as it was read; None if it is as it was."""
    where = f"{touched.name} (read in {touched.version})"
    try:
        module, path = _import_head(touched.name)
        thing, owner = _follow(module, path)
    except (ImportError, AttributeError) as error:
        return f"{where} is gone: {error}"
    if touched.parameters is not None and (found := parameters_of(thing)) != touched.parameters:
        return f"{where} now takes ({found}) instead of ({touched.parameters})"
    holder = owner if thing is None else thing
    if touched.source and touched.source not in inspect.getsource(getattr(holder, "fget", holder)):
        return f"{where} no longer holds {touched.source!r} in its source"
    return None


def _import_head(name: str) -> tuple[ModuleType, list[str]]:
    """Import the longest beginning of a dotted name that is a module; returns it and what follows."""
    parts = name.split(".")
    module = importlib.import_module(parts[0])
    for index, part in enumerate(parts[1:], 1):
        dotted = ".".join(parts[: index + 1])
        try:
            module = importlib.import_module(dotted)
        except ModuleNotFoundError as error:
            if error.name != dotted:
                raise
            if not hasattr(module, part):
                raise AttributeError(f"{module.__name__} has no {part}") from None
            return module, parts[index:]
    return module, []


def _follow(module: ModuleType, path: list[str]) -> tuple[Any, Any]:
    """What a path of attributes leads to, and its owner; None for an attribute that only instances have.

    Raises:
        AttributeError: If it leads nowhere.
    """
    thing: Any = module
    owner: Any = module
    for position, part in enumerate(path):
        owner = thing
        try:
            thing = getattr(owner, part)
        except AttributeError:
            kind = owner if inspect.isclass(owner) else type(owner)
            if position < len(path) - 1 or not _assigns(kind, part):
                raise AttributeError(f"{getattr(owner, '__name__', kind.__name__)} has no {part}") from None
            return None, kind
    return thing, owner


def _assigns(kind: type, name: str) -> bool:
    """Whether a method of a class, or a field of it, gives its instances the attribute."""
    classes = [base for base in kind.__mro__ if base.__module__ != "builtins"]
    if any(name in getattr(base, "__annotations__", {}) for base in classes):
        return True
    return any(f"self.{name} =" in source or f"self.{name}:" in source for source in map(inspect.getsource, classes))
