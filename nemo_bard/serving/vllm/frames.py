"""Which frames of a video file vLLM's server takes: those that ``generate`` takes."""

from __future__ import annotations

from typing import Any

SAMPLER = "qwen3_vl"
"""vLLM's counterpart of Qwen3-VL's sampling. By itself it does not take it for a checkpoint of ours, but 32 frames of every file."""
VLLM_DEFAULTS = {"fps": 2, "min_frames": 4, "max_frames": 768}
"""What that takes whatever the checkpoint's processor says."""


def fill_sampling(model_config: Any) -> None:
    """Let files be sampled as the checkpoint's video processor says, unless ``--media-io-kwargs`` says otherwise.

    Args:
        model_config: vLLM's; its ``media_io_kwargs`` get the sampler and what differs from ``VLLM_DEFAULTS``.
    """
    multimodal = model_config.multimodal_config
    if multimodal is None:
        return
    from transformers import AutoVideoProcessor

    try:
        processor = AutoVideoProcessor.from_pretrained(model_config.model, revision=model_config.revision or "main")
    except OSError:  # no file of a processor: vLLM fails, and says so, if it needs one
        return
    differs = {
        name: value
        for name, default in VLLM_DEFAULTS.items()
        if (value := getattr(processor, name, None)) not in (None, default)
    }
    given = multimodal.media_io_kwargs
    video = {"video_backend": SAMPLER, **differs, **given.get("video", {})}
    multimodal.media_io_kwargs = {**given, "video": video}
