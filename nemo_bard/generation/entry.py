"""``generate``: settings resolved against the model, the call conventions of transformers, and the output object."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils.generic import ModelOutput

from nemo_bard.base.errors import unknown_name
from nemo_bard.generation.adapters import call_settings
from nemo_bard.generation.decode import Decoder, DecodeResult, Hooks, StepRecord
from nemo_bard.generation.next_token import NextTokenDecoder
from nemo_bard.generation.prompt import PROMPT_KEYS, prepare_prompt
from nemo_bard.generation.resolve import resolve_settings
from nemo_bard.generation.session import Session
from nemo_bard.generation.settings import BardGenerationConfig

if TYPE_CHECKING:
    from nemo_bard.generation.protocol import DecodableModel

NO_OPS: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, "num_return_sequences": 1}
"""Arguments of transformers' autoregressive ``generate`` that people pass by habit; only these values mean nothing here."""
IGNORED = ("tokenizer",)
"""What callers of transformers' ``generate`` pass along for features that are not here."""


@dataclass
class BardGenerateOutput(ModelOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: Response ids, ``[N, longest]`` int64; the pad id after each row's end.
        lengths: Response tokens of each row, EOS included, ``[N]``.
        tokens_per_forward: Response tokens / (denoising + commit forwards) of each row, ``[N]`` float32.
        tokens_per_denoising_forward: Response tokens / denoising forwards of each row, ``[N]`` float32.
        block_step_counts: Denoising forwards per block, ``[N, blocks]``; 0 where a block was not started. In next-token
            decoding forwards take the place of blocks: 1 for each that the row took part in.
        commit_forwards: Forwards of each row that only committed a block, ``[N]``.
        forwards: Forwards of the language model for the whole batch, the prompt's included.
        seconds: Wall-clock seconds of ``vision``, ``prefill`` (prompt and first step) and ``decode``.
        history: One ``StepRecord`` per step with ``output_history=True``.
        accepted_tokens: In next-token decoding (``autoregressive``, ``self_speculative``) the response tokens that each
            forward of each row found, ``[N, forwards]``; 0 behind a row's end. None with other strategies.
    """

    sequences: Tensor | None = None
    lengths: Tensor | None = None
    tokens_per_forward: Tensor | None = None
    tokens_per_denoising_forward: Tensor | None = None
    block_step_counts: Tensor | None = None
    commit_forwards: Tensor | None = None
    forwards: int | None = None
    seconds: dict[str, float] | None = None
    history: list[StepRecord] | None = None
    accepted_tokens: Tensor | None = None


def split_arguments(
    inputs: Any, kwargs: dict[str, Any], strategy: str | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate prompt tensors from generation settings.

    Args:
        inputs: What the processor returned (a mapping), ``input_ids``, or None.
        kwargs: Keyword arguments of the call.
        strategy: The remasking strategy where the call names none; its parameters are settings too.

    Returns:
        Prompt tensors by name and settings by name.

    Raises:
        ValueError: For a missing prompt, one given twice, or an unknown name (with the nearest known one).
    """
    prompt: dict[str, Any] = {}
    if isinstance(inputs, Tensor):
        prompt["input_ids"] = inputs
    elif isinstance(inputs, Mapping):
        prompt.update(inputs)
        for name in prompt:
            if name not in PROMPT_KEYS:
                raise unknown_name("model input", name, PROMPT_KEYS)
    elif inputs is not None:
        raise ValueError(
            f"the first argument of generate must be a processor's output or input_ids, got {type(inputs).__name__}"
        )
    settings, known = {}, BardGenerationConfig.known_keys(kwargs.get("remasking_strategy", strategy))
    for name, value in kwargs.items():
        if name in PROMPT_KEYS:
            if name in prompt:
                raise ValueError(f"{name} is given twice")
            prompt[name] = value
        elif name in known:
            settings[name] = value
        elif name in NO_OPS:
            if value is not None and value != NO_OPS[name]:
                hint = "; use temperature > 0 to draw tokens" if name == "do_sample" else ""
                raise ValueError(f"{name} must be {NO_OPS[name]}, got {value!r}{hint}")
        elif name not in IGNORED:
            raise unknown_name("argument of generate", name, [*known, *PROMPT_KEYS])
    if prompt.get("input_ids") is None:
        raise ValueError("generate needs input_ids; pass what the processor returned")
    return {k: v for k, v in prompt.items() if v is not None}, settings


def make_hooks(input_ids: Tensor, logits_processor: Any, stopping_criteria: Any, streamer: Any) -> Hooks:
    """Turn what transformers' callers plug in into hooks of the loop; a streamer gets the prompt at once.

    Raises:
        ValueError: For a streamer and more than one row.
    """
    hooks = Hooks()
    if logits_processor:
        hooks.logits_processor = logits_processor
    if stopping_criteria:
        hooks.stopping_criteria = stopping_criteria
    if streamer is not None:
        if len(input_ids) != 1:
            raise ValueError(f"a streamer takes a batch of one, got {len(input_ids)} rows")
        streamer.put(input_ids.cpu())
        hooks.on_block = lambda ids: streamer.put(ids.cpu())
        if hasattr(streamer, "put_draft"):
            hooks.on_draft = lambda ids: streamer.put_draft(ids.cpu())
        if hasattr(streamer, "put_step"):
            hooks.on_step = streamer.put_step
    return hooks


def generate(
    model: DecodableModel,
    inputs: Any = None,
    generation_config: BardGenerationConfig | None = None,
    *,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    streamer: Any = None,
    generator: torch.Generator | None = None,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, dict[str, Any]] | BardGenerateOutput:
    """Decode responses; see ``BardVLForConditionalGeneration.generate``."""
    base = generation_config if generation_config is not None else call_settings(model, kwargs.get("adapter"))
    if not isinstance(base, BardGenerationConfig):
        raise ValueError(f"generation_config must be a BardGenerationConfig, got {type(base).__name__}")
    prompt_tensors, overrides = split_arguments(inputs, kwargs, base.remasking_strategy)
    config = base.updated(**overrides)
    settings = resolve_settings(model, config)
    # Compiled code and the cache that belongs to it serve later calls too, which need not be in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        prompt = prepare_prompt(
            model,
            prompt_tensors,
            block_size=settings.block_size,
            max_new_tokens=settings.given.max_new_tokens,
            end_ids=list(settings.turn_end_ids),
            pad_token_id=settings.pad_token_id,
            mask_token_id=settings.mask_token_id,
        )
        hooks = make_hooks(prompt.input_ids, logits_processor, stopping_criteria, streamer)
        try:
            with Session(model, prompt, settings) as session:
                loop = NextTokenDecoder if settings.strategy.by_next_token else Decoder
                decoder = loop(session, hooks=hooks, generator=generator, synchronize=config.return_dict_in_generate)
                result = decoder.run()
        finally:
            if streamer is not None:
                streamer.end()
    if config.return_dict_in_generate:
        return make_output(result)
    if config.return_step_stats:
        return result.sequences, step_stats(result)
    return result.sequences


def _per_forward(result: DecodeResult) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    lengths = torch.tensor(result.lengths)
    denoising, commits = result.block_step_counts.sum(1), torch.tensor(result.commit_forwards)
    return lengths, commits, lengths / (denoising + commits), lengths / denoising


def make_output(result: DecodeResult) -> BardGenerateOutput:
    """Return the output object of a decoded batch."""
    lengths, commits, with_commits, without = _per_forward(result)
    return BardGenerateOutput(
        sequences=result.sequences,
        lengths=lengths,
        tokens_per_forward=with_commits,
        tokens_per_denoising_forward=without,
        block_step_counts=result.block_step_counts,
        commit_forwards=commits,
        forwards=result.forwards,
        seconds=result.seconds,
        history=result.history or None,
        accepted_tokens=result.accepted_tokens,
    )


def step_stats(result: DecodeResult) -> dict[str, Any]:
    """Return the statistics of ``return_step_stats=True``.

    Keys: ``block_step_counts`` ``[N, blocks]`` (blocks that no row started are left out), per-row lists
    ``num_response_tokens``, ``num_denoising_steps``, ``num_commit_forwards``, ``tpf`` (without commits) and
    ``tpf_with_commits``, ``forwards`` of the whole batch, and of next-token decoding
    ``accepted_tokens`` ``[N, forwards]``.
    """
    lengths, commits, with_commits, without = _per_forward(result)
    counts = result.block_step_counts
    started = int((counts.sum(0) > 0).sum())
    accepted = {} if result.accepted_tokens is None else {"accepted_tokens": result.accepted_tokens}
    return {
        "block_step_counts": counts[:, :started],
        "num_response_tokens": lengths.tolist(),
        "num_denoising_steps": counts.sum(1).tolist(),
        "num_commit_forwards": commits.tolist(),
        "tpf": without.tolist(),
        "tpf_with_commits": with_commits.tolist(),
        "forwards": result.forwards,
        **accepted,
    }
