"""The shape of the library: no circles, few modules at the top, private names of other packages in one room."""

import ast
import importlib
import inspect
import pkgutil
import sys
from pathlib import Path

import grimp
import pytest

import nemo_bard

ROOT = Path(nemo_bard.__file__).parent
ROOM = "nemo_bard.upstream"
NOT_PRIVATE = {"_asdict", "_replace", "_fields", "_make", "_typeshed"}
"""Public in spite of an underscore: of named tuples, and the types of the standard library."""
GUESTS = {"lmms_eval", "vllm"}
"""Programs that load modules of this library, which cannot be imported without them."""


def circles(graph):
    """Strongly connected sets of more than one module (Tarjan)."""
    order, low, stack, found = {}, {}, [], []

    def visit(node):
        order[node] = low[node] = len(order)
        stack.append(node)
        for other in sorted(graph[node]):
            if other not in order:
                visit(other)
                low[node] = min(low[node], low[other])
            elif other in stack:
                low[node] = min(low[node], order[other])
        if low[node] == order[node]:
            ring = [stack.pop()]
            while ring[-1] != node:
                ring.append(stack.pop())
            if len(ring) > 1:
                found.append(sorted(ring))

    for node in sorted(graph):
        if node not in order:
            visit(node)
    return found


def test_circles_are_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a", "d"}, "d": {"d"}}) == [["a", "b", "c"]]


def test_no_module_imports_itself_through_others_type_only_imports_included():
    graph = grimp.build_graph("nemo_bard", cache_dir=None)
    assert circles({name: graph.find_modules_directly_imported_by(name) for name in graph.modules}) == []


def test_few_modules_beside_the_packages():
    assert len(list(ROOT.glob("*.py"))) <= 4


# ------------------ private names of other packages ------------------
def trees():
    """Module name -> syntax tree, of the library outside the room."""
    for path in sorted(ROOT.rglob("*.py")):
        name = ".".join(["nemo_bard", *path.relative_to(ROOT).with_suffix("").parts])
        if not name.startswith(ROOM):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def is_private(name):
    return name.startswith("_") and not name.endswith("__") and name != "_" and name not in NOT_PRIVATE


def own_names():
    """Private names that the library gives to something itself."""
    found = set()
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                found.add(node.name)
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
                    for part in ast.walk(target):
                        if isinstance(part, ast.Name):
                            found.add(part.id)
                        elif isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name):
                            found |= {part.attr} if part.value.id == "self" else set()
    return found


def private_uses(tree, own):
    """Line and private name of other packages, the standard library left out."""
    library = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0] in sys.stdlib_module_names
    }
    for node in ast.walk(tree):
        names = []
        if isinstance(node, ast.ImportFrom):
            names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and getattr(node.value, "id", None) not in library:
            names = [node.attr]
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in (
            "getattr",
            "setattr",
            "hasattr",
            "delattr",
        ):
            names = [arg.value for arg in node.args[1:2] if isinstance(arg, ast.Constant)]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value:
            head, *rest = node.value.split(".")
            names = rest if head in ("nemo_automodel", "torch", "torchdata", "transformers") else []
        yield from ((node.lineno, name) for name in names if is_private(str(name)) and name not in own)


def test_private_names_are_used_in_the_room_only():
    own = own_names()
    found = [f"{module}:{line}: {name}" for module, tree in trees() for line, name in private_uses(tree, own)]
    assert found == [], "give it an accessor and a row of TOUCHED in nemo_bard/upstream"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("from nemo_automodel.config._arg_parser import parse", ["_arg_parser"]),
        ("from torch.x import _private", ["_private"]),
        ("import torch._dynamo", ["_dynamo"]),
        ("model.config._attn_implementation", ["_attn_implementation"]),
        ("getattr(loader, '_iterator', None)", ["_iterator"]),
        ("registry = 'nemo_automodel._transformers.registry'", ["_transformers"]),
        ("import argparse\nargparse._SubParsersAction", []),
        ("self._own", []),
        ("row._asdict()", []),
        ("module.__dict__", []),
    ],
)
def test_what_counts_as_a_private_name(text, expected):
    assert [name for _, name in private_uses(ast.parse(text), {"_own"})] == expected


def import_or_leave(name):
    """A module, None where it belongs to a program that is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in GUESTS:
            return None
        raise


def test_private_methods_of_other_packages_are_overridden_in_the_room_only():
    found = []
    for info in pkgutil.walk_packages(nemo_bard.__path__, "nemo_bard."):
        if info.name.startswith(ROOM) or info.name.endswith("__main__"):
            continue
        for _, kind in inspect.getmembers(import_or_leave(info.name), inspect.isclass):
            if kind.__module__ != info.name:
                continue
            for base in kind.__mro__[1:]:
                if base.__module__.partition(".")[0] in ("nemo_bard", *sys.stdlib_module_names):
                    continue
                names = {name for name in vars(kind).keys() & vars(base).keys() if is_private(name)}
                written = {name for name in names if inspect.isroutine(vars(kind)[name])}
                found += [f"{info.name}.{kind.__name__}.{name} of {base.__name__}" for name in written]
    assert found == []


def replacements(tree):
    """Lines that put something into a module or another class of what other packages made: modules, ``__class__``, tables."""
    imported = {
        alias.asname or alias.name.partition(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).partition(".")[0]
        in ("nemo_automodel", "torch", "torchdata", "transformers", "tqdm")
    }
    for node in ast.walk(tree):
        for target in getattr(node, "targets", []) if isinstance(node, ast.Assign) else []:
            if isinstance(target, ast.Attribute):
                root = target.value
                while isinstance(root, ast.Attribute):
                    root = root.value
                if target.attr == "__class__" or getattr(root, "id", None) in imported:
                    yield node.lineno, ast.unparse(target)


def test_nothing_of_other_packages_is_replaced_outside_the_room():
    found = [f"{module}:{line}: {text}" for module, tree in trees() for line, text in replacements(tree)]
    assert found == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import torch\ntorch.cuda.current_device = zero", ["torch.cuda.current_device"]),
        ("from transformers import x\nx.print = y", ["x.print"]),
        ("head.__class__ = Other", ["head.__class__"]),
        ("self.model = model", []),
    ],
)
def test_what_counts_as_a_replacement(text, expected):
    assert [name for _, name in replacements(ast.parse(text))] == expected
