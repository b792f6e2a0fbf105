# pyright: reportMissingImports=false
"""What a request may ask, and what room an engine must have: checked in the API process, before anything reaches the engine."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from nemo_bard.base.errors import not_one_of, one_line
from nemo_bard.base.names import mask_in_prompt
from nemo_bard.generation.parameters import STRATEGIES, denoising_strategies
from nemo_bard.serving.requests import SEED, BadRequest, check_seed, check_temperature, check_xargs
from nemo_bard.serving.vllm.config import end_ids, is_bard

logger = logging.getLogger(__name__)

VLLM_OWN = ("kv_transfer_params", "ec_transfer_params")
"""Keys that vLLM itself puts among the extra arguments."""
LOGPROBS = ("logprobs", "prompt_logprobs", "logprob_token_ids", "prompt_logprob_token_ids")
NEUTRAL = {"presence_penalty": 0.0, "frequency_penalty": 0.0, "repetition_penalty": 1.0, "min_p": 0.0, "min_tokens": 0}
"""Sampling parameters that BARD does not have: the only values that are taken."""
ABSENT = ("logit_bias", "bad_words", "allowed_token_ids")


def check_request(params: Any, model_config: Any, inner: Callable[[], None]) -> None:
    """Check a request to a BARD model; those of other models are vLLM's matter.

    Args:
        params: ``SamplingParams``. Its ``extra_args`` become the checked settings, and the model's end ids are added to its
            stop ids.
        model_config: vLLM's.
        inner: vLLM's own check.

    Raises:
        VLLMValidationError: For a key or a value that is not allowed, which makes it a 400.
    """
    if not is_bard(model_config):
        inner()
        return
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    try:
        _check(params, model_config.hf_config)
    except ValueError as error:
        parameter = getattr(error, "param", None)
        raise VLLMValidationError(one_line(error), parameter=parameter or "vllm_xargs") from error
    temperature, seed = params.temperature, params.seed
    params.temperature, params.seed = 1.0, None  # what vLLM insists on; our sampler reads the real ones
    try:
        inner()
    finally:
        params.temperature, params.seed = temperature, seed


def _check(params: Any, hf_config: Any) -> None:
    for name in LOGPROBS:
        if getattr(params, name, None) is not None:
            raise BadRequest(f"{name} is not supported: a block of tokens is denoised together", name)
    for name, value in NEUTRAL.items():
        if getattr(params, name) != value:
            raise BadRequest(f"{name} is not supported: it must be {value:g}, got {getattr(params, name):g}", name)
    for name in ABSENT:
        if getattr(params, name, None):
            raise BadRequest(f"{name} is not supported; leave it out", name)
    check_temperature(params.temperature)
    if params.seed is not None:
        check_seed(params.seed)
    given = params.extra_args or {}
    own = {name: value for name, value in given.items() if name in VLLM_OWN}
    asked = {name: value for name, value in given.items() if name not in VLLM_OWN}
    defaults = hf_config.served_defaults
    settings = check_xargs(asked, block_size=hf_config.block_size, defaults=defaults)
    strategy = settings.get("remasking_strategy")
    if strategy is not None and STRATEGIES.get(strategy).by_next_token:
        raise not_one_of("vllm_xargs.remasking_strategy", strategy, denoising_strategies())
    if params.n > 1:
        temperature = settings.get("temperature", params.temperature)
        if temperature == 0 or SEED in settings:
            what = "temperature 0" if temperature == 0 else "seed in vllm_xargs"
            raise ValueError(f"n must be 1 with {what}, where all answers are the same, got {params.n}")
    if given:
        params.extra_args = {**own, **settings}
    ends, _ = end_ids(hf_config, defaults)
    if not ends:
        params.ignore_eos = True
    if not params.ignore_eos:
        _stop_at(params, ends)


def _stop_at(params: Any, ends: list[int]) -> None:
    """Add the ends of ``config.json``: vLLM knows the end of the tokenizer and of ``generation_config.json``."""
    params.stop_token_ids = sorted({*(params.stop_token_ids or ()), *ends})
    params.all_stop_token_ids.update(ends)


def check_prompt(ids: Sequence[int] | None, model_config: Any) -> None:
    """Check the tokens of a prompt for a BARD model; those of other models are vLLM's matter.

    Args:
        ids: Its tokens; None where it has none.
        model_config: vLLM's.

    Raises:
        VLLMValidationError: If it holds the mask token, which makes it a 400.
    """
    if ids is None or not is_bard(model_config) or model_config.hf_config.mask_token_id not in ids:
        return
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    raise VLLMValidationError(mask_in_prompt(model_config.hf_config.mask_token_id), parameter="prompt")


def check_batch(arguments: Any, model_config: Any, inner: Callable[[], None]) -> None:
    """Fill in how many requests and tokens a step may have, so that every request has its block.

    Args:
        arguments: ``EngineArgs``; what is None is filled in.
        model_config: vLLM's.
        inner: vLLM's own function.

    Raises:
        ValueError: If what was given leaves no room.
    """
    seqs, tokens = arguments.max_num_seqs, arguments.max_num_batched_tokens
    inner()
    if not is_bard(model_config):
        return
    block_size = model_config.hf_config.block_size
    if tokens is None:
        arguments.max_num_batched_tokens = max(arguments.max_num_batched_tokens, (seqs or 1) * block_size)
    if seqs is None:
        most = max(arguments.max_num_batched_tokens // block_size, 1)
        if most < arguments.max_num_seqs:
            logger.info("max_num_seqs is %d: %d blocks of %d fit into a step", most, most, block_size)
        arguments.max_num_seqs = min(arguments.max_num_seqs, most)
    check_room(
        block_size,
        max_num_seqs=arguments.max_num_seqs,
        max_num_batched_tokens=arguments.max_num_batched_tokens,
        long_prefill_token_threshold=arguments.long_prefill_token_threshold,
    )


def check_room(
    block_size: int, *, max_num_seqs: int, max_num_batched_tokens: int, long_prefill_token_threshold: int
) -> None:
    """Raise ValueError unless a step holds the block of every request, and a chunk of a prompt holds one."""
    need = max_num_seqs * block_size
    if max_num_batched_tokens < need:
        fit = max_num_batched_tokens // block_size
        less = f" or lower max_num_seqs to {fit}" if fit else ""
        raise ValueError(
            f"max_num_batched_tokens must be at least max_num_seqs x block size = {max_num_seqs} x {block_size} = {need},"
            f" got {max_num_batched_tokens}; raise it{less}"
        )
    if 0 < long_prefill_token_threshold < block_size:
        raise ValueError(
            f"long_prefill_token_threshold must be 0 or at least the block size {block_size},"
            f" got {long_prefill_token_threshold}"
        )
