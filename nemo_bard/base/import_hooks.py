"""Something to be done right after another package's module has been executed, without importing it now."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

Hook = Callable[[ModuleType], None]


class _Loader(Loader):
    """Runs the real loader, then the hook."""

    def __init__(self, inner: Loader, hook: Hook) -> None:
        self.inner, self.hook = inner, hook

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.hook(module)

    def __getattr__(self, name: str) -> object:  # get_code, get_source, ...: `python -m MODULE`
        return getattr(self.inner, name)


class AfterImport(MetaPathFinder):
    """Wraps the loaders of some modules; every other import passes through.

    Args:
        hooks: Module -> what to do with it once it has been executed.
    """

    def __init__(self, hooks: Mapping[str, Hook]) -> None:
        self.hooks = hooks

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the module's spec with a wrapped loader, None for a module without a hook."""
        hook = self.hooks.get(fullname)
        if hook is None:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, hook)
        return spec


def put_first(finder: MetaPathFinder) -> None:
    """Let ``finder`` be asked before all others, unless one of its class is there already."""
    if not any(type(other) is type(finder) for other in sys.meta_path):
        sys.meta_path.insert(0, finder)
