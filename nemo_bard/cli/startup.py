"""Adds the command ``finetune`` to NeMo AutoModel's command line, whoever owns the ``automodel`` script.

``nemo_bard_automodel.pth`` (in site-packages) calls ``install`` when an interpreter starts with the word ``finetune``
among its arguments; every other start pays for one comparison. ``docs/decisions.md`` says why this is needed. Standard
library only: nothing here may fail because of another package.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

UPSTREAM_CLI = "nemo_automodel.cli.app"
COMMAND = "finetune"


def add_command(app: ModuleType) -> None:
    """Wrap ``app.main`` so that ``finetune`` as the first argument runs ours; everything else runs upstream's."""
    upstream_main = app.main

    @functools.wraps(upstream_main)
    def main() -> int | None:
        if sys.argv[1:2] != [COMMAND]:
            return upstream_main()
        from nemo_bard.cli.app import automodel

        return automodel()

    vars(app)["main"] = main


class _Loader(Loader):
    """Runs upstream's loader, then wraps ``main``."""

    def __init__(self, inner: Loader) -> None:
        self.inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        add_command(module)

    def __getattr__(self, name: str) -> object:  # get_code, get_source, ...: `python -m nemo_automodel.cli.app`
        return getattr(self.inner, name)


class CliFinder(MetaPathFinder):
    """Wraps the loader of ``nemo_automodel.cli.app``; every other import passes through."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return upstream's spec with a wrapped loader, None for every other module."""
        if fullname != UPSTREAM_CLI:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


def install() -> None:
    """Make the next import of ``nemo_automodel.cli.app`` know the command; calling it again changes nothing."""
    if UPSTREAM_CLI in sys.modules or any(isinstance(finder, CliFinder) for finder in sys.meta_path):
        return
    sys.meta_path.insert(0, CliFinder())
