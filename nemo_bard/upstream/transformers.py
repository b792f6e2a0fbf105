"""Tell transformers about ``bard_vl`` without importing transformers' models (they cost seconds).

transformers keeps lazy tables: model type -> class name -> module that holds the class. ``import nemo_bard`` adds our
rows to these tables, with the lazy package ``nemo_bard`` as the module, as soon as the tables exist: at once if they
are loaded already, otherwise right after their modules have been executed. ``AutoConfig`` and
``AutoModelForImageTextToText`` then resolve our classes on first use. ``nemo_bard.model.modeling`` registers through
transformers' public functions as well, which take precedence once it is imported.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType

MODEL_TYPE = "bard_vl"
CONFIG_CLASS = "BardVLConfig"
MODEL_CLASS = "BardVLForConditionalGeneration"
CONFIG_TABLES = "transformers.models.auto.configuration_auto"
MODEL_TABLES = "transformers.models.auto.modeling_auto"


def _add_config(tables: ModuleType) -> None:
    mapping = tables.CONFIG_MAPPING
    mapping._mapping.setdefault(MODEL_TYPE, CONFIG_CLASS)
    mapping._modules.setdefault(MODEL_TYPE, sys.modules["nemo_bard"])


def _add_model(tables: ModuleType) -> None:
    mapping = tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    mapping._model_mapping.setdefault(MODEL_TYPE, MODEL_CLASS)
    mapping._reverse_config_mapping.setdefault(CONFIG_CLASS, MODEL_TYPE)
    mapping._modules.setdefault(MODEL_TYPE, sys.modules["nemo_bard"])


_HOOKS: dict[str, Callable[[ModuleType], None]] = {CONFIG_TABLES: _add_config, MODEL_TABLES: _add_model}


class _Loader(importlib.abc.Loader):
    """Runs the real loader, then the hook."""

    def __init__(self, inner: importlib.abc.Loader, hook: Callable[[ModuleType], None]) -> None:
        self.inner, self.hook = inner, hook

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.inner.exec_module(module)
        self.hook(module)


class _Finder(importlib.abc.MetaPathFinder):
    """Wraps the loader of the two table modules; every other import passes through."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        hook = _HOOKS.get(fullname)
        if hook is None:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, hook)
        return spec


def install() -> None:
    """Register now where transformers' tables are loaded, else when they will be; calling it again changes nothing."""
    missing = False
    for name, hook in _HOOKS.items():
        if (tables := sys.modules.get(name)) is not None and hasattr(
            tables, "_LazyAutoMapping" if "modeling" in name else "CONFIG_MAPPING"
        ):
            hook(tables)
        else:
            missing = True
    if missing and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
