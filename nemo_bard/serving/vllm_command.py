"""The command that serves a checkpoint with vLLM's own server."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

from nemo_bard.serving.limits import NOWHERE, PUBLIC


def has_vllm() -> bool:
    """Whether vLLM is installed here; imports nothing."""
    return importlib.util.find_spec("vllm") is not None


def vllm_command(
    folder: Path, *, host: str, port: int, name: str, allow_urls: bool, extra: Sequence[str] = ()
) -> list[str]:
    """Arguments of ``python -m vllm.entrypoints.openai.api_server``.

    Args:
        folder: A BARD checkpoint.
        host: Address to listen at.
        port: Its port.
        name: Name of the model in requests.
        allow_urls: Whether images may be fetched from public addresses; else only data: URLs are taken.
        extra: Further arguments of vLLM, which win over ours.

    Returns:
        The command, this Python first.
    """
    own = {"--host": host, "--port": str(port), "--served-model-name": name}
    own["--allowed-media-domains"] = PUBLIC if allow_urls else NOWHERE
    given = {word.partition("=")[0].replace("_", "-") for word in extra if word.startswith("--")}
    arguments = [word for flag, value in own.items() if flag not in given for word in (flag, value)]
    module = "vllm.entrypoints.openai.api_server"
    return [sys.executable, "-m", module, "--model", str(folder), *arguments, *extra]
