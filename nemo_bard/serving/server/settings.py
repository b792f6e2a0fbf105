"""What the local server can be told."""

from __future__ import annotations

import os
from dataclasses import dataclass

from nemo_bard.base.settings import Check, check_settings, flag, integer, number, setting, text
from nemo_bard.serving.limits import MAX_PIXELS

KEY_VARIABLE = "NEMO_BARD_API_KEY"
"""Where the API key may be, so that it is not among the processes' arguments."""


def _is_port(value: object) -> bool:
    return type(value) is int and 0 <= value <= 65535


PORT = Check("a port, 0 to 65535", _is_port, int, "N")


@dataclass(frozen=True, kw_only=True)
class ServerSettings:
    """Address and limits of the local server.

    Raises:
        ValueError: For a value that is not allowed; names it and what is.
    """

    host: str = setting("127.0.0.1", text(), "address to listen at; 0.0.0.0 is every network, then set an API key")
    port: int = setting(8000, PORT, "0 takes a free one")
    served_model_name: str | None = setting(None, text(optional=True), "name in requests; the folder's if not given")
    max_queue: int = setting(8, integer(0), "requests that may wait; more get 429")
    max_pixels: int = setting(
        MAX_PIXELS, integer(1), "most pixels of all images of a request together; with vLLM: of each image"
    )
    max_images: int = setting(16, integer(0), "most images of a request")
    max_tokens: int = setting(2048, integer(1), "most response tokens of a request")
    max_prompt_tokens: int = setting(16384, integer(1), "most prompt tokens of a request, images included")
    max_body: int = setting(33_554_432, integer(1), "most bytes of a request")
    api_key: str | None = setting(
        None, text(optional=True), f"demand this key as bearer token; {KEY_VARIABLE} is read too, and not shown by ps"
    )
    allow_urls: bool = setting(False, flag(), "fetch images from public http addresses that requests name")
    stall_seconds: float = setting(30.0, number(0.1), "how long a client may send or read nothing before it is left")
    grace_seconds: float = setting(30.0, number(), "how long running requests may go on after SIGTERM")

    def __post_init__(self) -> None:
        check_settings(self)


def key_from_environment(given: str | None) -> str | None:
    """The API key: the one given, or that of the environment."""
    return given if given is not None else os.environ.get(KEY_VARIABLE) or None
