# pyright: reportMissingImports=false
"""Pictures and videos of requests: whatever cannot be loaded is the client's mistake, and a 400."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError  # pyright: ignore[reportMissingImports]
from vllm.multimodal.media import MediaConnector  # pyright: ignore[reportMissingImports]

from nemo_bard.base.errors import one_line, short
from nemo_bard.serving.limits import NOWHERE, PUBLIC
from nemo_bard.serving.server.fetch import SECONDS, fetch

MAX_BYTES = 33_554_432
"""Of a file from an address, where vLLM has no limit of its own."""


@contextmanager
def refused(url: str) -> Iterator[None]:
    """Turn what loading ``url`` raises inside into an error of the client.

    vLLM 0.32 makes a 500 of a picture with too many pixels for Pillow, of a server that does not answer and of a local file,
    and a 501 of a data URL without base64.

    Raises:
        VLLMValidationError: For everything that is not such an error already.
    """
    try:
        yield
    except (VLLMClientError, ValueError):
        raise
    except Exception as error:
        raise VLLMValidationError(f"{short(url)} cannot be loaded: {one_line(error)}", parameter="messages") from error


class CheckedMediaConnector(MediaConnector):
    """vLLM's, with ``refused`` around it, and two further words for allowed domains: ``NOWHERE`` and ``PUBLIC``."""

    def load_from_url(self, url: str, media_io: Any, *, fetch_timeout: float | None = None) -> Any:
        """See ``MediaConnector``."""
        with refused(url):
            if self._is_ours(url):
                return self._fetch(url, media_io, fetch_timeout)
            return super().load_from_url(url, media_io, fetch_timeout=fetch_timeout)

    async def load_from_url_async(self, url: str, media_io: Any, *, fetch_timeout: float | None = None) -> Any:
        """See ``MediaConnector``."""
        with refused(url):
            if self._is_ours(url):
                return await asyncio.to_thread(self._fetch, url, media_io, fetch_timeout)
            return await super().load_from_url_async(url, media_io, fetch_timeout=fetch_timeout)

    def _is_ours(self, url: str) -> bool:
        """Whether ``url`` is fetched here and not by vLLM; raises if nothing is fetched at all."""
        if not url[:8].lower().startswith(("http://", "https://")):
            return False
        if list(self.allowed_media_domains) == [NOWHERE]:
            raise VLLMValidationError(
                f"this server fetches no addresses (--allowed-media-domains), send a data: URL; got {short(url)}",
                parameter="messages",
            )
        return PUBLIC in self.allowed_media_domains

    @staticmethod
    def _fetch(url: str, media_io: Any, seconds: float | None) -> Any:
        data = fetch(url, max_bytes=media_io.get_max_bytes() or MAX_BYTES, seconds=seconds or SECONDS, name="media")
        return media_io.load_bytes(data)
