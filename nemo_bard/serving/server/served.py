"""What the server has: the model, and each adapter of its folder under a name of its own, as vLLM names LoRA adapters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from nemo_bard.generation.adapter_folders import adapter_names
from nemo_bard.generation.adapters import adapter_settings, has_adapters, model_folder
from nemo_bard.generation.parameters import STRATEGIES, denoising_strategies
from nemo_bard.generation.resolve import resolve_settings
from nemo_bard.generation.settings import BardGenerationConfig
from nemo_bard.serving.server.settings import ServerSettings


@dataclass(frozen=True, kw_only=True)
class Served:
    """A model in the eyes of a request."""

    name: str
    config: BardGenerationConfig
    """Where a request says nothing."""
    block_size: int
    strategies: list[str]
    """Those that it can be decoded with."""
    max_tokens: int
    """Where a request says nothing."""

    def card(self) -> dict[str, Any]:
        """Its object in ``/v1/models``."""
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "nemo_bard"}


def served_models(model: Any, name: str, settings: ServerSettings) -> dict[str, Served]:
    """Everything that requests may ask for, by name; the first is for those that name nothing.

    Args:
        model: ``BardVLForConditionalGeneration``; its adapters are read.
        name: Its own; an adapter ``b32`` of it is ``NAME:b32``. A base that decodes only with an adapter is left out.
        settings: Limits.

    Raises:
        ValueError: If it cannot be decoded with, or an adapter is damaged.
    """
    return {one: _served(model, one, config, settings) for one, config in _configs(model, name)}


def _configs(model: Any, name: str) -> Iterator[tuple[str, BardGenerationConfig]]:
    own: BardGenerationConfig = model.generation_config
    with_adapters = has_adapters(model)
    by_next_token = STRATEGIES.get(own.remasking_strategy).by_next_token
    if not (with_adapters and by_next_token and model.config.context_attention != "causal"):
        yield name, own
    if with_adapters:
        folder = model_folder(model)
        for adapter in adapter_names(folder):
            yield f"{name}:{adapter}", adapter_settings(folder, adapter)


def _served(model: Any, name: str, config: BardGenerationConfig, settings: ServerSettings) -> Served:
    resolved = resolve_settings(model, config)
    return Served(
        name=name,
        config=config,
        block_size=resolved.block_size,
        strategies=list(STRATEGIES) if resolved.context_attention == "causal" else denoising_strategies(),
        max_tokens=min(resolved.given.max_new_tokens, settings.max_tokens),
    )
