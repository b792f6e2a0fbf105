"""Weights into safetensors files of a given size, one tensor in memory at a time."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from nemo_bard.base.files import write_json
from nemo_bard.checkpoints.exporting.weights import DTYPES, Weights
from nemo_bard.checkpoints.folder import WEIGHTS_INDEX

_SIZE = re.compile(r"\d+(\.\d+)? ?(TB|GB|MB|KB)", re.IGNORECASE)
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Plan(NamedTuple):
    """Which tensors go into which file."""

    files: dict[str, list[str]]
    dtypes: dict[str, torch.dtype]
    total_size: int
    """Bytes of all tensors."""


def check_shard_size(size: str) -> None:
    """Raise ValueError unless ``size`` is one as transformers' ``save_pretrained`` spells them, such as ``5GB``."""
    if not _SIZE.fullmatch(size) or not any(digit in "123456789" for digit in size):
        raise ValueError(f"--max-shard-size must be a number > 0 with KB, MB, GB or TB, such as 5GB, got {size!r}")


def plan(weights: Weights, names: Iterable[str], *, dtype: str, max_shard_size: str) -> Plan:
    """Deal tensors out to files.

    Args:
        weights: Where they come from.
        names: Those to write.
        dtype: ``auto`` (each as it is), or the name of one.
        max_shard_size: Most bytes of a file, such as ``5GB``; a larger tensor gets a file of its own.
    """
    check_shard_size(max_shard_size)
    wanted = {name: weights.tensors[name].dtype if dtype == "auto" else getattr(torch, dtype) for name in names}
    stand_ins = {
        name: torch.empty(weights.tensors[name].shape, dtype=kind, device="meta") for name, kind in wanted.items()
    }
    split = split_torch_state_dict_into_shards(stand_ins, max_shard_size=max_shard_size.replace(" ", ""))
    return Plan(split.filename_to_tensors, wanted, split.metadata["total_size"])


def write_weights(weights: Weights, plan: Plan, folder: Path, advance: Callable[[int], object]) -> None:
    """Write the files of a plan, and their index if there are several.

    Args:
        weights: Where the tensors come from.
        plan: What goes where.
        folder: Gets the files.
        advance: Called with the bytes of each tensor, once it is written.

    Raises:
        OSError: If the disk is full; it names the file.
        ValueError: If a number leaves the range of its new type.
    """
    for file, names in plan.files.items():
        try:
            _write_file(weights, names, plan, folder / file, advance)
        except OSError as error:
            error.filename = error.filename or str(folder / file)
            raise
    if len(plan.files) > 1:
        places = {name: file for file, names in plan.files.items() for name in names}
        count = sum(math.prod(weights.tensors[name].shape) for name in places)
        write_json(
            folder / WEIGHTS_INDEX,
            {
                "metadata": {"total_size": plan.total_size, "total_parameters": count},
                "weight_map": dict(sorted(places.items())),
            },
        )


def _write_file(weights: Weights, names: list[str], plan: Plan, path: Path, advance: Callable[[int], object]) -> None:
    """Write one file; the library's own writer takes all its tensors at once, twice as bytes."""
    ordered = sorted(names, key=lambda name: -plan.dtypes[name].itemsize)  # keeps every tensor aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in ordered:
        shape, dtype = weights.tensors[name].shape, plan.dtypes[name]
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in ordered:
            tensor = cast(weights.read(name), plan.dtypes[name], name)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            advance(tensor.nbytes)


def cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Return a tensor in another type; ValueError if finite numbers would become infinite."""
    found = tensor.to(dtype)
    if found is not tensor and dtype == torch.float16 and bool((found.isinf() & tensor.isfinite()).any()):
        raise ValueError(f"--dtype float16: {name} has numbers beyond 65504; take bfloat16 or float32")
    return found
