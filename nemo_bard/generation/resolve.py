"""Settings of a call, with everything filled in that the model's configuration knows."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nemo_bard.base.registry import import_dotted
from nemo_bard.generation.adapters import Adapter, has_adapters, load_adapter
from nemo_bard.generation.parameters import ENGINES, NEXT_TOKEN_ENGINES, NO_END, GenerationSettings
from nemo_bard.generation.settings import BardGenerationConfig, as_id_list, check_mask_token_id
from nemo_bard.generation.strategies import Strategy

if TYPE_CHECKING:
    from nemo_bard.generation.protocol import DecodableModel


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """What the decoding loop reads: the settings as given, and in their place what was resolved against the model."""

    given: GenerationSettings
    strategy: Strategy
    block_size: int
    denoising_steps: int
    """At most ``block_size``."""
    mask_token_id: int
    end_ids: tuple[int, ...]
    """Ids that end the response; empty for none."""
    turn_end_ids: tuple[int, ...]
    """Ids that end an earlier assistant turn of the prompt."""
    pad_token_id: int
    context_attention: str
    engine: type
    compile_step: bool
    adapter: Adapter | None = None

    @property
    def num_blocks(self) -> int:
        """Blocks that hold ``max_new_tokens``."""
        return -(-self.given.max_new_tokens // self.block_size)


def resolve_settings(model: DecodableModel, config: BardGenerationConfig) -> DecodeSettings:
    """Fill what a generation config leaves open from the model's configuration.

    Raises:
        ValueError: If neither names a block size or a mask id, or the mask id is not a row of the embedding.
    """
    given, strategy = config.resolve()
    model_config = model.config
    adapter = None if given.adapter is None else load_adapter(model, given.adapter)
    trained = getattr(model_config, "block_size", None) if adapter is None else adapter.block_size
    block_size = given.block_size if given.block_size is not None else trained
    if block_size is None:
        raise ValueError("block_size is set neither in the call nor in the model's config.json; pass block_size=")
    if trained is not None and block_size != trained:
        warnings.warn(
            f"block_size={block_size} differs from {trained}, which this checkpoint was trained with", stacklevel=4
        )
    mask_token_id = _mask_token_id(given, model_config)
    end_ids, turn_end_ids = _end_ids(given, model_config)
    if mask_token_id in end_ids:
        raise ValueError(f"mask_token_id {mask_token_id} is also an eos_token_id; they must differ")
    pad = given.pad_token_id
    if pad is None:
        pad = next(iter([*end_ids, *turn_end_ids]), mask_token_id)
    vocab_size = model_config.text_config.vocab_size
    for name, ids in (("eos_token_id", end_ids), ("pad_token_id", [pad])):
        if max(ids, default=0) >= vocab_size:
            raise ValueError(f"{name} {max(ids)} is outside the vocabulary, 0 to {vocab_size - 1}")
    on_cuda = model.get_input_embeddings().weight.is_cuda
    is_static = "static" in (
        given.cache_implementation,
        "static" if on_cuda and not given.cache_implementation else None,
    )
    is_static |= given.decode_path == "graph"
    is_graph = given.decode_path == "fast" and is_static
    return DecodeSettings(
        given=given,
        strategy=strategy,
        block_size=block_size,
        denoising_steps=min(given.denoising_steps or block_size, block_size),
        mask_token_id=mask_token_id,
        end_ids=tuple(end_ids),
        turn_end_ids=tuple(turn_end_ids),
        pad_token_id=pad,
        context_attention=model_config.context_attention,
        engine=_next_token_engine(given, model)
        if strategy.by_next_token
        else ENGINES.get("graph" if is_graph else given.decode_path),
        compile_step=is_static and (on_cuda if given.compile_step is None else given.compile_step),
        adapter=adapter,
    )


def _next_token_engine(given: GenerationSettings, model: DecodableModel) -> type:
    found = model.config.context_attention
    if found != "causal":
        hint = "; name one of its adapters with adapter=" if given.adapter is None and has_adapters(model) else ""
        raise ValueError(
            f"remasking_strategy={given.remasking_strategy} needs a checkpoint with context_attention: causal, this one"
            f" has {found}{hint}"
        )
    return import_dotted(NEXT_TOKEN_ENGINES[given.decode_path])


def _mask_token_id(given: GenerationSettings, model_config: Any) -> int:
    mask_token_id = given.mask_token_id if given.mask_token_id is not None else model_config.mask_token_id
    if mask_token_id is None:
        raise ValueError("mask_token_id is set neither in the call nor in the model's config.json; pass mask_token_id=")
    check_mask_token_id(mask_token_id, model_config.text_config.vocab_size)
    for name in ("image_token_id", "video_token_id"):
        if mask_token_id == getattr(model_config, name):
            raise ValueError(f"mask_token_id {mask_token_id} is the model's {name}; choose a row that no text uses")
    return mask_token_id


def _end_ids(given: GenerationSettings, model_config: Any) -> tuple[list[int], list[int]]:
    """Ids that end the response, and those that end earlier turns, which a call without an end has too."""
    if given.eos_token_id is None:
        return model_config.end_ids, model_config.end_ids
    ids = [] if given.eos_token_id == NO_END else as_id_list(given.eos_token_id)
    return ids, ids or model_config.end_ids
