"""Chains of stages: composed by Hydra, run in one job or stage by stage, resumable at any point.

``compose`` and ``plan`` turn a command line into a ``Job``, ``checks`` find what is wrong with it, ``manifest`` knows what
is finished, ``training`` and ``evaluation`` do a stage's work, and ``run.Pipeline`` is what a recipe YAML names.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nemo_bard.pipeline.run import Pipeline

__all__ = ["Pipeline"]


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name == "Pipeline":
        from nemo_bard.pipeline.run import Pipeline

        return Pipeline
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
