"""``generate``: settings resolved against the model, the call conventions of transformers, and the output object."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.generation.logits_process import LogitsProcessorList
from transformers.generation.stopping_criteria import StoppingCriteriaList
from transformers.utils import ModelOutput

from nemo_bard.generation.decode import Decoder, DecodeResult, DecodeSettings, Hooks, StepRecord
from nemo_bard.generation.prompt import PROMPT_KEYS, prepare_prompt
from nemo_bard.generation.settings import BardGenerationConfig, as_id_list, check_mask_token_id, unknown_key_error

if TYPE_CHECKING:
    from nemo_bard.model.modeling import BardVLForConditionalGeneration

logger = logging.getLogger(__name__)

NO_OPS: dict[str, Any] = {"do_sample": False, "num_beams": 1, "use_cache": True, "num_return_sequences": 1}
"""Arguments of transformers' autoregressive ``generate`` that people pass by habit; only these values mean nothing here."""


@dataclass
class BardGenerateOutput(ModelOutput):
    """What ``generate`` returns with ``return_dict_in_generate=True``.

    Attributes:
        sequences: Response ids, ``[N, longest]`` int64; the pad id after each row's end.
        lengths: Response tokens of each row, EOS included, ``[N]``.
        tokens_per_forward: Response tokens / (denoising + commit forwards) of each row, ``[N]`` float32.
        tokens_per_denoising_forward: Response tokens / denoising forwards of each row, ``[N]`` float32.
        block_step_counts: Denoising forwards per block, ``[N, blocks]``; 0 where a block was not started.
        commit_forwards: Forwards of each row that only committed a block, ``[N]``.
        forwards: Forwards of the language model for the whole batch, the prompt's included.
        seconds: Wall-clock seconds of ``vision``, ``prefill`` (prompt and first step) and ``decode``.
        history: One ``StepRecord`` per step with ``output_history=True``.
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


def resolve_settings(model: BardVLForConditionalGeneration, config: BardGenerationConfig) -> DecodeSettings:
    """Fill what a generation config leaves open from the model's configuration.

    Raises:
        ValueError: If neither names a block size or a mask id, or the mask id is not a row of the embedding.
    """
    model_config = model.config
    trained = getattr(model_config, "block_size", None)
    block_size = config.block_size if config.block_size is not None else trained
    if block_size is None:
        raise ValueError("block_size is set neither in the call nor in the model's config.json; pass block_size=")
    if trained is not None and block_size != trained:
        warnings.warn(
            f"block_size={block_size} differs from {trained}, which this checkpoint was trained with", stacklevel=4
        )
    mask_token_id = config.mask_token_id if config.mask_token_id is not None else model_config.mask_token_id
    if mask_token_id is None:
        raise ValueError("mask_token_id is set neither in the call nor in the model's config.json; pass mask_token_id=")
    check_mask_token_id(mask_token_id, model_config.text_config.vocab_size)
    for name, token in (
        ("image_token_id", model_config.image_token_id),
        ("video_token_id", model_config.video_token_id),
    ):
        if mask_token_id == token:
            raise ValueError(f"mask_token_id {mask_token_id} is the model's {name}; choose a row that no text uses")
    end_ids = as_id_list(config.eos_token_id) or model_config.end_ids
    if mask_token_id in end_ids:
        raise ValueError(f"mask_token_id {mask_token_id} is also an eos_token_id; they must differ")
    pad = config.pad_token_id
    if pad is None:
        pad = end_ids[0] if end_ids else mask_token_id
    vocab_size = model_config.text_config.vocab_size
    for name, ids in (("eos_token_id", end_ids), ("pad_token_id", [pad])):
        if max(ids, default=0) >= vocab_size:
            raise ValueError(f"{name} {max(ids)} is outside the vocabulary, 0 to {vocab_size - 1}")
    on_cuda = model.get_input_embeddings().weight.is_cuda
    implementation = config.cache_implementation or ("static" if on_cuda else "dynamic")
    return DecodeSettings(
        block_size=block_size,
        denoising_steps=min(config.denoising_steps or block_size, block_size),
        max_new_tokens=config.max_new_tokens,
        remasking_strategy=config.remasking_strategy,
        confidence_threshold=config.confidence_threshold,
        entropy_bound=config.entropy_bound,
        edit_threshold=config.edit_threshold,
        max_post_edit_steps=config.max_post_edit_steps,
        temperature=float(config.temperature),
        top_k=config.top_k,
        top_p=config.top_p,
        suppress_mask_token=config.suppress_mask_token,
        mask_token_id=mask_token_id,
        end_ids=tuple(end_ids),
        pad_token_id=pad,
        context_attention=model_config.context_attention,
        static_cache=implementation == "static",
        compile_step=implementation == "static" and (on_cuda if config.compile_step is None else config.compile_step),
        output_history=config.output_history,
    )


def split_arguments(inputs: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Separate prompt tensors from generation settings.

    Args:
        inputs: What the processor returned (a mapping), ``input_ids``, or None.
        kwargs: Keyword arguments of the call.

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
                raise unknown_key_error("model input", name, list(PROMPT_KEYS))
    elif inputs is not None:
        raise ValueError(
            f"the first argument of generate must be a processor's output or input_ids, got {type(inputs).__name__}"
        )
    settings = {}
    for name, value in kwargs.items():
        if name in PROMPT_KEYS:
            if name in prompt:
                raise ValueError(f"{name} is given twice")
            prompt[name] = value
        elif name in BardGenerationConfig.known_keys():
            settings[name] = value
        elif name in NO_OPS:
            if value is not None and value != NO_OPS[name]:
                hint = "; use temperature > 0 to draw tokens" if name == "do_sample" else ""
                raise ValueError(f"{name} must be {NO_OPS[name]}, got {value!r}{hint}")
        else:
            raise unknown_key_error("argument of generate", name, [*BardGenerationConfig.known_keys(), *PROMPT_KEYS])
    if prompt.get("input_ids") is None:
        raise ValueError("generate needs input_ids; pass what the processor returned")
    return {k: v for k, v in prompt.items() if v is not None}, settings


def generate(
    model: BardVLForConditionalGeneration,
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
    prompt_tensors, overrides = split_arguments(inputs, kwargs)
    base = generation_config if generation_config is not None else model.generation_config
    if not isinstance(base, BardGenerationConfig):
        raise ValueError(f"generation_config must be a BardGenerationConfig, got {type(base).__name__}")
    config = base.updated(**overrides)
    settings = resolve_settings(model, config)
    prompt = prepare_prompt(
        model,
        prompt_tensors,
        block_size=settings.block_size,
        max_new_tokens=settings.max_new_tokens,
        end_ids=list(settings.end_ids),
        pad_token_id=settings.pad_token_id,
    )
    rows = prompt.input_ids.shape[0]
    hooks = Hooks()
    if logits_processor:
        hooks.logits_processor = logits_processor
    if stopping_criteria:
        hooks.stopping_criteria = stopping_criteria
    if streamer is not None:
        if rows != 1:
            raise ValueError(f"a streamer takes a batch of one, got {rows} rows")
        streamer.put(prompt.input_ids.cpu())
        hooks.on_block = lambda ids: streamer.put(ids.cpu())
        if hasattr(streamer, "put_draft"):
            hooks.on_draft = lambda ids: streamer.put_draft(ids.cpu())
    was_training = model.training
    model.eval()
    try:
        result = Decoder(
            model,
            prompt,
            settings,
            plain=config.decode_path == "plain",
            hooks=hooks,
            generator=generator,
            synchronize=config.return_dict_in_generate,
        ).run()
    finally:
        model.train(was_training)
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
    )


def step_stats(result: DecodeResult) -> dict[str, Any]:
    """Return the statistics of ``return_step_stats=True``.

    Keys: ``block_step_counts`` ``[N, blocks]`` (blocks that no row started are left out), per-row lists
    ``num_response_tokens``, ``num_denoising_steps``, ``num_commit_forwards``, ``tpf`` (without commits) and
    ``tpf_with_commits``, and ``forwards`` of the whole batch.
    """
    lengths, commits, with_commits, without = _per_forward(result)
    counts = result.block_step_counts
    started = int((counts.sum(0) > 0).sum())
    return {
        "block_step_counts": counts[:, :started],
        "num_response_tokens": lengths.tolist(),
        "num_denoising_steps": counts.sum(1).tolist(),
        "num_commit_forwards": commits.tolist(),
        "tpf": without.tolist(),
        "tpf_with_commits": with_commits.tolist(),
        "forwards": result.forwards,
    }
