"""The code that a checkpoint folder brings along, so that transformers and torch alone load it and decode with it.

It is made of this package's own modules when a folder is written: ``nemo_bard.model.bard`` and whatever that imports. transformers
finds code of a folder by the text of its relative imports and wants it at one level, so every module becomes one file, and
its imports name these files. Nothing else in a module is changed but names of modules in strings, and what only type
checkers read is left out.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nemo_bard.base.folders import CONFIG, check_model_type, read_object
from nemo_bard.base.names import CONFIG_CLASS, MODEL_CLASS, MODEL_TYPE

PACKAGE = "nemo_bard"
ROOT = "nemo_bard.model.bard"
ENTRIES = {ROOT: "modeling_bard_vl", "nemo_bard.model.configuration": "configuration_bard_vl"}
"""Modules that transformers is told of -> their names in the folder."""
PREFIX = "bard_vl_"
"""Of the other files; ``torch.py`` would hide torch from a Python that starts in the folder."""
AUTO_MAP = {
    "AutoConfig": f"{ENTRIES['nemo_bard.model.configuration']}.{CONFIG_CLASS}",
    "AutoModelForImageTextToText": f"{ENTRIES[ROOT]}.{MODEL_CLASS}",
}
_WAY = f"what a checkpoint folder brings along must be imported with `from {PACKAGE}.room.module import name`"
LICENSE = "# SPDX-License-Identifier: Apache-2.0"


class Edit(NamedTuple):
    """Text that takes the place of other text, which begins and ends at these characters of the source."""

    start: int
    end: int
    text: str


class Source(NamedTuple):
    """A module of the package, read."""

    name: str
    text: str
    tree: ast.Module
    unused: frozenset[ast.AST]
    """What stands under ``if TYPE_CHECKING:``."""


def write_code(folder: Path) -> list[str]:
    """Write the code into a checkpoint folder, and name its classes in the folder's ``config.json``.

    Args:
        folder: Holds a ``config.json`` of a BARD model.

    Returns:
        Names of the files written, sorted.

    Raises:
        ValueError: If there is no readable ``config.json``, or it is that of another model.
    """
    config = read_object(folder / CONFIG)
    check_model_type(config, folder / CONFIG, (MODEL_TYPE,))
    config["auto_map"] = AUTO_MAP
    names = []
    for name, text in code().items():
        (folder / name).write_text(text, encoding="utf-8")
        names.append(name)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return sorted(names)


def code() -> dict[str, str]:
    """Return the files, name -> text.

    Raises:
        ValueError: If a module is imported in a way that cannot be rewritten.
    """
    sources = closure()
    return {f"{file_name(name)}.py": rewrite(source, frozenset(sources)) for name, source in sources.items()}


def closure(root: str = ROOT) -> dict[str, Source]:
    """Return all modules of the package that importing ``root`` needs, imports within functions included."""
    found: dict[str, Source] = {}
    missing = [root]
    while missing:
        name = missing.pop()
        if name not in found:
            found[name] = read(name)
            missing += [imported for _, imported in own_imports(found[name])]
    return dict(sorted(found.items()))


def outside(sources: dict[str, Source]) -> set[str]:
    """Return the top-level names of all other packages that some modules import, the standard library included."""
    found: set[str] = set()
    for source in sources.values():
        for node in used(source):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                found.add(str(node.module).partition(".")[0])
    return found - {PACKAGE}


def file_name(module: str) -> str:
    """Return what a module is called in the folder: ``nemo_bard.base.errors`` is ``bard_vl_base_errors``."""
    return ENTRIES.get(module) or PREFIX + module.removeprefix(f"{PACKAGE}.").replace(".", "_")


def read(name: str) -> Source:
    """Read a module of the package without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None or spec.submodule_search_locations is not None:
        raise ValueError(f"{name} is no module with a source that a checkpoint folder can bring along")
    return parse(name, Path(spec.origin).read_text(encoding="utf-8"))


def parse(name: str, text: str) -> Source:
    """Read the text of a module with this dotted name."""
    tree = ast.parse(text)
    return Source(name, text, tree, frozenset(_for_type_checkers(tree)))


def used(source: Source) -> Iterator[ast.AST]:
    """Every node that runs."""
    return (node for node in ast.walk(source.tree) if node not in source.unused)


def own_imports(source: Source) -> list[tuple[ast.ImportFrom, str]]:
    """Return the imports of modules of the package.

    Raises:
        ValueError: For one that is not written ``from nemo_bard.room.module import name``.
    """
    found = []
    for node in used(source):
        if isinstance(node, ast.ImportFrom) and str(node.module).partition(".")[0] == PACKAGE:
            module = str(node.module)
            if module.count(".") < 2:
                raise ValueError(f"{source.name}:{node.lineno}: {_WAY}, not from the package {module}")
            found.append((node, module))
        elif (isinstance(node, ast.Import) and any(a.name.partition(".")[0] == PACKAGE for a in node.names)) or (
            isinstance(node, ast.ImportFrom) and node.level
        ):
            raise ValueError(f"{source.name}:{node.lineno}: {_WAY}")
    return found


def rewrite(source: Source, known: frozenset[str]) -> str:
    """Return the text of a module as it stands in the folder.

    Args:
        source: The module.
        known: All modules that the folder has.
    """
    lines = source.text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def place(line: int, column: int) -> int:
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.stmt | ast.expr) -> tuple[int, int]:
        assert node.end_lineno is not None
        assert node.end_col_offset is not None
        return place(node.lineno, node.col_offset), place(node.end_lineno, node.end_col_offset)

    edits = []
    for node, module in own_imports(source):
        start, _ = span(node)
        old = f"from {module} import"
        edits.append(Edit(start, start + len(old), f"from .{file_name(module)} import"))
    for node in source.tree.body:
        if _asks_type_checker(node):
            edits.append(Edit(place(node.lineno, 0), starts[node.end_lineno or node.lineno], ""))
    for node in used(source):
        if isinstance(node, ast.Constant) and (text := _dotted(node.value, known)) is not None:
            edits.append(Edit(*span(node), text))
    text = source.text
    for edit in sorted(edits, reverse=True):
        text = text[: edit.start] + edit.text + text[edit.end :]
    return f"{_header(source.name)}\n{text}"


def _header(name: str) -> str:
    from nemo_bard import __version__

    return f"# Generated from {name} of nemo_bard {__version__}; do not edit.\n{LICENSE}"


def _asks_type_checker(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _for_type_checkers(tree: ast.Module) -> Iterator[ast.AST]:
    for node in tree.body:
        if _asks_type_checker(node):
            yield from ast.walk(node)


_DOTTED = re.compile(rf"{PACKAGE}(\.\w+)+")


def _dotted(value: object, known: frozenset[str]) -> str | None:
    """The expression for a string that names something in one of the modules, None for any other value."""
    if not isinstance(value, str) or not _DOTTED.fullmatch(value):
        return None
    module, _, name = value.rpartition(".")
    return f'f"{{__package__}}.{file_name(module)}.{name}"' if module in known else None
