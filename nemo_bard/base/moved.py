"""Dotted names of earlier versions that recipes, manifests and scripts may hold: they go on meaning what they meant.

``MODULES`` is the whole table. A finder at the end of ``sys.meta_path``, which Python asks only for what exists nowhere,
imports the new module under the old name too, so that both names are one module and its classes are the same objects.
Where an old module became a package of the same name, that package exports its public names itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType

PACKAGE = "nemo_bard"
MODULES = {
    "_registration": "upstream.transformers",
    "_startup": "cli.startup",
    "adapters": "checkpoints.merge",
    "attention": "model.attention",
    "batch": "evaluation.batch",
    "calibrate": "evaluation.calibrate",
    "checkpoint": "checkpoints.folder",
    "chunked": "method.chunked",
    "collate": "data.collate",
    "commands": "cli.commands",
    "configuration": "model",
    "console": "upstream.console",
    "decode": "generation.decode",
    "demo": "cli.demo",
    "digits": "data.digits",
    "doctor": "cli.installation",
    "evaluate": "evaluation.evaluate",
    "export": "checkpoints.convert",
    "layout": "method.layout",
    "lean": "model.lean",
    "lengths": "data.lengths",
    "losses": "method.losses",
    "noise": "method.noise",
    "packing": "data.packing",
    "paths": "base.paths",
    "pipeline.plan": "pipeline.job",
    "plan": "cost.estimate",
    "prompt": "generation.prompt",
    "recipe_file": "train.recipe_file",
    "responder": "evaluation.responder",
    "sampling": "generation.sampling",
    "shapes": "cost.shapes",
    "slurm": "launch.slurm",
    "tiny": "checkpoints.tiny",
    "train.corruption": "method.corruption",
    "train.cpu_compat": "upstream.cpu",
    "train.joint": "method.objectives",
    "train.recipe_config": "train.config",
    "video": "data.video",
    "visualize": "report",
    "visualize_gif": "report.gif",
    "visualize_page": "report.page",
    "visualize_picture": "report.picture",
}
"""Old module -> new one, both below ``nemo_bard``; 0.1.0 had the old ones."""
QUIET = ("_registration", "_startup")
"""Named by files of an earlier installation, not by users."""


def new_name(dotted: str) -> str:
    """Return what ``dotted``, a module or something in one, is called now; what has not moved stays as it is."""
    head, _, rest = dotted.partition(".")
    if head != PACKAGE:
        return dotted
    for old in (".".join(rest.split(".")[:2]), rest.split(".")[0]):
        if old in MODULES:
            return f"{PACKAGE}.{MODULES[old]}{rest.removeprefix(old)}"
    return dotted


class AliasLoader(Loader):
    """Gives the module ``new`` under another name as well."""

    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> None:
        """Leave it to Python to make the module that ``exec_module`` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        """Put the new module in the place of the empty one."""
        sys.modules[module.__name__] = importlib.import_module(self.new)

    def get_code(self, name: str) -> CodeType | None:
        """For ``python -m OLD``."""
        spec = importlib.util.find_spec(self.new)
        if spec is None or not isinstance(spec.loader, InspectLoader):
            raise ImportError(f"{self.new} has no code", name=name)
        return spec.loader.get_code(self.new)


class _Finder(MetaPathFinder):
    """Finds the old modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        del path, target
        old = fullname.removeprefix(f"{PACKAGE}.")
        if old == fullname or old not in MODULES:
            return None
        new = f"{PACKAGE}.{MODULES[old]}"
        if old not in QUIET and os.environ.get("RANK", "0") == "0":
            warnings.warn(f"{fullname} is now {new}; the old name goes on working", FutureWarning, stacklevel=2)
        return ModuleSpec(fullname, AliasLoader(new))


def install() -> None:
    """Make the old names importable; calling it again changes nothing."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.append(_Finder())
