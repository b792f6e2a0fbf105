"""What BARD is, in torch alone: layout, noise, losses."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(
    __name__,
    {
        "BlockDiffusionCrossEntropy": "losses",
        "BlockDiffusionLoss": "losses",
        "DistillationLoss": "losses",
        "MixturePathKL": "losses",
        "NOISES": "noise",
        "MaskNoise": "noise",
        "MixedNoise": "noise",
        "Noise": "noise",
        "NoiseOutput": "noise",
        "UniformNoise": "noise",
        "BatchLoss": "objectives",
        "JointObjective": "objectives",
        "Objective": "objectives",
        "PBMObjective": "objectives",
        "SWDObjective": "objectives",
        "StepTotals": "objectives",
        "attention_mask": "layout",
    },
)
