"""LoRA adapters in use: read when a call first names one, and kept for as long as the model, which itself never changes."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import nn

from nemo_bard.base.folders import CONFIG
from nemo_bard.generation.adapter_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FOLDER,
    adapted_layers,
    adapter_folder,
    adapter_names,
    check_base,
    read_factors,
    read_facts,
    read_scale,
)
from nemo_bard.generation.low_rank import Factors, LowRankLinear
from nemo_bard.generation.settings import BardGenerationConfig

if TYPE_CHECKING:
    from nemo_bard.generation.protocol import DecodableModel


@dataclass(frozen=True, kw_only=True, eq=False)
class Adapter:
    """An adapter, read; equal to itself alone."""

    name: str
    block_size: int
    """That it was trained for."""
    layers: Mapping[nn.Linear, Factors]
    """Linear layers of the model, and what is added to each."""

    def replacements(self) -> dict[nn.Module, tuple[type[nn.Module], dict[str, Any]]]:
        """What the layers become in a view of the model: class and further fields."""
        return {module: (LowRankLinear, {"factors": factors}) for module, factors in self.layers.items()}


def adapter_settings(folder: Path, name: str) -> BardGenerationConfig:
    """Decode settings of a call that names an adapter, and nothing else.

    Args:
        folder: Of the checkpoint.
        name: Of the adapter.

    Raises:
        ValueError: If there is no such adapter, or its settings are wrong.
    """
    place = adapter_folder(folder, name)
    if not (place / "generation_config.json").is_file():
        return BardGenerationConfig(block_size=read_facts(place)["block_size"], adapter=name)
    saved = BardGenerationConfig.from_pretrained(place)
    return BardGenerationConfig.from_generation_config(saved).updated(adapter=name)


_LOADED: weakref.WeakKeyDictionary[Any, dict[Any, Adapter]] = weakref.WeakKeyDictionary()
_LOADING = threading.Lock()


def model_folder(model: DecodableModel) -> Path:
    """The folder that a model was loaded from; of a name on the hub, where its adapters are cached.

    Raises:
        ValueError: If it was not loaded, or the folder has gone.
    """
    name = str(getattr(model.config, "name_or_path", "") or "")
    if not name:
        raise ValueError("adapter: this model was not loaded from a folder, and has no adapters")
    folder = Path(name)
    if folder.is_dir():
        return folder
    if folder.is_absolute():
        raise ValueError(f"adapter: the folder {folder} that this model was loaded from is gone")
    from huggingface_hub import snapshot_download

    wanted = [CONFIG, "*.safetensors", f"{FOLDER}/*"]  # all but the adapters has been read before
    return Path(snapshot_download(name, allow_patterns=wanted))


def has_adapters(model: DecodableModel) -> bool:
    """Whether the folder that a model was loaded from is on this machine and has adapters."""
    name = str(getattr(model.config, "name_or_path", "") or "")
    return bool(name) and bool(adapter_names(Path(name)))


def call_settings(model: DecodableModel, adapter: str | None) -> BardGenerationConfig:
    """Decode settings of a call that gives no others: the adapter's own if it names one, else the model's.

    Raises:
        ValueError: If there is no such adapter.
    """
    return model.generation_config if adapter is None else adapter_settings(model_folder(model), adapter)


def trained_block_size(model: DecodableModel, adapter: str | None) -> int | None:
    """Block size that a model, or an adapter of it, was trained for."""
    return getattr(model.config, "block_size", None) if adapter is None else load_adapter(model, adapter).block_size


def load_adapter(model: DecodableModel, name: str) -> Adapter:
    """Read an adapter of the folder that a model was loaded from, or return the one that was read before.

    Args:
        model: Not modified.
        name: Of the adapter.

    Raises:
        ValueError: If there is none, it is damaged, was made for other weights, or does not fit the model.
    """
    weight = model.get_input_embeddings().weight
    key = (name, weight.device, weight.dtype)
    with _LOADING:
        known = _LOADED.setdefault(model, {})
        if key not in known:
            folder = model_folder(model)
            place = adapter_folder(folder, name)
            check_base(place, folder)
            layers = _read_layers(model, place)
            _check_loaded(model, next(iter(layers)), folder)
            known[key] = Adapter(name=name, block_size=read_facts(place)["block_size"], layers=layers)
        return known[key]


def _read_layers(model: Any, place: Path) -> dict[nn.Linear, Factors]:
    scale, file = read_scale(place / ADAPTER_CONFIG), place / ADAPTER_WEIGHTS
    if not file.is_file():
        raise ValueError(f"{place}: has no {ADAPTER_WEIGHTS}")
    modules, layers = dict(model.named_modules()), {}
    with safe_open(file, "pt") as parts:
        for name in adapted_layers(parts.keys(), file):
            module = modules.get(name)
            if type(module) is not nn.Linear:
                what = "lacks" if module is None else f"has as a {type(module).__name__}"
                raise ValueError(f"{place}: adapter of {name}, which this model {what}; adapters are for linear layers")
            down, up = read_factors(parts, name, module.weight.shape, adapter=place, base="this model")
            layers[module] = Factors(down, up * scale).like(module.weight)
    return layers


def _check_loaded(model: Any, layer: nn.Linear, folder: Path) -> None:
    """Compare a layer with the file it was loaded from: the model may have been trained since, or be of another revision."""
    name = next(name for name, module in model.named_modules() if module is layer) + ".weight"
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            if name not in weights.keys():  # noqa: SIM118 (not a mapping)
                continue
            row = weights.get_slice(name)[:1].float()
            own = layer.weight[:1].detach().cpu().float()
            if not torch.allclose(own, row, rtol=2**-7, atol=2**-14 * float(row.abs().max())):  # as bfloat16 rounds
                raise ValueError(
                    f"adapter: {name} of this model is not what {folder} has; load the model from there again"
                )
