"""A second face of a model: the same weights, evaluation mode and another attention backend, while the model stays as it is.

transformers chooses the backend by a field of the configuration that all layers read while they run, and evaluation mode is
a field of every module. Both are shared by all threads, so a call that needs other values runs on copies of the modules.
The copies share parameters and hooks with the model. What the layers read is private: ``_attn_implementation_internal`` of
transformers' configurations (until a forward takes its backend as an argument), and of torch's modules ``_modules``,
``_buffers`` and ``_compiled_call_impl`` (until torch can copy modules without their parameters).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import nn

M = TypeVar("M")
Classes = Mapping[type[nn.Module], type[nn.Module]]
Replacements = Mapping[nn.Module, tuple[type[nn.Module], Mapping[str, Any]]]


def view(
    model: M,
    attention: str,
    *,
    text_attention: str | None = None,
    classes: Classes | None = None,
    replacements: Replacements | None = None,
) -> M:
    """Copy the modules of a model, in evaluation mode and with another attention backend.

    Args:
        model: A transformers model whose ``config`` has a ``text_config`` and may have a ``vision_config``; not modified.
        attention: Name of the backend.
        text_attention: Another one for the language model.
        classes: What the copy of a module of exactly this class becomes, a subclass of it.
        replacements: What the copies of single modules become: a subclass of the module's class, with further fields.
            ``classes`` is looked at after that.

    Returns:
        The copy. Parameters and hooks are the model's own, whatever happens to them; buffers are the same tensors until a
        forward replaces one. ``torch.compile`` of the model does not reach the copy.
    """
    root: Any = model
    config = copy.copy(root.config)
    configs = {id(root.config): config}
    for name in ("text_config", "vision_config"):
        if hasattr(config, name):
            part = copy.copy(getattr(config, name))
            part._attn_implementation_internal = (text_attention if name == "text_config" else None) or attention
            configs[id(getattr(config, name))] = part
            setattr(config, name, part)
    return _Copies(configs, classes or {}, replacements or {}).of(root)


class _Copies:
    """Copies of modules, one of each."""

    def __init__(self, configs: dict[int, Any], classes: Classes, replacements: Replacements) -> None:
        self.configs, self.classes, self.replacements = configs, classes, replacements
        self.done: dict[int, Any] = {}

    def of(self, module: nn.Module) -> Any:
        """The copy of a module and of all in it."""
        if id(module) in self.done:
            return self.done[id(module)]
        kind, more = self.replacements.get(module, (type(module), {}))
        twin = self.done[id(module)] = object.__new__(self.classes.get(kind, kind))
        fields = {**module.__dict__, **more}
        fields["training"] = False
        fields["_compiled_call_impl"] = None
        fields["_buffers"] = dict(module._buffers)
        fields["_modules"] = {
            name: None if child is None else self.of(child) for name, child in module._modules.items()
        }
        if "config" in fields:
            fields["config"] = self.configs.get(id(fields["config"]), fields["config"])
        twin.__dict__ = fields
        return twin


def fingerprint(module: nn.Module) -> tuple[Any, ...]:
    """What a view of ``module`` was made of; another one means that the view is out of date.

    It holds the modules and buffers themselves, so that none of another address can take their place.
    """
    return tuple(
        part
        for name, child in module.named_modules()
        for part in (name, _Same(child), type(child), _Same(child.__dict__.get("forward")))
    ) + tuple(_Same(buffer) for buffer in module.buffers())


class _Same:
    """Equal to another one of the same object."""

    def __init__(self, thing: Any) -> None:
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)
