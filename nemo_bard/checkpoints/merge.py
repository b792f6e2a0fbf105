"""LoRA adapters: ``merge`` adds them to the weights of the checkpoint that they were trained on.

A training run with ``peft:`` saves the adapters alone, in the format of Hugging Face PEFT. The merged folder is a whole
checkpoint: it loads with ``from_pretrained``, starts the next stage, and needs neither adapters nor PEFT. Weights are read
and written one file at a time; no model is built.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_bard.base.files import write_whole
from nemo_bard.base.folders import check_model_type
from nemo_bard.base.names import MODEL_TYPE
from nemo_bard.checkpoints.folder import (
    WEIGHTS_INDEX,
    check_target,
    copy_companions,
    read_header,
    read_object,
    weight_files,
)
from nemo_bard.generation.adapter_folders import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    FACTS,
    adapted_layers,
    check_base,
    read_factors,
    read_facts,
    read_scale,
)

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

TRAINING_CONFIG = "config.yaml"
CONFIG_OVERRIDES = ("block_size", "mask_token_id", "context_attention", "assistant_header_ids", "eos_token_id")
"""Keys of a recipe's ``model`` section that replace those of the base's ``config.json``."""
MERGE_DTYPES = ("auto", "float32", "bfloat16")


class Adapters(NamedTuple):
    """What an adapter folder holds."""

    folder: Path
    base: str
    """Checkpoint that they were trained on."""
    scale: float
    """``alpha / rank``."""
    modules: tuple[str, ...]
    """Linear layers that have one."""
    overrides: dict[str, Any]
    """Model configuration of the run, where it differs from the base's."""


class MergeReport(NamedTuple):
    """What ``merge`` wrote; ``str`` gives text for people."""

    target: Path
    base: Path
    merged: int
    tensors: int

    def __str__(self) -> str:
        return f"wrote {self.target}: {self.base} with adapters on {self.merged} of {self.tensors} tensors"


def find_adapters(checkpoint: Path) -> Path:
    """Return the folder with adapters: ``checkpoint`` itself, or its ``model`` folder.

    Raises:
        FileNotFoundError: If there is none.
    """
    for folder in (checkpoint, checkpoint / "model"):
        if (folder / ADAPTER_CONFIG).is_file() and (folder / ADAPTER_WEIGHTS).is_file():
            return folder
    raise FileNotFoundError(
        f"{checkpoint}: holds no LoRA adapters ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}, there or in its folder model)"
    )


def read_adapters(checkpoint: Path) -> Adapters:
    """Read what a LoRA checkpoint says about its adapters, and check that ``merge`` knows their kind.

    Raises:
        FileNotFoundError: If there are no adapters.
        ValueError: If they are of another kind, or damaged.
    """
    folder = find_adapters(Path(checkpoint))
    file = folder / ADAPTER_CONFIG
    config = read_object(file)
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{file}: peft_type is {config.get('peft_type')!r}, allowed is 'LORA'")
    for key in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "fan_in_fan_out"):
        if config.get(key):
            raise ValueError(f"{file}: {key}={config[key]!r} cannot be merged; allowed is plain LoRA")
    scale, weights = read_scale(file), folder / ADAPTER_WEIGHTS
    layers = adapted_layers((key for key in read_header(weights) if key != "__metadata__"), weights)
    base = str(config.get("base_model_name_or_path"))
    if base.startswith("."):  # of an adapter that lies in its base's folder
        base = str((folder / base).resolve())
    return Adapters(folder, base, scale, tuple(layers), read_overrides(folder))


def read_overrides(folder: Path) -> dict[str, Any]:
    """Read what a run's recipe changed in the model's configuration.

    Args:
        folder: ``model`` of a checkpoint, whose recipe is saved beside it; or an exported adapter, which says it itself.

    Returns:
        Keys of ``config.json`` and their values; none where there is no recipe.

    Raises:
        ValueError: If it changed the shape of the model.
    """
    if (folder / FACTS).is_file():
        return dict(read_facts(folder).get("model") or {})
    file = folder.parent / TRAINING_CONFIG
    if not file.is_file():
        return {}
    import yaml

    recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    model = (recipe or {}).get("model") or {}
    for key in ("text_config", "vision_config", "tie_word_embeddings"):
        if model.get(key) is not None:
            raise ValueError(
                f"{file}: model.{key}={model[key]!r} cannot be merged; make it part of the base's config.json"
            )
    return {key: model[key] for key in CONFIG_OVERRIDES if model.get(key) is not None}


def merge(
    checkpoint: Path,
    target: Path,
    *,
    base: Path | None = None,
    dtype: str = "auto",
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> MergeReport:
    """Write a whole checkpoint: the base's weights ``W + (alpha / rank) B A``, computed in float32.

    Args:
        checkpoint: A LoRA checkpoint of a training run (``.../LATEST``), or a folder with adapters.
        target: Folder to make; it appears whole or not at all.
        base: Checkpoint that the adapters were trained on; None takes what they name.
        dtype: ``auto`` (each tensor as in the base), ``float32`` or ``bfloat16``.
        overrides: Fields of the model configuration that replace the base's; None takes those of the run.
        overwrite: Replace ``target`` if it is a BARD checkpoint or an empty folder.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If the adapters, the base or one of its files is missing.
        FileExistsError: If ``target`` exists and may not be replaced.
        ValueError: If the adapters do not fit the base, or an argument is not allowed.
    """
    if dtype not in MERGE_DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(MERGE_DTYPES)}, got {dtype!r}")
    adapters = read_adapters(checkpoint)
    base, target = Path(adapters.base if base is None else base), Path(target)
    if not (base / "config.json").is_file():
        raise FileNotFoundError(
            f"base {base}: has no config.json; name the checkpoint that the adapters were trained on"
        )
    config = read_object(base / "config.json")
    check_model_type(config, base / "config.json", [MODEL_TYPE])
    if (adapters.folder / FACTS).is_file():
        check_base(adapters.folder, base)
    check_target(base, target, overwrite=overwrite)
    shards = weight_files(base)
    names = {name for shard in shards for name in read_header(base / shard) if name != "__metadata__"}
    check_layers(adapters, names, base)
    config.pop("auto_map", None)  # names files of code that do not travel
    config.update(adapters.overrides if overrides is None else overrides)
    if dtype != "auto":
        for section in (config, config["text_config"], config["vision_config"]):
            section.update({key: dtype for key in ("dtype", "torch_dtype") if key in section})
        config["dtype"] = dtype
    with write_whole(target) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        copy_companions(base, folder)
        own = adapters.folder if (adapters.folder / FACTS).is_file() else base
        for file in (own / "generation_config.json", base / WEIGHTS_INDEX):
            if file.is_file():
                shutil.copyfile(file, folder / file.name)
        for shard in shards:
            _merge_file(base / shard, folder / shard, adapters, dtype)
        _update_size(folder, shards)
        _check_loads(folder)
        _sync(folder)
    return MergeReport(target, base, len(adapters.modules), len(names))


def check_layers(adapters: Adapters, names: Collection[str], base: Path) -> None:
    """Check that a base has the layers that have adapters; ``names`` are those of its weights.

    Raises:
        ValueError: Names the first one that it lacks.
    """
    missing = [module for module in adapters.modules if f"{module}.weight" not in names]
    if missing:
        raise ValueError(f"{adapters.folder}: adapter of {missing[0]}, which {base} does not have; name another base")


def add_adapter(weight: Tensor, parts: Any, module: str, adapters: Adapters, base: Path) -> Tensor:
    """Return ``W + (alpha / rank) B A`` in float32.

    Args:
        weight: ``W``, ``[out, in]``.
        parts: The open file of adapters.
        module: Name of the layer.
        adapters: What is known of them.
        base: What has the weight, for error messages.

    Raises:
        ValueError: If the adapter does not fit the weight.
    """
    a, b = read_factors(parts, module, weight.shape, adapter=adapters.folder, base=base)
    return weight.float().addmm_(b, a, alpha=adapters.scale)


def _merge_file(source: Path, target: Path, adapters: Adapters, dtype: str) -> None:
    """Write one weight file with the adapters of its layers added."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    tensors: dict[str, Tensor] = {}
    with safe_open(source, "pt") as weights, safe_open(adapters.folder / ADAPTER_WEIGHTS, "pt") as parts:
        for name in weights.keys():  # noqa: SIM118 (not a mapping)
            weight = weights.get_tensor(name)
            module = name.removesuffix(".weight")
            wanted = weight.dtype if dtype == "auto" or not weight.is_floating_point() else getattr(torch, dtype)
            if module in adapters.modules:
                weight = add_adapter(weight, parts, module, adapters, source)
            tensors[name] = weight.to(wanted).contiguous()
        save_file(tensors, target, metadata=weights.metadata() or {"format": "pt"})


def _update_size(folder: Path, shards: list[str]) -> None:
    """Correct the total size that an index states, where ``dtype`` changed it."""
    file = folder / WEIGHTS_INDEX
    if not file.is_file():
        return
    index = read_object(file)
    sizes = (
        tensor["data_offsets"][1] - tensor["data_offsets"][0]
        for shard in shards
        for name, tensor in read_header(folder / shard).items()
        if name != "__metadata__"
    )
    index["metadata"] = {**(index.get("metadata") or {}), "total_size": sum(sizes)}
    file.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _check_loads(folder: Path) -> None:
    """Read the written configuration back."""
    from nemo_bard.model.configuration import BardVLConfig

    BardVLConfig.from_pretrained(folder)


def _sync(folder: Path) -> None:
    """Bring everything onto the disk before the folder gets its name."""
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
