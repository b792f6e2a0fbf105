"""Blockwise denoising: the loop, and the engines that run its forwards.

All rows of a batch work on the same block number; a row that has ended leaves the batch. The loop is the same for both
engines, which differ in how logits at the wanted positions come about:

- ``FastEngine``: a cache written in place, the LM head only at the wanted positions, and one forward for the commit of a
  block and the first step of the next one (``[block b clean | block b + 1 masked]`` under the training mask gives exactly
  the numbers of two forwards). The prompt's forward carries the first step of the first block in the same way.
- ``PlainEngine``: the oracle. Separate prompt and commit forwards, logits and softmax at every position, and a cache that
  is concatenated anew in every step.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from nemo_bard.generation.prompt import Prompt
from nemo_bard.generation.strategies import NEEDS_ENTROPY, STRATEGIES, Candidates, StepState, propose, tokens_per_step
from nemo_bard.method.layout import CONTEXT, NOISY, TokenIds, attention_mask
from nemo_bard.model import attention

if TYPE_CHECKING:
    from nemo_bard.model.modeling import BardVLForConditionalGeneration


MIN_STATIC_CAPACITY = 512
"""Fixed-shape caches hold a power of two of tokens, at least this many, so that few shapes are ever compiled."""


@dataclass(frozen=True, kw_only=True)
class DecodeSettings:
    """A generation config with every default resolved against the model; see ``BardGenerationConfig`` for meanings."""

    block_size: int
    denoising_steps: int
    max_new_tokens: int
    remasking_strategy: str
    confidence_threshold: float
    entropy_bound: float
    edit_threshold: float | None
    max_post_edit_steps: int
    temperature: float
    top_k: int
    top_p: float
    suppress_mask_token: bool
    mask_token_id: int
    end_ids: tuple[int, ...]
    pad_token_id: int
    context_attention: str
    static_cache: bool
    compile_step: bool
    output_history: bool

    @property
    def num_blocks(self) -> int:
        """Blocks that hold ``max_new_tokens``."""
        return -(-self.max_new_tokens // self.block_size)


@dataclass(kw_only=True)
class StepRecord:
    """One denoising step of the batch, for visualisation; rows that were not running are absent."""

    block: int
    step: int
    rows: list[int]
    ids: Tensor
    """Block content after the step, ``[rows, B]``; the mask id where still masked."""
    confidence: Tensor
    """Probability of the proposed token, ``[rows, B]``; nan where none was proposed."""
    fixed: Tensor
    """True where the step fixed or replaced a token, ``[rows, B]``."""


@dataclass(kw_only=True)
class DecodeResult:
    """What the loop produced, on CPU except ``sequences``."""

    sequences: Tensor
    """Response ids, ``[N, longest]``, padded after each row's end."""
    lengths: list[int]
    """Response tokens of each row, its EOS included."""
    block_step_counts: Tensor
    """Denoising forwards of each row in each block, ``[N, blocks]``; 0 where a block was not started."""
    commit_forwards: list[int]
    """Forwards of each row that only committed a block; 0 where the commit rides on a denoising forward."""
    forwards: int
    """Forwards of the language model for the whole batch, prompt included."""
    seconds: dict[str, float]
    history: list[StepRecord] = field(default_factory=list)


class Engine(Protocol):
    """Runs forwards; ``positions`` are flat indices into ``[rows * B]`` and every call returns logits ``[K, V]``."""

    forwards: int
    separate_commits: bool

    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the prompt and the first step of the first block."""
        ...

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run one more step of the current block."""
        ...

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Commit the finished block and run the first step of the next one."""
        ...

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        ...


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
            torch._dynamo.mark_static_address(self.keys)
            torch._dynamo.mark_static_address(self.values)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the new states and return what the queries may look at, as views."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
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
        self.keys, self.values = self.keys[rows], self.values[rows]


class _EngineBase:
    """State shared by the engines: per-row block ids and positions, ids of the cached columns."""

    def __init__(self, model: BardVLForConditionalGeneration, prompt: Prompt, settings: DecodeSettings) -> None:
        self.model, self.prompt, self.settings = model, prompt, settings
        self.block = prompt.next_block
        self.position = prompt.next_position
        self.committed = prompt.input_ids.shape[1]
        self.key_ids = prompt.ids
        self.forwards = 0
        self.encoder_outputs: dict[str, Any] = {}

    def encode_vision(self) -> None:
        """Run the vision tower once; the prompt's forward takes its output."""
        vision = self.prompt.vision
        if "pixel_values" in vision:
            self.encoder_outputs["image"] = self.model.get_image_features(
                vision["pixel_values"], vision["image_grid_thw"], return_dict=True
            )
        if "pixel_values_videos" in vision:
            self.encoder_outputs["video"] = self.model.get_video_features(
                vision["pixel_values_videos"], vision["video_grid_thw"], return_dict=True
            )

    def _vision_kwargs(self) -> dict[str, Any]:
        return {"mm_encoder_outputs": dict(self.encoder_outputs)} if self.encoder_outputs else {}

    def _block_ids(self, offset: int, branch: int) -> TokenIds:
        """Ids of the current (0) or a later block, each ``[N, B]``."""
        size = self.settings.block_size
        ones = torch.ones(self.block.shape[0], size, dtype=torch.int64, device=self.block.device)
        order = self.committed + offset * size + torch.arange(size, device=self.block.device)
        return TokenIds(ones * 0, ones * branch, (self.block + offset).unsqueeze(1) * ones, order * ones)

    def _block_positions(self, offset: int) -> Tensor:
        """M-RoPE positions of the current (0) or a later block, ``[3, N, B]``."""
        size = self.settings.block_size
        positions = self.position.unsqueeze(1) + offset * size + torch.arange(size, device=self.position.device)
        return positions.expand(3, *positions.shape)

    def _mask(self, query: TokenIds, new_keys: TokenIds) -> Tensor:
        keys = TokenIds(*(torch.cat(pair, 1) for pair in zip(self.key_ids, new_keys, strict=True)))
        return attention_mask(query, keys, context_attention=self.settings.context_attention).unsqueeze(1)

    def _commit_bookkeeping(self) -> None:
        clean = self._block_ids(0, CONTEXT)
        self.key_ids = TokenIds(*(torch.cat(pair, 1) for pair in zip(self.key_ids, clean, strict=True)))
        self.committed += self.settings.block_size
        self.block = self.block + 1
        self.position = self.position + self.settings.block_size

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.block, self.position = self.block[rows], self.position[rows]
        self.key_ids = TokenIds(*(x[rows] for x in self.key_ids))


class FastEngine(_EngineBase):
    """In-place cache, merged commits, LM head where wanted."""

    separate_commits = False

    def __init__(self, model: BardVLForConditionalGeneration, prompt: Prompt, settings: DecodeSettings) -> None:
        super().__init__(model, prompt, settings)
        self.capacity = self.committed + settings.num_blocks * settings.block_size
        if settings.static_cache:
            self.capacity = max(MIN_STATIC_CAPACITY, 1 << (self.capacity - 1).bit_length())
        self.cache, self.cursor = self._make_cache()
        self.step_mask: Tensor | None = None
        self.text_forward = _compiled_text_forward(model) if settings.compile_step else None

    def _make_cache(self) -> tuple[Cache, dict[str, Any]]:
        """Make the cache; compiled code gets the model's last one back if it fits, since it has recorded its addresses."""
        weight = self.model.get_input_embeddings().weight
        key = (self.prompt.input_ids.shape[0], self.capacity, weight.dtype, weight.device)
        kept = self.model.__dict__.get("_bard_static_cache")
        if self.settings.compile_step and kept is not None and kept[0] == key:
            return kept[1], kept[2]
        cursor: dict[str, Any] = {"start": 0, "columns": None}
        layers = self.model.config.text_config.num_hidden_layers
        cache = Cache(layers=[BlockCacheLayer(self.capacity, cursor) for _ in range(layers)])
        if self.settings.compile_step:
            self.model.__dict__["_bard_static_cache"] = (key, cache, cursor)
        return cache, cursor

    def _forward(
        self,
        ids: Tensor,
        positions: Tensor,
        mask: Tensor,
        start: int,
        wanted: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        self.forwards += 1
        self.cursor["start"] = start
        if self.settings.static_cache and start:
            self.cursor["columns"] = start + torch.arange(ids.shape[1], device=ids.device)
            mask = torch.nn.functional.pad(mask, (0, self.capacity - mask.shape[-1]))
            if self.text_forward is not None:
                hidden = self.text_forward(
                    inputs_embeds=self.model.get_input_embeddings()(ids),
                    attention_mask=mask,
                    position_ids=positions.contiguous(),
                    past_key_values=self.cache,
                )
                return self.model.lm_head(hidden.flatten(0, 1).index_select(0, wanted))
        else:
            self.cursor["columns"] = None
        return self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self.cache,
            output_positions=wanted,
            **kwargs,
        ).logits

    def _merged(
        self, clean: Tensor, clean_ids: TokenIds, clean_positions: Tensor, canvas: Tensor, offset: int
    ) -> tuple:
        noisy = self._block_ids(offset, NOISY)
        query = TokenIds(*(torch.cat(pair, 1) for pair in zip(clean_ids, noisy, strict=True)))
        ids = torch.cat([clean, canvas], 1)
        positions = torch.cat([clean_positions, self._block_positions(offset)], 2)
        return ids, positions, query

    def _wanted(self, positions: Tensor, width: int) -> Tensor:
        """Flat indices into ``[N * B]`` as flat indices into ``[N * (width + B)]``, whose last ``B`` columns they mean."""
        size = self.settings.block_size
        row = positions // size
        return positions + (row + 1) * width

    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run ``[prompt | masks]``."""
        ids, rope, query = self._merged(self.prompt.input_ids, self.key_ids, self.prompt.position_ids, canvas, 0)
        mask = attention_mask(query, query, context_attention=self.settings.context_attention).unsqueeze(1)
        wanted = self._wanted(positions, self.committed)
        self.step_mask = None
        return self._forward(ids, rope, mask, 0, wanted, **self._vision_kwargs())

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the block against the cache; its columns are overwritten by the next forward."""
        if self.step_mask is None:
            query = self._block_ids(0, NOISY)
            self.step_mask = self._mask(query, query)
        return self._forward(canvas, self._block_positions(0), self.step_mask, self.committed, positions)

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run ``[block clean | next block masked]`` and count the clean columns as committed."""
        ids, rope, query = self._merged(finished, self._block_ids(0, CONTEXT), self._block_positions(0), canvas, 1)
        mask = self._mask(query, query)
        start = self.committed
        wanted = self._wanted(positions, self.settings.block_size)
        self._commit_bookkeeping()
        self.step_mask = None
        return self._forward(ids, rope, mask, start, wanted)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        super().select(rows)
        self.step_mask = None
        for layer in self.cache.layers:
            layer.select(rows)


class PlainEngine(_EngineBase):
    """Separate forwards, logits and softmax everywhere, concatenated cache: what the reference does."""

    separate_commits = True

    def __init__(self, model: BardVLForConditionalGeneration, prompt: Prompt, settings: DecodeSettings) -> None:
        super().__init__(model, prompt, settings)
        self.cache = DynamicCache()

    def _forward(self, ids: Tensor, positions: Tensor, mask: Tensor, **kwargs: Any) -> Tensor:
        self.forwards += 1
        logits = self.model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache, **kwargs
        ).logits
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.softmax(-1).log()

    def first(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the prompt, then the block."""
        mask = attention_mask(self.key_ids, self.key_ids, context_attention=self.settings.context_attention)
        self._forward(self.prompt.input_ids, self.prompt.position_ids, mask.unsqueeze(1), **self._vision_kwargs())
        return self.step(canvas, positions)

    def step(self, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the block and take it out of the cache again."""
        query = self._block_ids(0, NOISY)
        logits = self._forward(canvas, self._block_positions(0), self._mask(query, query))
        for layer in self.cache.layers:
            layer.crop(-canvas.shape[1])
        return logits.flatten(0, 1).index_select(0, positions)

    def advance(self, finished: Tensor, canvas: Tensor, positions: Tensor) -> Tensor:
        """Run the clean block into the cache, then the next block."""
        query = self._block_ids(0, CONTEXT)
        self._forward(finished, self._block_positions(0), self._mask(query, query))
        self._commit_bookkeeping()
        return self.step(canvas, positions)

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        super().select(rows)
        for layer in self.cache.layers:
            layer.batch_select_indices(rows)


def _compiled_text_forward(model: BardVLForConditionalGeneration) -> Callable[..., Tensor]:
    """Return the text model compiled for fixed shapes (CUDA graphs on CUDA), one per model, giving hidden states."""
    compiled = model.__dict__.get("_bard_compiled_text_forward")
    if compiled is None:
        text_model = model.model.language_model

        def run(**kwargs: Any) -> Tensor:
            return text_model(**kwargs).last_hidden_state

        mode = "reduce-overhead" if model.get_input_embeddings().weight.is_cuda else None
        compiled = torch.compile(run, mode=mode, dynamic=False)
        model.__dict__["_bard_compiled_text_forward"] = compiled
    return compiled


@contextlib.contextmanager
def _attention_backend(model: BardVLForConditionalGeneration) -> Iterator[None]:
    """Use the ``bard`` backend, which takes dense bool masks, whatever the model was loaded with."""
    text_config = model.config.text_config
    before = text_config._attn_implementation
    text_config._attn_implementation_internal = attention.NAME
    try:
        yield
    finally:
        text_config._attn_implementation_internal = before


@dataclass
class Hooks:
    """What callers may plug into the loop; every field is optional."""

    logits_processor: Callable[[Tensor, Tensor], Tensor] | None = None
    """``(input_ids [K, ...], logits [K, V]) -> logits``, as in transformers."""
    stopping_criteria: Callable[[Tensor, Any], Any] | None = None
    """``(input_ids [N, ...], None) -> bool [N]``, asked after each block."""
    on_draft: Callable[[Tensor], None] | None = None
    """Called with the current block of all rows after each step."""
    on_block: Callable[[Tensor], None] | None = None
    """Called with the new tokens of a finished block, cut at the end of the row (batch of one)."""


class Decoder:
    """The loop over blocks and steps for one batch."""

    def __init__(
        self,
        model: BardVLForConditionalGeneration,
        prompt: Prompt,
        settings: DecodeSettings,
        *,
        plain: bool = False,
        hooks: Hooks | None = None,
        generator: torch.Generator | None = None,
        synchronize: bool = False,
    ) -> None:
        """Prepare decoding.

        Args:
            model: The model, in eval mode.
            prompt: From ``prepare_prompt``.
            settings: Resolved settings.
            plain: Use the oracle engine.
            hooks: Callbacks.
            generator: Source of randomness on the model's device.
            synchronize: Wait for the device around the timed phases.
        """
        self.model, self.prompt, self.settings = model, prompt, settings
        self.hooks = hooks or Hooks()
        self.generator = generator
        self.engine: FastEngine | PlainEngine = (PlainEngine if plain else FastEngine)(model, prompt, settings)
        self.synchronize = synchronize and prompt.input_ids.is_cuda
        self.device = prompt.input_ids.device
        self.quota = tokens_per_step(settings.block_size, settings.denoising_steps)
        rows = prompt.input_ids.shape[0]
        self.response = torch.full(
            (rows, settings.num_blocks * settings.block_size), settings.pad_token_id, device=self.device
        )
        self.lengths = [0] * rows
        self.counts = torch.zeros(rows, settings.num_blocks, dtype=torch.int64)
        self.commits = [0] * rows
        self.history: list[StepRecord] = []
        self.end_ids = torch.tensor(settings.end_ids, dtype=torch.int64, device=self.device)

    def run(self) -> DecodeResult:
        """Decode the batch."""
        with torch.no_grad(), _attention_backend(self.model):
            return self._run()

    def _clock(self) -> float:
        if self.synchronize:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _run(self) -> DecodeResult:
        settings, rows = self.settings, self.prompt.input_ids.shape[0]
        start = self._clock()
        self.engine.encode_vision()
        after_vision = self._clock()
        after_prefill = after_vision
        live = list(range(rows))  # rows of the batch that the engine still runs
        going = list(range(rows))  # indices into `live` that have not ended; all of them unless shapes are fixed
        finished: Tensor | None = None
        for block in range(settings.num_blocks):
            canvas = torch.full((len(live), settings.block_size), settings.mask_token_id, device=self.device)
            index = torch.tensor(going, device=self.device).unsqueeze(1) * settings.block_size
            positions = (index + torch.arange(settings.block_size, device=self.device)).flatten()
            if finished is None:
                logits = self.engine.first(canvas, positions)
                after_prefill = self._clock()
            else:
                logits = self.engine.advance(finished, canvas, positions)
            finished, ends = self._denoise(block, canvas, logits, positions, live, going)
            going = self._close_block(block, finished, ends, live, going)
            if not going or block + 1 == settings.num_blocks:
                break
            if self.engine.separate_commits:
                for index in going:
                    self.commits[live[index]] += 1
            if len(going) < len(live) and not settings.compile_step:  # another batch size would be compiled anew
                keep = torch.tensor(going, device=self.device)
                self.engine.select(keep)
                finished = finished[keep]
                live = [live[index] for index in going]
                going = list(range(len(live)))
        end = self._clock()
        longest = max(self.lengths)
        return DecodeResult(
            sequences=self.response[:, :longest],
            lengths=self.lengths,
            block_step_counts=self.counts,
            commit_forwards=self.commits,
            forwards=self.engine.forwards,
            seconds={
                "vision": after_vision - start,
                "prefill": after_prefill - after_vision,
                "decode": end - after_prefill,
            },
            history=self.history,
        )

    def _denoise(
        self, block: int, canvas: Tensor, logits: Tensor, positions: Tensor, live: list[int], going: list[int]
    ) -> tuple[Tensor, list[int]]:
        """Denoise one block of the rows ``going``; returns its tokens ``[rows, B]`` and each row's first EOS (``B`` if none).

        ``logits`` ``[K, V]`` are those of the first step, at the flat ``positions`` ``[K]`` of ``canvas``.
        """
        settings = self.settings
        size, editing = settings.block_size, settings.edit_threshold is not None
        running = torch.zeros(len(live), dtype=torch.bool, device=self.device)
        running[torch.tensor(going, device=self.device)] = True
        is_masked = running.unsqueeze(1).expand_as(canvas)
        post_steps = torch.zeros(len(live), dtype=torch.int64, device=self.device)
        running_rows = going
        columns = torch.arange(size, device=self.device)
        step = 0
        while True:
            candidates = self._propose(logits, canvas, positions, live)
            proposed = canvas.flatten().index_copy(0, positions, candidates.ids).view_as(canvas)
            confidence = self._scatter(candidates.confidence, positions, canvas, float("-inf"))
            entropy = None
            if candidates.entropy is not None:
                entropy = self._scatter(candidates.entropy, positions, canvas, float("inf"))
                entropy = entropy.masked_fill(~is_masked, float("inf"))
            state = StepState(
                confidence.masked_fill(~is_masked, float("-inf")),
                entropy,
                is_masked,
                self.quota[min(step, len(self.quota) - 1)],
                settings.confidence_threshold,
                settings.entropy_bound,
            )
            change = STRATEGIES[settings.remasking_strategy](state) & running.unsqueeze(1)
            still_masked = is_masked & ~change
            if editing:
                edit = ~is_masked & (proposed != canvas) & (confidence > settings.edit_threshold) & running.unsqueeze(1)
                was_done = ~is_masked.any(1)
                post_steps = post_steps + (was_done & running)
                change = change | edit
            canvas = torch.where(change, proposed, canvas)
            if settings.output_history:
                self._record(block, step, live, running_rows, canvas, confidence, change)
            is_masked = still_masked
            next_running = is_masked.any(1)
            if editing:
                # Revision may go on after the last mask: at first unconditionally, then as long as something changes.
                again = running & ~next_running & (post_steps < settings.max_post_edit_steps)
                next_running = next_running | (again & (~was_done | change.any(1)))
            wanted = (torch.ones_like(is_masked) if editing else is_masked) & next_running.unsqueeze(1)
            first_end = torch.where(torch.isin(canvas, self.end_ids), columns, size).amin(1)
            summary = torch.stack([next_running.long(), wanted.sum(1), first_end]).tolist()  # the step's one host sync
            for index in running_rows:
                self.counts[live[index], block] += 1
            if self.hooks.on_draft is not None:
                self.hooks.on_draft(torch.where(is_masked, proposed, canvas))
            running, running_rows = next_running, [i for i, on in enumerate(summary[0]) if on]
            if not running_rows:
                return canvas, summary[2]
            positions = torch.argsort(~wanted.flatten(), stable=True)[: sum(summary[1])]
            logits = self.engine.step(canvas, positions)
            step += 1

    def _propose(self, logits: Tensor, canvas: Tensor, positions: Tensor, live: list[int]) -> Candidates:
        settings = self.settings
        if settings.suppress_mask_token:
            logits[:, settings.mask_token_id] = float("-inf")
        if self.hooks.logits_processor is not None:
            context = self._context(live, canvas)
            logits = self.hooks.logits_processor(context[positions // settings.block_size], logits)
        return propose(
            logits,
            temperature=settings.temperature,
            top_k=settings.top_k,
            top_p=settings.top_p,
            with_entropy=settings.remasking_strategy in NEEDS_ENTROPY,
            generator=self.generator,
        )

    def _context(self, live: list[int], canvas: Tensor | None = None) -> Tensor:
        """Prompt, response so far and current block of the live rows, ``[rows, ...]``."""
        index = torch.tensor(live, device=self.device)
        done = max(self.lengths)
        parts = [self.prompt.input_ids[index], self.response[index, :done]]
        return torch.cat(parts if canvas is None else [*parts, canvas], 1)

    def _scatter(self, values: Tensor, positions: Tensor, canvas: Tensor, fill: float) -> Tensor:
        full = values.new_full((canvas.numel(),), fill)
        return full.index_copy(0, positions, values).view_as(canvas)

    def _record(
        self, block: int, step: int, live: list[int], running: list[int], canvas: Tensor, conf: Tensor, change: Tensor
    ) -> None:
        index = torch.tensor(running, device=self.device)
        confidence = conf[index].masked_fill(conf[index].isinf(), float("nan"))
        self.history.append(
            StepRecord(
                block=block,
                step=step,
                rows=[live[i] for i in running],
                ids=canvas[index].cpu(),
                confidence=confidence.float().cpu(),
                fixed=change[index].cpu(),
            )
        )

    def _close_block(
        self, block: int, finished: Tensor, ends: list[int], live: list[int], going: list[int]
    ) -> list[int]:
        """Store a finished block of the rows ``going``; returns the indices (into ``live``) of those that go on."""
        settings = self.settings
        size, begin = settings.block_size, block * settings.block_size
        room = min(size, settings.max_new_tokens - begin)
        for index in going:
            row = live[index]
            taken = min(ends[index] + 1, room)
            self.response[row, begin : begin + taken] = finished[index, :taken]
            self.lengths[row] = begin + taken
            if self.hooks.on_block is not None:
                self.hooks.on_block(finished[index, :taken])
        going = [index for index in going if ends[index] >= size]
        if self.hooks.stopping_criteria is not None and going:
            stop = self.hooks.stopping_criteria(self._context(live), None)
            flags = stop.tolist() if isinstance(stop, Tensor) else [bool(stop)] * len(live)
            going = [index for index in going if not flags[index]]
        return going
