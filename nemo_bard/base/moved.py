"""Dotted names of earlier versions that recipes, manifests and scripts may hold: they go on meaning what they meant.

``MODULES`` and ``EXPORTS`` are the whole table. A finder in ``sys.meta_path`` imports the new module under the old name too,
so that both names are one module and its classes are the same objects. Where an old module became a package of the same
name, ``nemo_bard.base.lazy`` asks ``find_export`` for what the module held and the package does not export itself.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import pkgutil
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import InspectLoader, Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

from nemo_bard.base.import_hooks import put_first

PACKAGE = "nemo_bard"
MODULES = {
    "_registration": "upstream.registration",
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
    "train.packed_loader": "upstream.recipe",
    "train.recipe_config": "train.config",
    "video": "data.video",
    "visualize": "report",
    "visualize_gif": "report.gif",
    "visualize_page": "report.page",
    "visualize_picture": "report.picture",
}
"""Old module -> new one, both below ``nemo_bard``; 0.1.0 had the old ones."""
EXPORTS = {
    "cli": ("FULL_DISK", "build_parser", "forward", "run_command"),
    "data": ("RESERVED_TOKENS", "ROLES"),
    "generation": ("NO_OPS", "make_output", "resolve_settings", "split_arguments", "step_stats"),
    "launch": (
        "EXIT_PREEMPTED", "JOB_FILES", "LAUNCHERS", "Launcher", "MODES", "PREEMPTION_SIGNALS",
        "count_processes", "note_complete", "note_progress", "run_torchrun", "supervise", "under_torchrun",
    ),
    "model": (
        "CLASS_MARKER", "HUB_ARGUMENTS", "QWEN3_VL_ASSISTANT_HEADER_IDS", "QWEN3_VL_EOS_TOKEN_ID",
        "QWEN3_VL_MASK_TOKEN_ID", "QWEN3_VL_VOCAB_SIZE", "as_id_list", "check_mask_token_id",
    ),
    "report": (
        "STYLE", "StageRecord", "draw_curves", "draw_losses", "draw_scores", "duration", "html_table", "markdown_table",
        "read_lines", "read_run", "score_rows", "scores_of", "smooth", "tail_loss", "training_rows", "where_it_ran",
        "write_report",
    ),
}  # fmt: skip
"""Package that was a module -> what that module held, which one of the package's modules, or of ``BELOW``, has now."""
BELOW = {"launch": ("base.files",), "model": ("generation.settings",)}
"""Package -> modules outside it that took something over."""
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


def warn(old: str, new: str) -> None:
    """Say once per process and place, and on the first rank alone, what a name is called now."""
    if old.removeprefix(f"{PACKAGE}.") not in QUIET and os.environ.get("RANK", "0") == "0":
        warnings.warn(f"{old} is now {new}; the old name goes on working", FutureWarning, stacklevel=4)


def find_export(package: str, name: str) -> Any:
    """Return what an old module held, from where it is now.

    Raises:
        AttributeError: If the module held no such thing.
    """
    short = package.removeprefix(f"{PACKAGE}.")
    if name in EXPORTS.get(short, ()):
        inside = (module.name for module in pkgutil.iter_modules(sys.modules[package].__path__))
        candidates = [f"{package}.{module}" for module in sorted(inside) if module != "__main__"]
        for candidate in [*candidates, *(f"{PACKAGE}.{module}" for module in BELOW.get(short, ()))]:
            values = vars(importlib.import_module(candidate))
            if name in values:
                warn(f"{package}.{name}", f"{candidate}.{name}")
                return values[name]
    raise AttributeError(f"module {package!r} has no attribute {name!r}")


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
        if not fullname.startswith(f"{PACKAGE}.") or (new := new_name(fullname)) == fullname:
            return None
        if fullname.removeprefix(f"{PACKAGE}.") in MODULES:
            warn(fullname, new)
        return ModuleSpec(fullname, AliasLoader(new))


def install() -> None:
    """Make the old names importable; calling it again changes nothing."""
    put_first(_Finder())
