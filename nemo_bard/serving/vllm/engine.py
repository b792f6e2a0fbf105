# pyright: reportMissingImports=false
"""What a BARD model asks of vLLM's engine."""

from __future__ import annotations

from typing import Any

from vllm.config.diffusion import DiffusionConfig  # pyright: ignore[reportMissingImports]
from vllm.model_executor.models.config import VerifyAndUpdateConfig  # pyright: ignore[reportMissingImports]

from nemo_bard.serving.vllm.checks import check_room
from nemo_bard.serving.vllm.config import fill_defaults
from nemo_bard.serving.vllm.frames import fill_sampling

SCHEDULER = "nemo_bard.serving.vllm.scheduler.make_scheduler"


class EngineSettings(VerifyAndUpdateConfig):
    """Row of vLLM's ``MODELS_CONFIG_MAP``."""

    @staticmethod
    def verify_and_update_model_config(model_config: Any) -> None:
        """Check the checkpoint's configuration, read its decode settings and which frames it takes of a video."""
        hf_config = model_config.hf_config
        for name in ("block_size", "mask_token_id"):
            if getattr(hf_config, name) is None:
                raise ValueError(
                    f"config.json of {model_config.model} has no {name}; nemo-bard convert writes it, or give"
                    f" --hf-overrides '{{\"{name}\": N}}'"
                )
        fill_defaults(model_config)
        fill_sampling(model_config)
        given = hf_config.served_defaults["block_size"]
        if given not in (None, hf_config.block_size):
            raise ValueError(
                f"block_size {given} of the generation config differs from {hf_config.block_size} of config.json"
            )

    @staticmethod
    def verify_and_update_config(vllm_config: Any) -> None:
        """Set canvas, attention and scheduler.

        Raises:
            ValueError: For arguments of the engine that do not go with block diffusion.
        """
        model_config, scheduler = vllm_config.model_config, vllm_config.scheduler_config
        hf_config = model_config.hf_config
        if hf_config.served_defaults is None:
            EngineSettings.verify_and_update_model_config(model_config)
        check_room(
            hf_config.block_size,
            max_num_seqs=scheduler.max_num_seqs,
            max_num_batched_tokens=min(
                scheduler.max_num_batched_tokens, scheduler.max_num_scheduled_tokens or scheduler.max_num_batched_tokens
            ),
            long_prefill_token_threshold=scheduler.long_prefill_token_threshold,
        )
        if vllm_config.speculative_config is not None:
            raise ValueError("--speculative-config must be left out: BARD denoises whole blocks already")
        if vllm_config.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("--pipeline-parallel-size must be 1 for BARD; --tensor-parallel-size may be larger")
        if scheduler.scheduler_cls not in (None, SCHEDULER):
            raise ValueError(f"--scheduler-cls must be left out for BARD, got {scheduler.scheduler_cls}")
        vllm_config.diffusion_config = DiffusionConfig(canvas_length=hf_config.block_size)
        vllm_config.attention_config.use_non_causal = True
        pictures = model_config.multimodal_config
        if pictures is not None and pictures.mm_processor_cache_type == "lru":
            # with "lru" pictures are kept on both sides and sent once: a request that is refused behind the reading of
            # its pictures leaves the two sides different, and the next one with the same picture is a 500
            pictures.mm_processor_cache_type = "processor_only"
        scheduler.scheduler_cls = SCHEDULER
