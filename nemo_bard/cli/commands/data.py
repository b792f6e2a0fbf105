"""``nemo-bard data COMMAND``: data sets before they are trained on."""

from __future__ import annotations

import argparse
import importlib

SUBCOMMANDS: dict[str, str] = {
    "prepare": "nemo_bard.cli.commands.data_prepare",
    "show": "nemo_bard.cli.commands.data_show",
    "check": "nemo_bard.cli.commands.data_check",
}
"""Name -> module with ``add_parser(subparsers)`` and ``run(args)``."""


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``data`` and those of its commands."""
    parser = subparsers.add_parser("data", help="prepare, show and check data sets", description=__doc__)
    commands = parser.add_subparsers(dest="data_command", metavar="COMMAND", required=True)
    for module in SUBCOMMANDS.values():
        importlib.import_module(module).add_parser(commands)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    return importlib.import_module(SUBCOMMANDS[args.data_command]).run(args)
