"""``nemo-bard doctor``."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``doctor``."""
    text = "Check the installation; for everything wrong, say how to repair it. Exit code 1 if something is broken."
    parser = subparsers.add_parser("doctor", help="check the installation", description=text)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def run(args: argparse.Namespace) -> int:
    """Print every check as it is done; 1 if one found something broken."""
    from nemo_bard.cli.installation import BROKEN, run_checks

    warnings.simplefilter("ignore")  # imports warn about what is optional; the checks say what matters
    logging.disable(logging.WARNING)
    checks = []
    for check in run_checks():
        checks.append(check)
        if not args.json:
            sys.stdout.write(f"{check}\n")
            sys.stdout.flush()
    broken = [check.name for check in checks if check.state == BROKEN]
    if args.json:
        sys.stdout.write(
            json.dumps({"ok": not broken, "checks": [check._asdict() for check in checks]}, indent=2) + "\n"
        )
    else:
        sys.stdout.write(f"broken: {', '.join(broken)}\n" if broken else "nothing is broken\n")
    return 1 if broken else 0
