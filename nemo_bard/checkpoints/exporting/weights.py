"""The tensors of a checkpoint, read one at a time: from a folder, from shards of several ranks, with adapters added."""

from __future__ import annotations

import math
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from nemo_bard.base.errors import one_line
from nemo_bard.checkpoints.folder import read_header, weight_files
from nemo_bard.checkpoints.merge import Adapters, add_adapter, check_layers
from nemo_bard.generation.adapter_folders import ADAPTER_WEIGHTS

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Names of safetensors."""


class Facts(NamedTuple):
    """What is known of a tensor before it is read."""

    shape: tuple[int, ...]
    dtype: torch.dtype


class Weights(Protocol):
    """Tensors by name."""

    @property
    def tensors(self) -> Mapping[str, Facts]:
        """All of them, in the order of the files."""
        ...

    def read(self, name: str) -> Tensor:
        """Read one, on the CPU."""
        ...


class FolderWeights:
    """Weights of a Hugging Face folder.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If a file is damaged, or holds anything but floating-point numbers.
    """

    def __init__(self, folder: Path) -> None:
        self.tensors: dict[str, Facts] = {}
        self._files: dict[str, Path] = {}
        for file in weight_files(folder):
            for name, entry in read_header(folder / file).items():
                if name == "__metadata__":
                    continue
                dtype = DTYPES.get(entry["dtype"])
                if dtype is None:
                    raise _not_exported(folder / file, name, entry["dtype"])
                self.tensors[name] = Facts(tuple(entry["shape"]), dtype)
                self._files[name] = folder / file

    def read(self, name: str) -> Tensor:
        """Read one; the file is closed again, so that its pages do not stay."""
        from safetensors import safe_open

        with safe_open(self._files[name], "pt") as file:
            return file.get_tensor(name)


class DistributedWeights:
    """Weights that the ranks of a training run wrote in pieces: shards of safetensors, or ``.distcp`` files.

    Args:
        folder: ``model`` of a checkpoint.

    Raises:
        ValueError: If a file is missing, cut short, or does not hold a piece that others need.
    """

    def __init__(self, folder: Path) -> None:
        shards = sorted(folder.glob("*.safetensors"))
        for shard in shards:
            read_header(shard)
        kind = HuggingFaceStorageReader if shards else FileSystemReader
        self._reader = _read_once(kind)(folder)
        try:
            found = self._reader.read_metadata()
        except (pickle.UnpicklingError, EOFError, AttributeError, ImportError, IndexError) as error:
            raise ValueError(f"{folder / '.metadata'}: cannot be read ({one_line(error)}); copy it again") from error
        if not shards:
            _check_distributed_files(folder, found)
        self.tensors: dict[str, Facts] = {}
        for name, entry in found.state_dict_metadata.items():
            if not isinstance(entry, TensorStorageMetadata):
                continue  # states of modules that are no tensors
            pieces = sum(math.prod(chunk.sizes) for chunk in entry.chunks)
            if pieces != math.prod(entry.size):
                raise ValueError(
                    f"{folder}: {pieces} of the {math.prod(entry.size)} numbers of {name} are there; the file of a rank is"
                    f" missing ({len(shards) or len(list(folder.glob('*.distcp')))} are there)"
                )
            if entry.properties.dtype not in DTYPES.values():
                raise _not_exported(folder, name, str(entry.properties.dtype).removeprefix("torch."))
            self.tensors[name] = Facts(tuple(entry.size), entry.properties.dtype)

    def read(self, name: str) -> Tensor:
        """Read the pieces of one."""
        facts = self.tensors[name]
        state = {name: torch.empty(facts.shape, dtype=facts.dtype)}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)  # one process is enough
            load(state, storage_reader=self._reader, no_dist=True)
        return state[name]


def _not_exported(where: Path, name: str, dtype: str) -> ValueError:
    """The error for a tensor of a type that is no floating-point one."""
    return ValueError(
        f"{where}: {name} is {dtype}, allowed are {', '.join(DTYPES)}; quantized weights cannot be exported"
    )


def _read_once(kind: Any) -> Any:
    """A reader that keeps what all files say of themselves, which ``dcp.load`` asks for with every tensor."""

    class Reader(kind):
        known: Any = None

        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            if self.known is None:
                self.known = super().read_metadata(*args, **kwargs)
            return self.known

    return Reader


def _check_distributed_files(folder: Path, metadata: Metadata) -> None:
    ends: dict[str, int] = {}
    for item in (metadata.storage_data or {}).values():
        ends[item.relative_path] = max(ends.get(item.relative_path, 0), item.offset + item.length)
    for name, end in ends.items():
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(f"{file}: missing weight file")
        if file.stat().st_size < end:
            raise ValueError(f"{file}: has {file.stat().st_size} bytes, needed are {end}; copy it again")


class MergedWeights:
    """A base's weights with adapters added: ``W + (alpha / rank) B A``, computed in float32.

    Args:
        base: Weights that the adapters were trained on.
        adapters: Theirs.

    Raises:
        ValueError: If the base lacks a layer that has an adapter.
    """

    def __init__(self, base: Weights, adapters: Adapters, where: Path) -> None:
        check_layers(adapters, base.tensors, where)
        self.tensors = base.tensors
        self._base, self._adapters, self._where = base, adapters, where

    def read(self, name: str) -> Tensor:
        """Read one, and its adapter."""
        from safetensors import safe_open

        weight, module = self._base.read(name), name.removesuffix(".weight")
        if module not in self._adapters.modules or not name.endswith(".weight"):
            return weight
        with safe_open(self._adapters.folder / ADAPTER_WEIGHTS, "pt") as parts:
            return add_adapter(weight, parts, module, self._adapters, self._where).to(weight.dtype)


def expected_shapes(config_folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights that a BARD configuration asks for.

    Args:
        config_folder: Has ``config.json``.
    """
    from transformers import Qwen3VLForConditionalGeneration

    from nemo_bard.model.configuration import BardVLConfig

    config = BardVLConfig.from_pretrained(config_folder)
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def check_complete(weights: Weights, expected: Mapping[str, tuple[int, ...]], where: Path) -> list[str]:
    """Check that weights are those that a configuration asks for.

    Args:
        weights: What is there.
        expected: Names and shapes.
        where: For error messages.

    Returns:
        Tensors that are left out: a tied LM head, which is the embedding.

    Raises:
        ValueError: Names the first tensor that is missing, not known, or of another shape.
    """
    missing = [name for name in expected if name not in weights.tensors]
    if missing:
        raise ValueError(
            f"{where}: {missing[0]} is missing{_more(missing)}; a shard is missing, or config.json is of another model"
        )
    left_out = [name for name in weights.tensors if name not in expected]
    unknown = [name for name in left_out if name != "lm_head.weight"]
    if unknown:
        raise ValueError(f"{where}: {unknown[0]} is no weight of this architecture{_more(unknown)}")
    for name, shape in expected.items():
        if weights.tensors[name].shape != shape:
            raise ValueError(
                f"{where}: {name} has the shape {weights.tensors[name].shape}, config.json asks for {shape}; a shard is"
                " missing, or config.json is of another model"
            )
    return left_out


def _more(names: list[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""
