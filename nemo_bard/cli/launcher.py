"""Hands recipes of ours from NeMo AutoModel's launcher to the command ``finetune``. Standard library only until it does."""

from __future__ import annotations

import contextlib
import importlib
import sys
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

UPSTREAM_LAUNCHER = "nemo_automodel.components.launcher.interactive"
_MARK = "_nemo_bard_hands_over"


def hand_over(launcher: ModuleType) -> None:
    """Wrap ``InteractiveLauncher.launch`` so that a recipe of ours runs as ``finetune`` does; twice changes nothing.

    A recipe of anybody else is upstream's to run, once it is known to name nothing of ours that only means something in
    a recipe of ours. Wrong input ends the process here, because upstream's module drops what ``main`` returns.
    """
    upstream_launch = launcher.InteractiveLauncher.launch
    if hasattr(upstream_launch, _MARK):
        return

    @wraps(upstream_launch)
    def launch(
        self: Any,
        config: Any,
        config_path: Path,
        recipe_target: str,
        launcher_config: Any = None,
        extra_args: list[str] | None = None,
    ) -> int | None:
        from nemo_bard.cli.commands.finetune import take_over
        from nemo_bard.cli.endings import exit_code_of

        code = exit_code_of(partial(take_over, config, config_path, launcher_config, extra_args or []))
        if code is None:
            return upstream_launch(self, config, config_path, recipe_target, launcher_config, extra_args)
        if code:
            sys.exit(code)
        return 0

    setattr(launch, _MARK, True)
    launcher.InteractiveLauncher.launch = launch


def install() -> None:
    """Wrap the launcher now; an AutoModel that has none is left alone."""
    with contextlib.suppress(ModuleNotFoundError):
        hand_over(importlib.import_module(UPSTREAM_LAUNCHER))
