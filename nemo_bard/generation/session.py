"""What one call of ``generate`` owns: its view of the model, its cache, and compiled code.

Calls of several threads on one model do not meet: nothing on the model changes. Compiled code outlives a call, since
compiling takes long; a session takes it out of a pool, together with the cache whose addresses it has recorded, and gives
it back at the end, so that no two sessions have the same at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from nemo_bard.generation.prompt import Prompt
from nemo_bard.generation.resolve import DecodeSettings
from nemo_bard.upstream.torch import mark_static_address
from nemo_bard.upstream.views import fingerprint, view

if TYPE_CHECKING:
    from nemo_bard.generation.protocol import DecodableModel

MIN_STATIC_CAPACITY = 512
"""Fixed-shape caches hold a power of two of tokens, at least this many, so that few shapes are ever compiled."""


class BlockCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[N, Hkv, capacity, D]``, written in place at a column that the engine sets."""

    is_compileable = True
    is_sliding = False

    def __init__(self, capacity: int, cursor: dict[str, Any]) -> None:
        super().__init__()
        self.capacity, self.cursor = capacity, cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate; zeros, since a fixed-shape forward reads masked columns too."""
        rows, heads = key_states.shape[:2]
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_zeros(rows, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_zeros(rows, heads, self.capacity, value_states.shape[-1])
        if self.device.type == "cuda":  # CUDA graphs only record writes to tensors whose address never changes
            mark_static_address(self.keys)
            mark_static_address(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states and return what the queries may look at, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if (columns := self.cursor["columns"]) is not None:
            self.keys.index_copy_(2, columns, key_states)
            self.values.index_copy_(2, columns, value_states)
            return self.keys, self.values
        start = self.cursor["start"]
        end = start + key_states.shape[2]
        self.keys[:, :, start:end] = key_states
        self.values[:, :, start:end] = value_states
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the keys."""
        return self.cursor["start"] + query_length, 0

    def get_seq_length(self) -> int:
        """Committed columns."""
        return self.cursor["start"]

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.capacity

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        assert self.keys is not None
        assert self.values is not None
        self.keys, self.values = self.keys[rows], self.values[rows]


class BlockCache(Cache):
    """A cache of ``BlockCacheLayer``, which all write at the same place.

    Args:
        layers: Layers of the language model.
        capacity: Tokens.
    """

    def __init__(self, layers: int, capacity: int) -> None:
        self.capacity = capacity
        self.cursor: dict[str, Any] = {"start": 0, "columns": None}
        super().__init__(layers=[BlockCacheLayer(capacity, self.cursor) for _ in range(layers)])

    def write_at(self, start: int, columns: Tensor | None = None) -> None:
        """Say where the next forward writes: from ``start``, or in fixed shapes at ``columns`` ``[L]``."""
        self.cursor["start"], self.cursor["columns"] = start, columns

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        for layer in self.layers:
            assert isinstance(layer, BlockCacheLayer)
            layer.select(rows)


@dataclass(eq=False)
class CompiledText:
    """The language model compiled for fixed shapes, giving hidden states, and its last cache."""

    made_of: tuple[Any, ...]
    forward: Callable[..., Tensor]
    cache_key: tuple[Any, ...] | None = None
    cache: BlockCache | None = None


@dataclass
class Pool:
    """Compiled code that no session uses now, by model; it goes when the model goes."""

    idle: weakref.WeakKeyDictionary[Any, list[CompiledText]] = field(default_factory=weakref.WeakKeyDictionary)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, model: DecodableModel, text_view: Any, cache_key: tuple[Any, ...]) -> CompiledText:
        """Take one out, if possible with a cache that fits; compiled code of a model that has changed is dropped."""
        made_of = fingerprint(model.model.language_model)
        with self.lock:
            fresh = [one for one in self.idle.get(model, []) if one.made_of == made_of]
            found = next((one for one in fresh if one.cache_key == cache_key), fresh[-1] if fresh else None)
            self.idle[model] = [one for one in fresh if one is not found]
        return found if found is not None else CompiledText(made_of, _compile(text_view))

    def give_back(self, model: DecodableModel, compiled: CompiledText) -> None:
        """Put one back for the next session."""
        with self.lock:
            self.idle.setdefault(model, []).append(compiled)


POOL = Pool()


def _compile(text_view: Any) -> Callable[..., Tensor]:
    def run(**kwargs: Any) -> Tensor:
        return text_view(**kwargs).last_hidden_state

    on_cuda = text_view.get_input_embeddings().weight.is_cuda
    return torch.compile(run, mode="reduce-overhead" if on_cuda else None, dynamic=False)


class Session:
    """One call: ``with Session(model, prompt, settings) as session: ...``.

    Args:
        model: The model; not modified.
        prompt: From ``prepare_prompt``.
        settings: Resolved settings.
    """

    def __init__(self, model: DecodableModel, prompt: Prompt, settings: DecodeSettings) -> None:
        self.prompt, self.settings = prompt, settings
        self.model = view(model, model.decoding_attention)
        """The model in evaluation mode with the attention backend of decoding."""
        self._shared = model
        self._compiled: CompiledText | None = None
        self._vision: dict[str, Any] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._compiled is not None:
            POOL.give_back(self._shared, self._compiled)
        self._compiled = None

    def encode_vision(self) -> None:
        """Run the vision tower once; ``vision_arguments`` has its output."""
        vision = self.prompt.vision
        if "pixel_values" in vision:
            self._vision["image"] = self.model.get_image_features(
                vision["pixel_values"], vision["image_grid_thw"], return_dict=True
            )
        if "pixel_values_videos" in vision:
            self._vision["video"] = self.model.get_video_features(
                vision["pixel_values_videos"], vision["video_grid_thw"], return_dict=True
            )

    def vision_arguments(self) -> dict[str, Any]:
        """What the prompt's forward gets besides its tokens."""
        return {"mm_encoder_outputs": dict(self._vision)} if self._vision else {}

    def block_cache(self, capacity: int) -> BlockCache:
        """Make a cache for all rows; with ``compile_step`` the last one if it fits, since its addresses are recorded."""
        layers = self.model.config.text_config.num_hidden_layers
        if not self.settings.compile_step:
            return BlockCache(layers, capacity)
        weight = self.model.get_input_embeddings().weight
        key = (self.prompt.input_ids.shape[0], capacity, weight.dtype, weight.device)
        self._compiled = compiled = POOL.take(self._shared, self.model.model.language_model, key)
        if compiled.cache is None or compiled.cache_key != key:
            compiled.cache_key, compiled.cache = key, BlockCache(layers, capacity)
        return compiled.cache

    def compiled_text(self) -> Callable[..., Tensor] | None:
        """The language model compiled for the shapes of ``block_cache``, giving hidden states; None unless asked for."""
        return None if self._compiled is None else self._compiled.forward
