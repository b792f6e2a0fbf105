# pyright: reportMissingImports=false
"""vLLM's server in front of a BARD model: bodies are looked at before vLLM does, addresses and large pictures are refused."""

from __future__ import annotations

import os
from typing import Any

from nemo_bard.base.errors import one_line
from nemo_bard.serving.limits import MAX_PIXELS, NOWHERE, PIXELS_VARIABLE
from nemo_bard.serving.vllm.config import is_bard
from nemo_bard.serving.vllm.shapes import check_shapes
from nemo_bard.upstream.vllm import add_body_check


def guard_server(model_config: Any) -> None:
    """Give a server of a BARD model its limits, where nobody has set any, and the check of its requests' bodies.

    Args:
        model_config: vLLM's. Where ``--allowed-media-domains`` is not given, no address is fetched, and without
            ``VLLM_MAX_IMAGE_PIXELS`` a picture has at most ``MAX_PIXELS``.
    """
    if not is_bard(model_config):
        return
    if model_config.allowed_media_domains is None:
        model_config.allowed_media_domains = [NOWHERE]
    os.environ.setdefault(PIXELS_VARIABLE, str(MAX_PIXELS))
    add_body_check(refuse_body, is_bard)


def refuse_body(body: Any) -> None:
    """``check_shapes`` with vLLM's error.

    Raises:
        VLLMValidationError: Which makes it a 400.
    """
    from vllm.exceptions import VLLMValidationError  # pyright: ignore[reportMissingImports]

    try:
        check_shapes(body)
    except ValueError as error:
        raise VLLMValidationError(one_line(error), parameter=getattr(error, "param", None)) from error
