"""Things that have names and can be added from outside: noises, strategies, readers, stage kinds, engines.

A ``Registry`` finds a thing by its name among ours, among those registered at run time, and among the entry points that
installed packages declare for its group; a dotted name (``my_package.module.Thing``) is imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

from nemo_bard.base.copies import is_copy
from nemo_bard.base.errors import not_one_of

T = TypeVar("T")


def import_dotted(name: str) -> Any:
    """Import ``package.module.Thing``.

    Raises:
        ValueError: If it cannot be imported; says why.
    """
    module, _, attribute = name.replace(":", ".").rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{name} cannot be imported ({' '.join(str(error).split())})") from error


class Registry(Generic[T]):
    """Named things of one kind.

    Args:
        key: What selects one, for error messages: ``noise.name``.
        group: Entry point group in which installed packages declare theirs, such as ``nemo_bard.noises``.
        builtin: Ours: name -> thing, or its dotted name, which is imported when it is first asked for.
        check: Called with a thing that comes from outside and its name; raises ValueError if it is not of this kind.
    """

    def __init__(
        self,
        key: str,
        group: str,
        builtin: Mapping[str, T | str],
        *,
        check: Callable[[str, Any], None] | None = None,
    ) -> None:
        self.key, self.group, self.check = key, group, check
        self._things: dict[str, T | str] = dict(builtin)
        self._scanned, self._lock = False, threading.RLock()

    def register(self, name: str, thing: T) -> T:
        """Add ``thing`` in this process.

        Raises:
            ValueError: If the name is taken by another thing, or the thing is not of this kind.
        """
        self._scan()
        if self.check is not None:
            self.check(name, thing)
        if self._things.get(name, thing) is not thing:
            raise ValueError(f"{self.key}: the name {name!r} is taken")
        self._things[name] = thing
        return thing

    def unregister(self, name: str) -> None:
        """Take a name back; for tests."""
        self._things.pop(name)

    def names(self) -> list[str]:
        """All names, ours first."""
        self._scan()
        return list(self._things)

    def __contains__(self, name: object) -> bool:
        self._scan()
        return name in self._things

    def __iter__(self) -> Iterator[str]:
        return iter(self.names())

    def get(self, name: Any) -> T:
        """Return what a name, or a dotted name, stands for.

        Raises:
            ValueError: If there is no such thing (the nearest known name is named), or it cannot be imported.
        """
        self._scan()
        thing = self._things.get(name) if isinstance(name, str) else None
        if thing is None:
            if not isinstance(name, str) or "." not in name:
                raise not_one_of(self.key, name, self._things)
            try:
                thing = import_dotted(name)
            except ValueError as error:
                raise ValueError(f"{self.key}: {error}") from error
            if self.check is not None:
                self.check(name, thing)
            return thing
        if isinstance(thing, str):
            loaded: T = import_dotted(thing)
            self._things[name] = loaded
            return loaded
        return thing

    def _scan(self) -> None:
        """Read the entry points, once; a wrong one is told at every use, not only at the first.

        They are for the installed package: a copy of this module that a checkpoint folder brings has classes of its own.
        """
        with self._lock:
            if self._scanned or is_copy(__name__):
                return
            before, self._scanned = dict(self._things), True  # checks of things look at the others
            try:
                for point in importlib.metadata.entry_points(group=self.group):
                    self._add(point)
            except ValueError:
                self._things, self._scanned = before, False
                raise

    def _add(self, point: importlib.metadata.EntryPoint) -> None:
        dotted = point.value.replace(":", ".")
        if self._things.get(point.name, dotted) != dotted:
            raise ValueError(
                f"{self.key}: the entry point {point.name!r} of {point.value} has a name that is taken; rename it"
            )
        try:
            thing = import_dotted(dotted)
        except ValueError as error:
            raise ValueError(f"{self.key}: the entry point {point.name!r} of {self.group}: {error}") from error
        if self.check is not None:
            self.check(point.name, thing)
        self._things[point.name] = thing
