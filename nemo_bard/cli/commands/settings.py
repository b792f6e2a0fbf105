"""``nemo-bard settings [recipe|chain|generation|harness]``: every setting with default, allowed values and meaning, as Markdown.

Written from the classes that check them, those of installed packages included; ``docs/settings.md`` is its output.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import fields
from typing import Any

HEAD = "# Settings\n\nWhat `nemo-bard settings` prints. Keys of a recipe's other sections are those of NeMo AutoModel's VLM recipe.\n"


def add_parser(subparsers: argparse._SubParsersAction) -> argparse.ArgumentParser:
    """Add the parser of ``settings``."""
    parser = subparsers.add_parser(
        "settings",
        help="list every setting with default, allowed values and meaning",
        description="List settings as Markdown, those of noises, strategies, stage kinds and launchers of installed"
        " packages included.",
    )
    parser.add_argument(
        "part", nargs="?", choices=list(PARTS), help="recipe, chain, generation or harness (default: all)"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Print."""
    sys.stdout.write(settings_page([args.part] if args.part else list(PARTS)))
    return 0


def settings_page(parts: list[str]) -> str:
    """Markdown of some of ``PARTS``."""
    return HEAD + "".join(f"\n{PARTS[part]()}" for part in parts)


def _titled(title: str, sections: dict[str, str]) -> str:
    return f"## {title}\n" + "".join(f"\n### {name}\n{text}\n" for name, text in sections.items())


def _recipe() -> str:
    from nemo_bard.train.settings import recipe_reference

    return _titled("Recipes", recipe_reference())


def _chain() -> str:
    from nemo_bard.base.settings import reference
    from nemo_bard.launch.launchers import LAUNCHERS
    from nemo_bard.pipeline import schema
    from nemo_bard.pipeline.job import STAGE_KINDS

    def table(cls: type[Any]) -> str:
        return reference(fields(cls))

    stages = {f"A stage of kind `{name}`": table(STAGE_KINDS.get(name).Settings) for name in STAGE_KINDS}
    launchers = {f"`launch={name}`": table(LAUNCHERS.get(name).Settings) for name in LAUNCHERS}
    return _titled(
        "Chains",
        {
            "Top level": table(schema.ChainSettings),
            "`model`": table(schema.ModelSettings),
            "`data`": table(schema.DataSettings),
            "`evaluation`": table(schema.EvaluationSettings),
            **stages,
            **launchers,
        },
    )


def _generation() -> str:
    from nemo_bard.generation.parameters import settings_reference

    return _titled("Decoding", {"`BardGenerationConfig`": settings_reference()})


def _harness() -> str:
    from nemo_bard.base.settings import reference
    from nemo_bard.evaluation.harness.arguments import HarnessSettings

    return _titled("lmms-eval", {"`--model_args`, beside the settings of decoding": reference(fields(HarnessSettings))})


PARTS: dict[str, Callable[[], str]] = {
    "recipe": _recipe,
    "chain": _chain,
    "generation": _generation,
    "harness": _harness,
}
