"""LoRA adapters that a checkpoint folder keeps beside its weights: ``adapters/NAME``, as ``nemo-bard export --adapter`` writes them.

Each is in the format of Hugging Face PEFT, with ``generation_config.json`` (what a call gets that names the adapter) and
``bard_adapter.json``: its block size, and a digest of the weights that it was made for.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.base.errors import not_one_of
from nemo_bard.base.folders import CONFIG, read_object

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "adapters"
FACTS = "bard_adapter.json"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
KEY = "base_model.model.{module}.lora_{part}.weight"
"""Name of a tensor of PEFT's format; ``part`` is A or B."""
_KEY = re.compile(re.escape(KEY).replace(r"\{module\}", "(?P<module>.+)").replace(r"\{part\}", "(?P<part>[AB])"))
SAMPLED = 256
"""Numbers of each tensor that count in a digest."""


def adapter_names(folder: Path) -> list[str]:
    """Names of the adapters that a checkpoint folder has, by block size where they have one, else by name."""
    found = [path.parent.name for path in (folder / FOLDER).glob(f"*/{ADAPTER_CONFIG}")]
    return sorted(found, key=lambda name: (not name[1:].isdigit(), int(name[1:]) if name[1:].isdigit() else 0, name))


def adapter_folder(folder: Path, name: str) -> Path:
    """The folder of an adapter.

    Raises:
        ValueError: If the checkpoint folder has no such adapter; names those it has.
    """
    names = adapter_names(folder)
    if not names:
        raise ValueError(
            f"adapter={name!r}: {folder} has no adapters (a folder {FOLDER}/, from `nemo-bard export --adapter`)"
        )
    if name not in names:
        raise not_one_of("adapter", name, names)
    return folder / FOLDER / name


def read_facts(place: Path) -> dict[str, Any]:
    """Read ``bard_adapter.json``.

    Args:
        place: Folder of an adapter.

    Raises:
        ValueError: If it is missing or damaged.
    """
    file = place / FACTS
    if not file.is_file():
        raise ValueError(
            f"{place}: has no {FACTS}, which says what it was trained on; make it with `nemo-bard export --adapter`"
        )
    facts = read_object(file)
    base, size = facts.get("base"), facts.get("block_size")
    if not isinstance(base, dict) or not isinstance(base.get("digest"), str) or type(size) is not int or size < 1:
        raise ValueError(f"{file}: must have block_size, an integer >= 1, and base.digest, a text")
    return facts


def read_scale(file: Path) -> float:
    """Read ``alpha / rank`` of an ``adapter_config.json``.

    Raises:
        ValueError: If they are no numbers.
    """
    config = read_object(file)
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, (int, float)):
        raise ValueError(f"{file}: r={rank!r} and lora_alpha={alpha!r} must be numbers, r >= 1")
    return alpha / rank


def adapted_layers(keys: Iterable[str], file: Path) -> list[str]:
    """Names of the layers that have an adapter, sorted.

    Args:
        keys: Names of the tensors in a file of adapters.
        file: For error messages.

    Raises:
        ValueError: If there is none, one lacks a part, or a tensor is no part of one.
    """
    parts: dict[str, set[str]] = {}
    for key in keys:
        match = _KEY.fullmatch(key)
        if match is None:
            raise ValueError(f"{file}: {key} is no weight of a LoRA adapter on a linear layer")
        parts.setdefault(match["module"], set()).add(match["part"])
    incomplete = sorted(module for module, found in parts.items() if found != {"A", "B"})
    if incomplete or not parts:
        raise ValueError(f"{file}: lora_A or lora_B is missing for {(incomplete or ['all'])[0]}")
    return sorted(parts)


def read_factors(
    parts: Any, module: str, shape: Sequence[int], *, adapter: Path, base: object
) -> tuple[Tensor, Tensor]:
    """Read an adapter of one layer, in float32: ``A`` ``[rank, in]`` and ``B`` ``[out, rank]``.

    Args:
        parts: The open file of adapters.
        module: Name of the layer.
        shape: Of its weight, ``[out, in]``.
        adapter: Folder, for error messages.
        base: What has the weight, for error messages.

    Raises:
        ValueError: If it does not fit the weight.
    """
    a, b = (parts.get_tensor(KEY.format(module=module, part=part)).float() for part in "AB")
    if (b.shape[0], a.shape[1]) != tuple(shape) or b.shape[1] != a.shape[0]:
        raise ValueError(
            f"{adapter}: the adapter of {module} is {tuple(b.shape)} x {tuple(a.shape)}, its weight in {base}"
            f" {tuple(shape)}; name another base"
        )
    return a, b


def weights_digest(folder: Path) -> str:
    """A digest of names, shapes and some numbers of all weights of a checkpoint, the same in float32 and in bfloat16.

    It reads the first numbers of each tensor, as bfloat16, so that it is quick for any size; a tied LM head is left out.

    Args:
        folder: Of the checkpoint.
    """
    import torch
    from safetensors import safe_open

    tied = bool(read_object(folder / CONFIG).get("tie_word_embeddings"))
    pieces: dict[str, bytes] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118 (not a mapping)
                part = weights.get_slice(name)
                shape = part.get_shape()
                numbers = (part[:1] if len(shape) > 1 else part[:SAMPLED]).flatten()[:SAMPLED].to(torch.bfloat16)
                pieces[name] = f"{name} {shape}\n".encode() + numbers.view(torch.uint8).numpy().tobytes()
    if tied:
        pieces.pop("lm_head.weight", None)
    return hashlib.sha256(b"".join(pieces[name] for name in sorted(pieces))).hexdigest()


def check_base(place: Path, base: Path) -> None:
    """Check that an adapter was made for the weights of a checkpoint folder.

    Args:
        place: Folder of the adapter.
        base: Of the checkpoint.

    Raises:
        ValueError: If it was made for others.
    """
    facts = read_facts(place)
    if weights_digest(base) != facts["base"]["digest"]:
        named = facts["base"].get("name") or "another checkpoint"
        raise ValueError(f"{place}: is an adapter of {named}, and the weights of {base} are others")
