"""Chains of stages: composed by Hydra, run in one job or stage by stage, resumable at any point.

``compose`` and ``plan`` turn a command line into a ``Job``, ``checks`` find what is wrong with it, ``manifest`` knows what
is finished, ``training`` and ``evaluation`` do a stage's work, and ``run.Pipeline`` is what a recipe YAML names.
"""

from nemo_bard.base.lazy import lazy

__getattr__, __dir__, __all__ = lazy(__name__, {"Pipeline": "run"})
