"""Keys of a recipe's sections, read from the source of what NeMo AutoModel and transformers make of them.

The source is parsed, not imported: a recipe is checked in milliseconds, and importing a class with its package takes
seconds. ``tests/unit/test_sections.py`` compares what is found with the imported classes and functions.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

_STEP_SCHEDULER = "nemo_automodel.components.training.step_scheduler"
_AUTO_MODEL = "nemo_automodel._transformers.auto_model"
_FINETUNE = "nemo_automodel.recipes.vlm.finetune"
_TYPED = "nemo_automodel.recipes._typed_config"
_DISTRIBUTED = "nemo_automodel.recipes._dist_utils"
_DATALOADER = "nemo_automodel.components.datasets.vlm.loader"
_QWEN = "transformers.models.qwen3_vl.configuration_qwen3_vl"

_CONFIG_KEY = re.compile(r"cfg\.get\('([\w.]+)'|self\.cfg\.(?!get\()(\w+(?:\.\w+)?)|getter\('([\w.]+)'")
_NESTED_KEY = re.compile(r"cfg\.get\('(\w+)', \{\}\)\.get\('(\w+)'")
_RAW_KEY = re.compile(r"self\._raw\.get\('(\w+)'")
_METHODS = ("build", "instantiate", "apply", "get", "to_dict", "to_yaml_dict")

INFRASTRUCTURE = (
    "distributed_setup", "device_mesh", "qat_config", "peft_config", "fp8_config", "compile_config", "freeze_config",
    "has_packed_sequence", "load_base_model",
)  # fmt: skip
"""Arguments of a model's ``_target_`` that AutoModel's recipe gives it, not its section."""


UNKNOWN = object()
"""Default of a key that has none, or one that is no literal."""


@cache
def section_keys() -> dict[str, dict[str, Any]]:
    """Keys of the sections that AutoModel turns into something of its own, with their defaults."""
    read = keys_read()
    target = {"_target_": None}
    return {
        "dist_env": dict.fromkeys(read["dist_env"], UNKNOWN),
        "clip_grad_norm": dict.fromkeys(read["clip_grad_norm"], UNKNOWN),
        "step_scheduler": {**_fields(_STEP_SCHEDULER, "StepSchedulerConfig"), "local_batch_size": UNKNOWN},
        "lr_scheduler": target | _fields("nemo_automodel.components.optim.optimizer", "LRSchedulerConfig"),
        "dataloader": target | {"collate_fn": UNKNOWN} | _loader_keys(),
        "distributed": _distributed_keys(),
        "freeze_config": _fields("nemo_automodel.components.utils.model_utils", "FreezeConfig"),
        "peft": target | _fields("nemo_automodel.components._peft.lora", "PeftConfig"),
        "checkpoint": dict.fromkeys(read["checkpoint"], UNKNOWN)
        | _fields("nemo_automodel.components.checkpoint.config", "CheckpointingConfig"),
        "prewarm": _fields("nemo_automodel.components.training.prewarm", "PrewarmConfig"),
        "mlflow": _fields("nemo_automodel.components.loggers.loggers", "MLflowConfig"),
        "model": _model_keys(),
    }


def wandb_keys() -> tuple[str, ...]:
    """Keys of the section ``wandb``: what ``wandb.init`` takes, but for what AutoModel gives it; none without wandb."""
    try:
        taken = _parameters(_function(_tree("wandb.sdk.wandb_init"), "init"))
    except (ModuleNotFoundError, ValueError):  # not installed, or a stand-in without a file
        return ()
    return ("enable", "extra", *(key for key in taken if key not in ("config", "settings")))


def constructor_keys(module: str, name: str) -> tuple[str, ...]:
    """Parameters of a class's ``__init__``, the class not being imported."""
    return tuple(key for key in _parameters(_function(_class(module, name), "__init__")) if key != "self")


@cache
def keys_read() -> dict[str, tuple[str, ...]]:
    """Sections that AutoModel's VLM recipe reads, and the keys of each that it reads by name."""
    found: dict[str, list[str]] = {}
    recipe = ast.unparse(_class(_FINETUNE, "FinetuneRecipeForVLM"))
    for dotted in [*_CONFIG_KEY.findall(recipe), *_CONFIG_KEY.findall(ast.unparse(_tree(_DISTRIBUTED)))]:
        section, _, key = next(name for name in dotted if name).partition(".")
        found.setdefault(section, []).extend([key] if key and key not in _METHODS else [])
    for section, key in _NESTED_KEY.findall(recipe):
        found[section].append(key)
    for view in [name for name in found if name.startswith("vlm_")]:
        del found[view]
        names = _RAW_KEY.findall(ast.unparse(_function(_class(_TYPED, "RecipeConfig"), view)))
        found.update({name: found.get(name, []) for name in names})
    return {section: tuple(dict.fromkeys(keys)) for section, keys in found.items() if section not in _METHODS}


def _distributed_keys() -> dict[str, Any]:
    """Sizes and what ``parse_distributed_section`` takes out, then what is left for the strategy ``fsdp2``."""
    parse = _function(_tree(_DISTRIBUTED), "parse_distributed_section")
    taken = dict.fromkeys(["_target_", *_first_arguments(parse, {"pop"})])
    sizes = _constant(_DISTRIBUTED, "_PARALLELISM_DEFAULTS")
    return taken | sizes | _fields("nemo_automodel.components.distributed.config", "FSDP2Config")


def _loader_keys() -> dict[str, Any]:
    """Keys of the loader itself: what AutoModel's pipeline has in common with the loader that it builds."""
    loader = constructor_keys("torchdata.stateful_dataloader.stateful_dataloader", "StatefulDataLoader")
    return {key: value for key, value in _fields(_DATALOADER, "VlmDataloaderConfig").items() if key in loader}


def _model_keys() -> dict[str, Any]:
    """Arguments of ``from_pretrained``, what it reads from its keywords, and fields of the model's configuration."""
    load = _function(_class(_AUTO_MODEL, "_BaseNeMoAutoModelClass"), "from_pretrained")
    keywords = _first_arguments(load, {"pop", "get"}, of="kwargs")
    hub = _constant(_AUTO_MODEL, "_AUTO_CONFIG_HUB_KWARG_KEYS")
    names = ["_target_", *_parameters(load), *keywords, *hub, "trust_remote_code"]
    config = _fields(_QWEN, "Qwen3VLConfig") | _fields("nemo_bard.model.configuration", "BardVLConfig")
    found = dict.fromkeys(names, UNKNOWN) | config
    return {key: value for key, value in found.items() if key not in (*INFRASTRUCTURE, "cls")}


def _fields(module: str, name: str) -> dict[str, Any]:
    """Fields of a dataclass and their defaults, those of its bases elsewhere left out."""
    return {
        node.target.id: _literal(node.value)
        for node in _class(module, name).body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and not _is_class_var(node)
    }


def _literal(node: ast.expr | None) -> Any:
    try:
        return UNKNOWN if node is None else ast.literal_eval(node)
    except ValueError:
        return UNKNOWN


def _is_class_var(node: ast.AnnAssign) -> bool:
    return "ClassVar" in ast.unparse(node.annotation)


def _parameters(function: ast.FunctionDef) -> list[str]:
    """Names of a function's parameters but for ``*args`` and ``**kwargs``."""
    given = function.args
    return [argument.arg for argument in (*given.posonlyargs, *given.args, *given.kwonlyargs)]


def _first_arguments(function: ast.FunctionDef, methods: Iterable[str], *, of: str = "cfg") -> list[str]:
    """Texts that methods of a local variable are called with: the keys that a function takes out of a dictionary."""
    return [
        node.args[0].value
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in methods
        and ast.unparse(node.func.value) == of
        and node.args
        and isinstance(node.args[0], ast.Constant)
        and isinstance(node.args[0].value, str)
    ]


def _constant(module: str, name: str) -> Any:
    """A literal at module level."""
    for node in _tree(module).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or node.value is None:
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        if any(isinstance(target, ast.Name) and target.id == name for target in targets):
            return ast.literal_eval(node.value)
    raise LookupError(f"{module} has no {name}")


def _class(module: str, name: str) -> ast.ClassDef:
    for node in _tree(module).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return node
    raise LookupError(f"{module} has no class {name}")


def _function(holder: ast.ClassDef | ast.Module, name: str) -> ast.FunctionDef:
    for node in holder.body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return node
    raise LookupError(f"no function {name}")


@cache
def _tree(module: str) -> ast.Module:
    return ast.parse(_source(module))


@cache
def _source(module: str) -> str:
    package, *rest = module.split(".")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)
    path = Path(spec.submodule_search_locations[0]).joinpath(*rest)
    return (path.with_suffix(".py")).read_text(encoding="utf-8")
