"""What BARD is, in torch alone: layout, noise, losses."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BlockDiffusionCrossEntropy": "losses",
        "BlockDiffusionLoss": "losses",
        "DistillationLoss": "losses",
        "MixturePathKL": "losses",
        "MaskNoise": "noise",
        "MixedNoise": "noise",
        "UniformNoise": "noise",
        "attention_mask": "layout",
    },
)
