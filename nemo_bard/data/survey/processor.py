"""What counts tokens: the processor and the configuration of a model folder, without its weights."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import hf_hub_download
from transformers import AutoProcessor

from nemo_bard.base.errors import one_line
from nemo_bard.base.folders import read_model_type, read_object
from nemo_bard.data.collate import BlockDiffusionCollator
from nemo_bard.data.raw.hub import is_hub_name
from nemo_bard.model.configuration import BardVLConfig

DEFAULT_BLOCK_SIZE = 4
"""Where neither the model nor the user says one: that of the published first stage."""


def load_collator(model: str | Path, *, block_size: int | None = None, turns: str = "all") -> BlockDiffusionCollator:
    """Build what lays samples out as training does.

    Args:
        model: Folder or hub name of a BARD checkpoint; a Qwen3-VL one with its published vocabulary does as well.
        block_size: Tokens per block; the model's if None, else ``DEFAULT_BLOCK_SIZE``.
        turns: See ``BlockDiffusionCollator``.

    Returns:
        The collator; its configuration has a block size.

    Raises:
        ValueError: If there is no such model, or it lacks a processor or a token id.
    """
    folder = Path(model)
    if not folder.exists() and is_hub_name(str(model)):
        folder = _of_hub(str(model))
    read_model_type(folder)
    values = read_object(folder / "config.json")
    values.pop("model_type")
    config = BardVLConfig.from_dict(values)
    config.block_size = block_size or config.block_size or DEFAULT_BLOCK_SIZE
    try:
        processor = AutoProcessor.from_pretrained(model, local_files_only=folder == Path(model))
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"model {model}: its processor cannot be read ({one_line(error)})") from error
    return BlockDiffusionCollator(processor, config, turns=turns)


def _of_hub(name: str) -> Path:
    """The folder of the local copy of a model's configuration, fetched where the network allows."""
    try:
        return Path(hf_hub_download(name, "config.json")).parent
    except (OSError, ValueError) as error:
        raise ValueError(f"model {name} is no folder, and cannot be read from the hub ({one_line(error)})") from error
