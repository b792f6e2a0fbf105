"""``bard_vl`` in transformers' tables of models.

``install`` tells transformers about ``bard_vl`` without importing transformers' models (they cost seconds). transformers
keeps lazy tables: model type -> class name -> module that holds the class. ``import nemo_bard`` adds our rows to these
tables, with the lazy package ``nemo_bard`` as the module, as soon as the tables exist: at once if they are loaded already,
otherwise right after their modules have been executed. ``AutoConfig`` and ``AutoModelForImageTextToText`` then resolve our
classes on first use. ``nemo_bard.model.modeling`` registers through transformers' public functions as well, which take
precedence once it is imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

from nemo_bard.base.import_hooks import AfterImport, put_first
from nemo_bard.base.names import CONFIG_CLASS, MODEL_CLASS, MODEL_TYPE
from nemo_bard.upstream.card import VISION_PROCESS, CardFinder, add_video_reader
from nemo_bard.upstream.touched import Touched

CONFIG_TABLES = "transformers.models.auto.configuration_auto"
MODEL_TABLES = "transformers.models.auto.modeling_auto"

_row = partial(
    Touched,
    version="transformers 5.18.0",
    reason="a row for bard_vl, so that AutoConfig and AutoModel find our classes without importing a model first",
    until="transformers finds classes of other packages by an entry point",
)
TOUCHED = (
    _row(f"{CONFIG_TABLES}.CONFIG_MAPPING._mapping"),
    _row(f"{CONFIG_TABLES}.CONFIG_MAPPING._modules"),
    _row(f"{MODEL_TABLES}.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._model_mapping"),
    _row(f"{MODEL_TABLES}.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._reverse_config_mapping"),
    _row(f"{MODEL_TABLES}.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING._modules"),
    _row("transformers.models.auto.auto_factory._LazyAutoMapping"),
)
"""What this module touches of transformers; ``docs/decisions.md`` says why there is a room for it."""


def _add_config(tables: ModuleType) -> None:
    mapping = tables.CONFIG_MAPPING
    mapping._mapping.setdefault(MODEL_TYPE, CONFIG_CLASS)
    mapping._modules.setdefault(MODEL_TYPE, sys.modules["nemo_bard"])


def _add_model(tables: ModuleType) -> None:
    mapping = tables.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    mapping._model_mapping.setdefault(MODEL_TYPE, MODEL_CLASS)
    mapping._reverse_config_mapping.setdefault(CONFIG_CLASS, MODEL_TYPE)
    mapping._modules.setdefault(MODEL_TYPE, sys.modules["nemo_bard"])


_HOOKS: dict[str, Callable[[ModuleType], None]] = {
    CONFIG_TABLES: _add_config,
    MODEL_TABLES: _add_model,
    VISION_PROCESS: add_video_reader,
}
_WHOLE = {CONFIG_TABLES: "CONFIG_MAPPING", MODEL_TABLES: "_LazyAutoMapping", VISION_PROCESS: "fetch_video"}
"""What a module has once it has been executed."""


class TablesFinder(AfterImport):
    """Adds our rows right after transformers has made its tables, and what ``card`` adds."""


def install() -> None:
    """Register now where transformers' tables are loaded, else when they will be; calling it again changes nothing."""
    missing = False
    for name, hook in _HOOKS.items():
        if (tables := sys.modules.get(name)) is not None and hasattr(tables, _WHOLE[name]):
            hook(tables)
        else:
            missing = True
    if missing:
        put_first(TablesFinder(_HOOKS))
    put_first(CardFinder())
