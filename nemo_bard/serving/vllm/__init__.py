"""The plugin of vLLM: BARD on stock vLLM, through its path for diffusion models. Imports neither nemo_automodel nor training.

vLLM calls ``register`` in every process (entry point ``vllm.general_plugins``). ``config`` is what a model asks of the
engine, ``checks`` what a request may ask, ``scheduler`` and ``edges`` make chunks of a prompt end where blocks end,
``state`` is the attention of a batch, ``sampler`` denoises, ``rules`` are the settings of requests, ``media`` loads
pictures and videos, ``frames`` says which frames of a video, ``server`` and ``shapes`` guard vLLM's server.
"""

from __future__ import annotations

import logging

from nemo_bard.base.names import MODEL_CLASS, MODEL_TYPE
from nemo_bard.upstream.vllm import installed_version, is_supported, unsupported

logger = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM about BARD; may be called again. With another vLLM than the one it is written for, only BARD fails, in one line."""
    from transformers import AutoConfig

    from nemo_bard.serving.vllm.config import RefusedConfig, ServedBardVLConfig

    version = installed_version() or "unknown"
    if not is_supported(version):
        logger.warning("%s", unsupported(version))
        AutoConfig.register(MODEL_TYPE, RefusedConfig, exist_ok=True)
        return
    from vllm.model_executor.models import ModelRegistry  # pyright: ignore[reportMissingImports]
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP  # pyright: ignore[reportMissingImports]
    from vllm.multimodal.media import MEDIA_CONNECTOR_REGISTRY  # pyright: ignore[reportMissingImports]

    from nemo_bard.serving.vllm.checks import check_batch, check_prompt, check_request
    from nemo_bard.serving.vllm.engine import EngineSettings
    from nemo_bard.serving.vllm.media import CheckedMediaConnector
    from nemo_bard.serving.vllm.server import guard_server
    from nemo_bard.upstream.vllm import wrap_batch_defaults, wrap_prompt_check, wrap_request_check

    AutoConfig.register(MODEL_TYPE, ServedBardVLConfig, exist_ok=True)
    ModelRegistry.register_model(MODEL_CLASS, f"nemo_bard.serving.vllm.model:{MODEL_CLASS}")
    MODELS_CONFIG_MAP[MODEL_CLASS] = EngineSettings
    MEDIA_CONNECTOR_REGISTRY.register("http")(CheckedMediaConnector)
    wrap_request_check(check_request)
    wrap_prompt_check(check_prompt)
    wrap_batch_defaults(check_batch, guard_server)
