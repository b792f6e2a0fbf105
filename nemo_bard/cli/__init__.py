"""Command line: ``nemo-bard COMMAND``, ``python -m nemo_bard.cli COMMAND`` and ``automodel finetune``."""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"automodel": "app", "main": "app"})
