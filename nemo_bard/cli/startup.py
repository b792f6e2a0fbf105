"""Adds the command ``finetune`` to NeMo AutoModel's command line, whoever owns the ``automodel`` script.

Its launcher also hands recipes of ours to that command: ``automodel recipes/pbm.yaml`` is then checked as a whole before
anything starts, ends as one line, and runs on CPUs and from an editable installation, which upstream's launcher does not.

``nemo_bard_automodel.pth`` (in site-packages) calls ``install`` when an interpreter starts with the word ``finetune``
or the name of a YAML file among its arguments; every other start pays for a look at its words. ``docs/decisions.md``
says why this is needed. Standard library only: nothing here may fail because of another package.
"""

from __future__ import annotations

import sys
from functools import partial, wraps
from pathlib import Path
from types import ModuleType
from typing import Any

from nemo_bard.base.import_hooks import AfterImport, put_first

UPSTREAM_CLI = "nemo_automodel.cli.app"
UPSTREAM_LAUNCHER = "nemo_automodel.components.launcher.interactive"
COMMAND = "finetune"


def add_command(app: ModuleType) -> None:
    """Wrap ``app.main`` so that ``finetune`` as the first argument runs ours; everything else runs upstream's."""
    upstream_main = app.main

    @wraps(upstream_main)
    def main() -> int | None:
        if sys.argv[1:2] != [COMMAND]:
            return upstream_main()
        from nemo_bard.cli.app import automodel

        return automodel()

    vars(app)["main"] = main


def hand_over(launcher: ModuleType) -> None:
    """Wrap ``InteractiveLauncher.launch`` so that a recipe of ours runs as ``finetune`` does.

    A recipe of anybody else is upstream's to run, once it is known to name nothing of ours that only means something in
    a recipe of ours. Wrong input ends the process here, because upstream's script drops what ``main`` returns.
    """
    upstream_launch = launcher.InteractiveLauncher.launch

    @wraps(upstream_launch)
    def launch(
        self: Any,
        config: Any,
        config_path: Path,
        recipe_target: str,
        launcher_config: Any = None,
        extra_args: list[str] | None = None,
    ) -> int | None:
        from nemo_bard.cli.app import exit_code_of
        from nemo_bard.cli.commands.finetune import take_over

        code = exit_code_of(partial(take_over, config, config_path, launcher_config, extra_args or []))
        if code is None:
            return upstream_launch(self, config, config_path, recipe_target, launcher_config, extra_args)
        if code:
            sys.exit(code)
        return 0

    launcher.InteractiveLauncher.launch = launch


class CliFinder(AfterImport):
    """Wraps ``main`` of ``nemo_automodel.cli.app``, and its launcher."""


def install() -> None:
    """Make the next import of ``nemo_automodel.cli.app`` know the command; calling it again changes nothing."""
    hooks = {UPSTREAM_CLI: add_command, UPSTREAM_LAUNCHER: hand_over}
    if hooks := {name: hook for name, hook in hooks.items() if name not in sys.modules}:
        put_first(CliFinder(hooks))
