"""``convert``: makes a BARD start point from a Qwen3-VL or a Bard-VL checkpoint.

NeMo AutoModel picks the model class by the ``architectures`` of the folder's ``config.json``, and BARD keeps Qwen3-VL's
weights as they are. So only ``config.json``, ``generation_config.json`` and the name of the mask token in the tokenizer are
written anew; weights are hard-linked, or copied file by file where the file system cannot, and are never loaded.
"""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bard.base.files import link_or_copy, write_whole
from nemo_bard.base.folders import CONFIG
from nemo_bard.base.names import MODEL_CLASS, MODEL_TYPE
from nemo_bard.checkpoints.folder import (
    WEIGHTS_INDEX,
    check_target,
    copy_companions,
    read_object,
    weight_files,
)
from nemo_bard.checkpoints.hub import find_checkpoint
from nemo_bard.checkpoints.mask_token import choose_mask_token_id, name_mask_token
from nemo_bard.checkpoints.source import (
    TokenizerFacts,
    embedding_rows,
    read_source_config,
    read_tokenizer,
    special_ids_of,
)
from nemo_bard.method.layout import check_block_size, check_context_attention

GENERATION_CONFIG = "generation_config.json"
FIRST_BLOCK_SIZE = 4
"""Of a start point that is made of a Qwen3-VL folder, if nobody says another."""


class ConvertReport(NamedTuple):
    """What ``convert`` wrote; ``str`` gives text for people."""

    target: Path
    block_size: int
    mask_token_id: int
    context_attention: str
    linked: int
    copied: int
    left_out: list[str]
    mask_token: str | None = None
    """Name of the mask token in the tokenizer, None if it has none."""
    notes: tuple[str, ...] = ()
    """What the user should know of this conversion, one line each."""

    def __str__(self) -> str:
        name = self.mask_token or "without a name in the tokenizer"
        lines = [
            f"wrote {self.target}: {MODEL_CLASS}, block size {self.block_size}, mask token {self.mask_token_id} ({name}), "
            f"context attention {self.context_attention}",
            f"weight files: {self.linked} hard-linked, {self.copied} copied",
            *self.notes,
        ]
        if self.left_out:
            lines.append(f"not taken over: {', '.join(self.left_out)}")
        return "\n".join(lines)


def convert(
    source: str | Path,
    target: str | Path,
    *,
    block_size: int | None = None,
    mask_token_id: int | None = None,
    context_attention: str | None = None,
    overwrite: bool = False,
) -> ConvertReport:
    """Write a BARD start point made of the checkpoint in ``source`` to the folder ``target``.

    Everything is checked and written to a folder beside ``target`` first, which is then renamed: ``target`` appears whole
    or not at all.

    Args:
        source: Folder with ``config.json``, a tokenizer and safetensors weights (one file, or shards with an index), or a
            Hugging Face name (``org/name``, ``org/name@revision``) in the cache or, where the network allows, to download. A
            Qwen3-VL checkpoint, a released Bard-VL one, or a BARD folder.
        target: Folder to make.
        block_size: Tokens denoised together, >= 1. If None, 4 for a Qwen3-VL checkpoint, else that of the source.
        mask_token_id: Row of the embedding that becomes the mask token. If None, 151671 where the vocabulary allows it, else
            the first row above the tokenizer's last id; that of the source if it is a Bard-VL one.
        context_attention: ``block`` or ``causal``. If None, ``block`` for a Qwen3-VL checkpoint, else that of the source.
        overwrite: Replace ``target`` if it is a BARD checkpoint or an empty folder.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If ``source``, its ``config.json`` or a weight file is missing.
        FileExistsError: If ``target`` exists and may not be replaced.
        ValueError: If ``source`` is neither a Qwen3-VL nor a Bard-VL checkpoint or cannot be downloaded, a weight file is
            damaged, or an argument is not allowed.
    """
    if block_size is not None:
        check_block_size(block_size)
    if context_attention is not None:
        check_context_attention(context_attention)
    source, target = find_checkpoint("SRC", source, check=read_source_config), Path(target)
    config = read_source_config(source)
    check_target(source, target, overwrite=overwrite)
    shards = weight_files(source)
    rows = embedding_rows(source, shards, config)
    trained = trained_values(source, config)
    tokenizer = read_tokenizer(source, mask_token_id=trained.get("mask_token_id"))
    wanted = {"block_size": block_size, "mask_token_id": mask_token_id, "context_attention": context_attention}
    values, notes = bard_values(source, trained, wanted)
    mask_token_id = choose_mask_token_id(values["mask_token_id"], rows, tokenizer.ids | special_ids_of(config))
    fill_config(config, {**values, "mask_token_id": mask_token_id}, tokenizer)
    taken = {CONFIG, GENERATION_CONFIG, WEIGHTS_INDEX, *shards}
    with write_whole(target) as folder:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        keep = trained.get("block_size") in (None, values["block_size"])
        notes += write_generation_config(source, folder, keep=bool(trained) and keep)
        taken |= copy_companions(source, folder)
        name = name_mask_token(folder, tokenizer.tokenizer, mask_token_id)
        linked = sum(link_or_copy(source / shard, folder / shard) for shard in shards)
        if (source / WEIGHTS_INDEX).is_file():
            shutil.copyfile(source / WEIGHTS_INDEX, folder / WEIGHTS_INDEX)
        check_loads(folder)
    left_out = sorted(path.name for path in source.iterdir() if path.name not in taken)
    return ConvertReport(
        target,
        values["block_size"],
        mask_token_id,
        values["context_attention"],
        linked,
        len(shards) - linked,
        left_out,
        name,
        tuple(notes),
    )


def trained_values(source: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return what a Bard-VL checkpoint was trained with, as its class reads it; nothing for a Qwen3-VL one.

    Raises:
        ValueError: If its class refuses the configuration, or a token id is missing that it cannot know.
    """
    if config["model_type"] != MODEL_TYPE:
        return {}
    from nemo_bard.model.configuration import BardVLConfig

    values = copy.deepcopy(config)  # transformers changes the sections
    values.pop("model_type")
    read = BardVLConfig.from_dict(values)
    return {
        "block_size": read.block_size,
        "mask_token_id": read.mask_token_id,
        "context_attention": read.context_attention,
        "assistant_header_ids": read.assistant_header_ids,
        "eos_token_id": read.eos_token_id,
    }


def bard_values(source: Path, trained: dict[str, Any], wanted: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return BARD's fields of ``config.json`` as far as they are known, and what to tell the user about them.

    Args:
        source: For messages.
        trained: What ``trained_values`` returned.
        wanted: ``block_size``, ``mask_token_id`` and ``context_attention`` as the user gave them, None for those left out.

    Raises:
        ValueError: If a Bard-VL checkpoint does not say what has to be known, or another mask token is asked for.
    """
    if not trained:
        defaults = {"block_size": FIRST_BLOCK_SIZE, "context_attention": "block"}
        return {
            **defaults,
            **{key: value for key, value in wanted.items() if value is not None or key not in defaults},
        }, []
    for key, flag in (("block_size", "--block-size"), ("mask_token_id", "--mask-token-id")):
        if trained[key] is None and wanted[key] is None:
            raise ValueError(f"{source / CONFIG}: has no {key}; give the one that SRC was trained with ({flag} N)")
    if None not in (trained["mask_token_id"], wanted["mask_token_id"]) and (
        trained["mask_token_id"] != wanted["mask_token_id"]
    ):
        raise ValueError(
            f"mask_token_id {wanted['mask_token_id']}: SRC was trained with {trained['mask_token_id']}; leave it out"
        )
    notes = []
    for key, what in (
        ("block_size", "train the next stage with it before decoding"),
        ("context_attention", "its context was trained otherwise, so it has to be trained on before decoding"),
    ):
        if wanted[key] is not None and trained[key] not in (None, wanted[key]):
            notes.append(f"{key} changed from {trained[key]} to {wanted[key]}: {what}")
    return {**trained, **{key: value for key, value in wanted.items() if value is not None}}, notes


def fill_config(config: dict[str, Any], values: dict[str, Any], tokenizer: TokenizerFacts) -> None:
    """Make a BARD configuration of that of the source, in place."""
    header, end = values.get("assistant_header_ids"), values.get("eos_token_id")
    config.update(
        model_type=MODEL_TYPE,
        architectures=[MODEL_CLASS],
        block_size=values["block_size"],
        mask_token_id=values["mask_token_id"],
        context_attention=values["context_attention"],
        assistant_header_ids=tokenizer.assistant_header_ids if header is None else header,
        eos_token_id=tokenizer.end_of_turn_id if end is None else end,
    )
    config.pop("auto_map", None)  # names files of code that do not travel
    spell_rope_twice(config["text_config"])


def spell_rope_twice(text_config: dict[str, Any]) -> None:
    """Make ``text_config`` hold ``rope_parameters`` (transformers 5) and ``rope_theta``/``rope_scaling`` (4.57), in place.

    transformers 5.18 reads a config with both; writing ``rope_parameters`` alone would leave 4.57 with its defaults.
    """
    parameters = text_config.get("rope_parameters")
    if isinstance(parameters, dict):
        scaling = {key: value for key, value in parameters.items() if key != "rope_theta"}
        if "rope_theta" in parameters:
            text_config.setdefault("rope_theta", parameters["rope_theta"])
        if not text_config.get("rope_scaling"):
            text_config["rope_scaling"] = scaling
    elif isinstance(text_config.get("rope_scaling"), dict):
        scaling = text_config["rope_scaling"]
        theta = {"rope_theta": text_config["rope_theta"]} if "rope_theta" in text_config else {}
        text_config["rope_parameters"] = {**scaling, **theta}


def write_generation_config(source: Path, folder: Path, *, keep: bool) -> list[str]:
    """Write ``generation_config.json``.

    Args:
        source: Folder of the source.
        folder: Folder to write to.
        keep: Take the source's settings over; else BARD's defaults with the source's padding id.

    Returns:
        A line for the user if decode settings of a BARD source were left out.
    """
    from nemo_bard.generation.settings import CLASS_MARKER, BardGenerationConfig

    path = source / GENERATION_CONFIG
    if not path.is_file():
        BardGenerationConfig().save_pretrained(folder)
        return []
    if keep:
        BardGenerationConfig.from_pretrained(source).save_pretrained(folder)
        return []
    given = read_object(path)
    written = BardGenerationConfig(pad_token_id=given.get("pad_token_id"))
    written.save_pretrained(folder)
    was_ours = CLASS_MARKER in given and BardGenerationConfig.from_pretrained(source).to_diff_dict()
    if was_ours and was_ours != written.to_diff_dict():
        return [f"decode settings of SRC were for another block size and are left out: {path}"]
    return []


def check_loads(folder: Path) -> None:
    """Read the written configuration back, so that a config our classes refuse never becomes a checkpoint."""
    from nemo_bard.generation.settings import BardGenerationConfig
    from nemo_bard.model.configuration import BardVLConfig

    BardVLConfig.from_pretrained(folder)
    BardGenerationConfig.from_pretrained(folder)
