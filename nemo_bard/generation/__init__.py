"""Decoding, block by block."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BardGenerateOutput": "generate",
        "BardGenerationConfig": "settings",
    },
)
