"""``BardVLForConditionalGeneration``, on NeMo AutoModel's class: what trains and decodes with this package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from nemo_automodel.components.models.qwen3_vl.model import Qwen3VLForConditionalGeneration
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor

from nemo_bard.base.folders import read_model_type
from nemo_bard.model import bard
from nemo_bard.model.configuration import BardVLConfig


class BardVLForConditionalGeneration(  # pyright: ignore[reportIncompatibleVariableOverride, reportIncompatibleMethodOverride]
    bard.BardVLForConditionalGeneration, Qwen3VLForConditionalGeneration
):
    """Qwen3-VL trained and decoded as a block-diffusion model (BARD, arXiv 2604.16514).

    ``from_pretrained`` loads a Qwen3-VL checkpoint, a released Bard-VL checkpoint (transformers 4.57) and what
    nemo_bard's training exports. The attention pattern is the caller's: pass a 4-D bool ``attention_mask`` (see
    ``nemo_bard.method.layout``) and ``position_ids``; ``generate`` does so itself.
    """

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Tie as transformers does, which also knows that a tied weight is not missing from a checkpoint."""
        PreTrainedModel.tie_weights(self, *args, **kwargs)
        super().tie_weights()

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """Save as transformers does; with ``checkpointer=`` (AutoModel's training), as AutoModel does."""
        if args or kwargs.get("checkpointer") is not None:
            super().save_pretrained(os.fspath(save_directory), *args, **kwargs)
        else:
            kwargs.pop("checkpointer", None)
            PreTrainedModel.save_pretrained(self, save_directory, **kwargs)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike,
        *args: Any,
        **kwargs: Any,
    ) -> BardVLForConditionalGeneration:
        """Load a Qwen3-VL, released Bard-VL or exported checkpoint; arguments as in transformers.

        Raises:
            ValueError: If the folder has no ``config.json`` or holds another architecture.
        """
        check_checkpoint_folder(pretrained_model_name_or_path)
        return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)


def check_checkpoint_folder(path: str | os.PathLike) -> None:
    """Raise ValueError if ``path`` is a local folder that holds no Qwen3-VL or Bard-VL checkpoint; hub ids pass."""
    if Path(path).is_dir():
        read_model_type(Path(path))


AutoConfig.register(BardVLConfig.model_type, BardVLConfig, exist_ok=True)
AutoModelForImageTextToText.register(BardVLConfig, BardVLForConditionalGeneration, exist_ok=True)
AutoProcessor.register(BardVLConfig, Qwen3VLProcessor, exist_ok=True)
