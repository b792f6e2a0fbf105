"""Starting worker processes, here and through Slurm."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {})
