"""Adds the command ``finetune`` to NeMo AutoModel's command line, whoever owns the ``automodel`` script.

Its launcher also hands recipes of ours to that command: ``automodel recipes/pbm.yaml`` is then checked as a whole before
anything starts, ends as one line, and runs on CPUs and from an editable installation, which upstream's launcher does not.

``nemo_bard_automodel.pth`` (in site-packages) calls ``install`` when an interpreter starts with the word ``finetune``
or the name of a YAML file among its arguments; every other start pays for a look at its words. ``docs/decisions.md``
says why this is needed. Standard library only: nothing here may fail because of another package.
"""

from __future__ import annotations

import sys
from functools import wraps
from types import ModuleType

from nemo_bard.base.import_hooks import AfterImport, put_first
from nemo_bard.cli.launcher import UPSTREAM_LAUNCHER, hand_over

UPSTREAM_CLI = "nemo_automodel.cli.app"
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


class CliFinder(AfterImport):
    """Wraps ``main`` of ``nemo_automodel.cli.app``, and its launcher."""


def install() -> None:
    """Make the next import of ``nemo_automodel.cli.app`` know the command; calling it again changes nothing."""
    hooks = {UPSTREAM_CLI: add_command, UPSTREAM_LAUNCHER: hand_over}
    if hooks := {name: hook for name, hook in hooks.items() if name not in sys.modules}:
        put_first(CliFinder(hooks))
