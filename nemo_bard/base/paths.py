"""Finds the shipped ``recipes/`` and ``conf/``: inside the package in a wheel install, beside it in a checkout."""

from __future__ import annotations

import difflib
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def shipped_dir(name: str) -> Path:
    """Return the folder ``name`` (``recipes`` or ``conf``) that came with this installation.

    Raises:
        FileNotFoundError: If the installation lacks it.
    """
    inside, checkout = _PACKAGE / name, _PACKAGE.parent / name
    if inside.is_dir():
        return inside
    if checkout.is_dir() and (_PACKAGE.parent / "setup.py").is_file():
        return checkout
    raise FileNotFoundError(f"this installation of nemo_bard has no {name}/ (looked in {inside} and {checkout})")


def recipes_dir() -> Path:
    """Return the folder with the shipped recipe YAML files."""
    return shipped_dir("recipes")


def conf_dir() -> Path:
    """Return the folder with the shipped Hydra configuration."""
    return shipped_dir("conf")


def shipped_recipes() -> dict[str, Path]:
    """Return the shipped recipes by name: path below ``recipes/`` without ``.yaml``."""
    root = recipes_dir()
    return {path.relative_to(root).with_suffix("").as_posix(): path for path in sorted(root.rglob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """Return the YAML file that ``--config name`` means.

    An existing file wins. Otherwise ``pbm``, ``pbm.yaml`` and ``recipes/pbm.yaml`` all name the shipped recipe ``pbm``.

    Raises:
        FileNotFoundError: If there is neither; the message lists the shipped recipes.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = shipped_recipes()
    key = Path(name.removesuffix(".yaml")).as_posix().removeprefix("recipes/")
    if not path.is_absolute() and key in shipped:
        return shipped[key]
    near = difflib.get_close_matches(key, shipped, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    raise FileNotFoundError(f"--config {name}: no such file or shipped recipe{hint} shipped: {', '.join(shipped)}")
