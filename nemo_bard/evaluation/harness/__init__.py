"""lmms-eval's side: the model ``bard_vl`` for that harness, and the command that runs it.

Only ``model`` imports lmms-eval, and only lmms-eval imports ``model``.
"""

from __future__ import annotations

from typing import Any

MODEL_NAME = "bard_vl"
"""What ``lmms-eval --model`` takes."""


def manifest() -> Any:
    """Entry point of ``lmms_eval.models``: where the classes of ``bard_vl`` are.

    The second one, for ``--force_simple``, is there for tasks that ask for likelihoods: lmms-eval 0.7.3 has them for
    models with its simple interface alone.
    """
    from lmms_eval.models.registry_v2 import ModelManifest  # pyright: ignore[reportMissingImports]

    module = f"{__name__}.model"
    return ModelManifest(
        model_id=MODEL_NAME,
        chat_class_path=f"{module}.BardVL",
        simple_class_path=f"{module}.SimpleBardVL",
    )
