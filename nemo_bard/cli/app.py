"""Command line: ``nemo-bard COMMAND``, ``python -m nemo_bard.cli COMMAND`` and ``automodel finetune``.

Wrong input ends as one line ``error: ...`` on stderr and exit code 2; ``NEMO_BARD_DEBUG=1`` shows the traceback.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from functools import partial

from nemo_bard import __version__
from nemo_bard.cli import launcher
from nemo_bard.cli.commands import COMMANDS
from nemo_bard.cli.endings import exit_code_of, say_missing


def build_parser(selected: str | None) -> argparse.ArgumentParser:
    """Build the parser; only the module of the command ``selected`` is imported, the others lend their help line."""
    parser = argparse.ArgumentParser(prog="nemo-bard", description="Block-diffusion VLMs for NeMo AutoModel.")
    parser.add_argument("--version", action="version", version=f"nemo-bard {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (module, text) in COMMANDS.items():
        if name == selected:
            importlib.import_module(module).add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=text)
    return parser


def run_command(argv: list[str]) -> int:
    """Parse ``argv`` and run its command; returns the exit code, lets exceptions through."""
    selected = next((word for word in argv if not word.startswith("-")), None)
    parser = build_parser(selected)
    args, extra = parser.parse_known_args(argv)
    module = importlib.import_module(COMMANDS[args.command][0])
    if getattr(module, "ACCEPTS_OVERRIDES", False):
        args.overrides = extra
    elif extra:
        parser.error(f"{args.command}: unknown argument {extra[0]!r}")
    return module.run(args)


def main(argv: list[str] | None = None) -> int:
    """Run ``nemo-bard``; a YAML file as first argument goes to NeMo AutoModel, as in ``automodel X.yaml``.

    Args:
        argv: Arguments without the program's name; ``sys.argv[1:]`` if None.

    Returns:
        The exit code: 0, 1 for a failed check, 2 for wrong input.
    """
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0].endswith((".yaml", ".yml")):
        return forward([sys.argv[0], *argv]) or 0
    return exit_code_of(partial(run_command, argv))


def automodel() -> int | None:
    """Run the ``automodel`` script: ``finetune`` is ours, every other command line is NeMo AutoModel's, unchanged."""
    return main() if sys.argv[1:2] == ["finetune"] else forward(sys.argv)


def forward(argv: list[str]) -> int | None:
    """Run NeMo AutoModel's own ``main`` with ``sys.argv`` set to ``argv``; it hands recipes of ours back to ``finetune``."""
    try:
        from nemo_automodel.cli.app import main as upstream_main
    except ModuleNotFoundError as error:
        return say_missing(error)
    launcher.install()  # where the start-up hook is missing
    sys.argv = list(argv)
    return upstream_main()


if __name__ == "__main__":
    sys.exit(main())
