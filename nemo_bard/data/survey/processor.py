"""What counts tokens: the processor and the configuration of a model folder, without its weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoProcessor

from nemo_bard.base.errors import one_line
from nemo_bard.base.folders import read_model_type, read_object
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.model.configuration import BardVLConfig

DEFAULT_BLOCK_SIZE = 4
"""Where neither the model nor the user says one: that of the published first stage."""


def load_collator(folder: Path, *, block_size: int | None = None, turns: str = "all") -> BlockDiffusionCollator:
    """Build what lays samples out as training does.

    Args:
        folder: A BARD checkpoint; a Qwen3-VL one with its published vocabulary does as well.
        block_size: Tokens per block; the model's if None, else ``DEFAULT_BLOCK_SIZE``.
        turns: See ``BlockDiffusionCollator``.

    Returns:
        The collator; its configuration has a block size.

    Raises:
        ValueError: If the folder holds no such model, or lacks a processor or a token id.
    """
    read_model_type(folder)
    values = read_object(folder / "config.json")
    values.pop("model_type")
    config = BardVLConfig.from_dict(values)
    config.block_size = block_size or config.block_size or DEFAULT_BLOCK_SIZE
    try:
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model folder {folder}: its processor cannot be read ({one_line(error)})") from error
    return BlockDiffusionCollator(processor, config, turns=turns)
