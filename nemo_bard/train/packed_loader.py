"""Packing in a recipe: AutoModel's input pipeline with rows instead of samples."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, fields
from typing import Any

from nemo_automodel.components.datasets.vlm.loader import VlmDataloaderConfig

from nemo_bard.data.packing import PackedDataset


@dataclass
class PackedDataloaderConfig(VlmDataloaderConfig):
    """AutoModel's input pipeline whose data set is packed right after it is built, on the first rank first.

    So the sampler deals out rows, and the first rank measures while the others wait and then read its file.
    """

    pack: Callable[[Any, Any], PackedDataset] | None = None
    """From data set and processor to rows."""

    @classmethod
    def from_config(
        cls, config: VlmDataloaderConfig, pack: Callable[[Any, Any], PackedDataset]
    ) -> PackedDataloaderConfig:
        """The same pipeline, packed."""
        return cls(**{field.name: getattr(config, field.name) for field in fields(config)}, pack=pack)

    def _build_source(self, *, dataset_build_context: Any, **arguments: Any) -> tuple[Any, Any]:
        assert self.pack is not None
        with dataset_build_context or nullcontext():
            dataset, processor = super()._build_source(dataset_build_context=None, **arguments)
            return self.pack(dataset, processor), processor
