"""The model: configuration, what differs from Qwen3-VL, attention backends."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BardGenerationConfig": "nemo_bard.generation.settings",
        "BardVLConfig": "configuration",
        "BardVLForConditionalGeneration": "modeling",
        "check_checkpoint_folder": "modeling",
    },
)
