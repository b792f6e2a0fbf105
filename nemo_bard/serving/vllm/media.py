# pyright: reportMissingImports=false
"""Pictures and videos of requests: whatever cannot be loaded is the client's mistake, and a 400."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from vllm.exceptions import VLLMClientError, VLLMValidationError
from vllm.multimodal.media import MediaConnector

from nemo_bard.base.errors import one_line, short


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
    """vLLM's, with ``refused`` around it."""

    def load_from_url(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """See ``MediaConnector``."""
        with refused(url):
            return super().load_from_url(url, *args, **kwargs)

    async def load_from_url_async(self, url: str, *args: Any, **kwargs: Any) -> Any:
        """See ``MediaConnector``."""
        with refused(url):
            return await super().load_from_url_async(url, *args, **kwargs)
