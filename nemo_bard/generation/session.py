"""What one call of ``generate`` owns: its view of the model, its cache, and what takes long to make.

Calls of several threads on one model do not meet. What outlives a call (captured graphs, with the caches whose addresses they
have recorded) is taken out of a pool and given back at the end, so that no two sessions have the same at once.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from nemo_bard.generation.prompt import Prompt
from nemo_bard.generation.resolve import DecodeSettings
from nemo_bard.upstream.torch import has_hooks
from nemo_bard.upstream.views import fingerprint, view

if TYPE_CHECKING:
    from nemo_bard.generation.protocol import DecodableModel


class BlockCacheLayer(CacheLayerMixin):
    """Keys and values of one layer, ``[N, Hkv, capacity, D]``, written in place at a column that the engine sets."""

    is_compileable = False
    is_sliding = False

    def __init__(self, capacity: int, cursor: dict[str, int]) -> None:
        super().__init__()
        self.capacity, self.cursor = capacity, cursor

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate."""
        rows, heads = key_states.shape[:2]
        self.keys = key_states.new_empty(rows, heads, self.capacity, key_states.shape[-1])
        self.values = value_states.new_empty(rows, heads, self.capacity, value_states.shape[-1])
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states and return what the queries may look at, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
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
        self.cursor = {"start": 0}
        super().__init__(layers=[BlockCacheLayer(capacity, self.cursor) for _ in range(layers)])

    def write_at(self, start: int) -> None:
        """Say at which column the next forward begins to write."""
        self.cursor["start"] = start

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        for layer in self.layers:
            assert isinstance(layer, BlockCacheLayer)
            layer.select(rows)


KEPT = 2
"""Things that a pool keeps for a model while nobody uses them; each has a cache of its own."""


class Kept(NamedTuple):
    """Something that outlives calls, and what it was made of and for."""

    thing: Any
    made_of: tuple[Any, ...]
    made_for: Any


@dataclass
class Pool:
    """What no session uses now, by model, the last used at the end; it goes when the model goes."""

    idle: weakref.WeakKeyDictionary[Any, list[Kept]] = field(default_factory=weakref.WeakKeyDictionary)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, model: DecodableModel, made_for: Any, fits: Callable[[Any], bool], make: Callable[[], Any]) -> Kept:
        """Take out what was made for the same and fits, else make it; what was made of a model that has changed is dropped.

        Args:
            model: The model.
            made_for: Compared with ``==``.
            fits: Asked about a thing that was made for the same; one that does not fit is dropped.
            make: Makes one.
        """
        made_of = _made_of(model)
        with self.lock:
            fresh = [one for one in self.idle.get(model, []) if one.made_of == made_of]
            same = [one for one in fresh if one.made_for == made_for]
            found = next((one for one in reversed(same) if fits(one.thing)), None)
            self.idle[model] = [one for one in fresh if one not in same or (found is not None and one is not found)]
        if found is not None:
            return found
        thing = make()  # which may move weights
        return Kept(thing, _made_of(model), made_for)

    def give_back(self, model: DecodableModel, kept: Kept) -> None:
        """Put one back for the next session."""
        with self.lock:
            self.idle[model] = [*self.idle.get(model, []), kept][-KEPT:]


POOL = Pool()


def _made_of(model: DecodableModel) -> tuple[Any, ...]:
    parts = (model.model.language_model, model.lm_head)
    places = tuple(parameter.data_ptr() for part in parts for parameter in part.parameters())
    return (*(one for part in parts for one in fingerprint(part)), has_hooks(parts[0]), *places)


class Session:
    """One call: ``with Session(model, prompt, settings) as session: ...``.

    Args:
        model: The model; not modified.
        prompt: From ``prepare_prompt``.
        settings: Resolved settings.
    """

    def __init__(self, model: DecodableModel, prompt: Prompt, settings: DecodeSettings) -> None:
        self.prompt, self.settings = prompt, settings
        attention = getattr(settings.engine, "attention", None)
        classes = getattr(settings.engine, "layers", None)
        replacements = None if settings.adapter is None else settings.adapter.replacements()
        self.model = view(
            model, model.decoding_attention, text_attention=attention, classes=classes, replacements=replacements
        )
        """The model in evaluation mode with the attention backend of decoding."""
        self._shared = model
        self._borrowed: list[Kept] = []
        self._vision: dict[str, Any] = {}

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for kept in self._borrowed:
            if error is None:  # else what a step left half done is not used again
                POOL.give_back(self._shared, kept)
        self._borrowed.clear()

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

    def borrow(self, made_for: Any, *, fits: Callable[[Any], bool], make: Callable[[], Any]) -> Any:
        """Take something out of the pool that outlives calls, until the end of this one; see ``Pool.take``."""
        kept = POOL.take(self._shared, made_for, fits, make)
        self._borrowed.append(kept)
        return kept.thing
