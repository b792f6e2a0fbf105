"""Decoding, block by block."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "ENGINES": "parameters",
        "STRATEGIES": "parameters",
        "BardGenerateOutput": "entry",
        "BardGenerationConfig": "settings",
        "BlockEngine": "engines",
        "Engine": "engines",
        "Session": "session",
        "StepState": "strategies",
        "Strategy": "strategies",
        "generate": "entry",
    },
)
