"""Recipe files: reading one with overrides, the class that it names, and what NeMo AutoModel makes of it."""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.upstream import automodel

if TYPE_CHECKING:
    from nemo_automodel.components.config.loader import ConfigNode

_BARE_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=")


def parse_overrides(words: list[str]) -> list[tuple[str, str]]:
    """Read ``a.b=c``, ``--a.b=c``, ``--a.b c`` and ``--flag`` (True) into pairs of dotted key and text.

    Raises:
        ValueError: If a word is none of these, or if ``--key`` is followed by ``key=value``, which could be either its
            value or the next override.
    """
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        key, equals, value = word.removeprefix("--").partition("=")
        if not re.fullmatch(r"[\w.]+", key) or (not equals and not word.startswith("--")):
            raise ValueError(f"unexpected argument {word!r}; overrides are written a.b=c, --a.b=c or --a.b c")
        if not equals:
            value = "True"
            if rest and not rest[0].startswith("--"):
                value = rest.pop(0)
                if _BARE_OVERRIDE.match(value):
                    raise ValueError(f"ambiguous: '{word} {value}'; write {word}=VALUE (a flag: {word}=true)")
        pairs.append((key, value))
    return pairs


def load_raw_config(config_path: Path, overrides: list[tuple[str, str]]) -> dict[str, Any]:
    """Return the final configuration as plain dictionaries; ``_target_`` and ``*_fn`` stay dotted names.

    Args:
        config_path: The YAML file.
        overrides: Pairs of dotted key and text, applied in order.

    Raises:
        ValueError: If the file is not a YAML mapping, an override leads through a value that is no mapping, or an
            environment variable is missing.
    """
    raw = read_yaml(config_path)
    for dotted, text in overrides:
        *parents, leaf = dotted.split(".")
        node = raw
        for depth, name in enumerate(parents, 1):
            node[name] = {} if node.get(name) is None else node[name]
            if not isinstance(node[name], dict):
                prefix = ".".join(parents[:depth])
                raise ValueError(
                    f"override {dotted}={text}: {prefix} is {node[name]!r} in {config_path}, not a section"
                )
            node = node[name]
        node[leaf] = text
    return translate(raw)


def read_yaml(config_path: Path) -> dict[str, Any]:
    """Return a YAML mapping as it stands in the file: no environment variable is filled in, no name imported.

    Raises:
        ValueError: If the file is not a YAML mapping.
    """
    import yaml

    try:
        raw = yaml.safe_load(config_path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{config_path}: not a YAML file: {error}") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{config_path}: must hold a YAML mapping, got {type(raw).__name__}")
    return raw


def translate(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Fill in environment variables and read text as Python literals, as NeMo AutoModel does with a recipe.

    Raises:
        ValueError: If an environment variable is missing.
    """
    return _translate("", dict(raw))


def _translate(key: str, value: Any) -> Any:
    """Read text the way NeMo AutoModel's ``ConfigNode`` does: environment variables, then Python literals."""
    from nemo_automodel.components.config.loader import resolve_yaml_env_vars, translate_value

    if isinstance(value, dict):
        return {name: _translate(name, item) for name, item in value.items()}
    if isinstance(value, list):
        return [_translate("", item) for item in value]
    if not isinstance(value, str) or key == "_target_" or key.endswith("_fn"):
        return value
    try:
        return translate_value(resolve_yaml_env_vars(value))
    except KeyError as error:
        raise ValueError(f"{key}: {error.args[0]}") from error


def load_config(config_path: Path, overrides: list[tuple[str, str]]) -> ConfigNode:
    """Return what NeMo AutoModel hands to a recipe; ValueError if a name in it cannot be imported."""
    import nemo_bard.model.attention  # noqa: F401  (NeMo AutoModel's own recipes may ask for attn_implementation: bard)

    try:
        return automodel.load_config(str(config_path), [f"--{key}={text}" for key, text in overrides])
    except ImportError as error:
        raise ValueError(f"{config_path}: {error}") from error


def load_recipe_class(config_path: Path, raw: dict[str, Any]) -> type:
    """Import the class that ``recipe:`` names: a dotted path, or the bare name of one of NeMo AutoModel's recipes.

    Raises:
        ValueError: If the key is missing or the class cannot be imported.
    """
    section = raw.get("recipe")
    name = section.get("_target_") if isinstance(section, dict) else section
    if not isinstance(name, str) or not name.strip():
        raise ValueError(f"{config_path}: recipe: must name a recipe class, for example nemo_bard.train.pbm.PBMRecipe")
    if "." not in name:
        from nemo_automodel.cli.utils import resolve_recipe_name

        name = resolve_recipe_name(name)
    module, _, attribute = name.strip().rpartition(".")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{config_path}: recipe: cannot import {name}: {error}") from error


@contextlib.contextmanager
def report_unexpected_only(user_errors: tuple[type[Exception], ...]) -> Iterator[None]:
    """Hold back what ``ConfigNode.instantiate`` (0.7.0) prints about a failed target unless the error is ours to show.

    It prints signature, arguments and traceback for every exception before raising it again; wrong input has to end as
    one line instead, so the text is written only for errors that are not the user's.
    """
    with automodel.hold_back_instantiation_reports() as held:
        try:
            yield
        except Exception as error:
            if not isinstance(error, user_errors):
                sys.stderr.write("\n".join(held) + "\n")
            raise
