"""Adds the command ``finetune`` to NeMo AutoModel's command line, whoever owns the ``automodel`` script.

``nemo_bard_automodel.pth`` (in site-packages) calls ``install`` when an interpreter starts with the word ``finetune``
among its arguments; every other start pays for one comparison. ``docs/decisions.md`` says why this is needed. Standard
library only: nothing here may fail because of another package.
"""

from __future__ import annotations

import functools
import sys
from types import ModuleType

from nemo_bard.base.import_hooks import AfterImport, put_first

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


class CliFinder(AfterImport):
    """Wraps ``main`` of ``nemo_automodel.cli.app``."""


def install() -> None:
    """Make the next import of ``nemo_automodel.cli.app`` know the command; calling it again changes nothing."""
    if UPSTREAM_CLI not in sys.modules:
        put_first(CliFinder({UPSTREAM_CLI: add_command}))
