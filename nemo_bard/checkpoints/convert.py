"""``convert``: makes a BARD start point from a Qwen3-VL folder.

NeMo AutoModel picks the model class by the ``architectures`` of the folder's ``config.json``, and BARD keeps Qwen3-VL's
weights as they are. So only ``config.json`` and ``generation_config.json`` are written anew; weights are hard-linked, or
copied file by file where the file system cannot, and are never loaded.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from nemo_bard.base.files import link_or_copy, write_whole
from nemo_bard.base.names import MODEL_CLASS, MODEL_TYPE, SOURCE_MODEL_CLASS, SOURCE_MODEL_TYPE
from nemo_bard.checkpoints.folder import (
    WEIGHTS_INDEX,
    check_target,
    copy_companions,
    read_header,
    read_object,
    weight_files,
)
from nemo_bard.method.layout import check_block_size, check_context_attention

QWEN3_VL_MASK_TOKEN_ID = 151671
ASSISTANT_HEADER = "<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"


class TokenizerFacts(NamedTuple):
    """What the conversion needs to know about a tokenizer."""

    ids: frozenset[int]
    """Every id that stands for text or a special token."""
    assistant_header_ids: list[int]
    end_of_turn_id: int


class ConvertReport(NamedTuple):
    """What ``convert`` wrote; ``str`` gives text for people."""

    target: Path
    block_size: int
    mask_token_id: int
    context_attention: str
    linked: int
    copied: int
    left_out: list[str]

    def __str__(self) -> str:
        lines = [
            f"wrote {self.target}: {MODEL_CLASS}, block size {self.block_size}, mask token {self.mask_token_id}, "
            f"context attention {self.context_attention}",
            f"weight files: {self.linked} hard-linked, {self.copied} copied",
        ]
        if self.left_out:
            lines.append(f"not taken over: {', '.join(self.left_out)}")
        return "\n".join(lines)


def convert(
    source: Path,
    target: Path,
    *,
    block_size: int = 4,
    mask_token_id: int | None = None,
    context_attention: str = "block",
    overwrite: bool = False,
) -> ConvertReport:
    """Write a BARD start point made of the Qwen3-VL checkpoint in ``source`` to the folder ``target``.

    Everything is checked and written to a folder beside ``target`` first, which is then renamed: ``target`` appears whole
    or not at all.

    Args:
        source: Folder with ``config.json``, a tokenizer and safetensors weights (one file, or shards with an index).
        target: Folder to make.
        block_size: Tokens denoised together, >= 1.
        mask_token_id: Row of the embedding that becomes ``[MASK]``. If None, 151671 where the vocabulary allows it, else
            the first row above the tokenizer's last id.
        context_attention: ``block`` or ``causal``.
        overwrite: Replace ``target`` if it is a BARD checkpoint or an empty folder.

    Returns:
        What was written.

    Raises:
        FileNotFoundError: If ``source``, its ``config.json`` or a weight file is missing.
        FileExistsError: If ``target`` exists and may not be replaced.
        ValueError: If ``source`` is no Qwen3-VL checkpoint, a weight file is damaged, or an argument is not allowed.
    """
    source, target = Path(source), Path(target)
    check_block_size(block_size)
    check_context_attention(context_attention)
    config = read_source_config(source)
    check_target(source, target, overwrite=overwrite)
    shards = weight_files(source)
    rows = embedding_rows(source, shards, config)
    tokenizer = read_tokenizer(source)
    mask_token_id = choose_mask_token_id(mask_token_id, rows, tokenizer.ids | special_ids_of(config))

    config.update(
        model_type=MODEL_TYPE,
        architectures=[MODEL_CLASS],
        block_size=block_size,
        mask_token_id=mask_token_id,
        context_attention=context_attention,
        assistant_header_ids=tokenizer.assistant_header_ids,
        eos_token_id=tokenizer.end_of_turn_id,
    )
    spell_rope_twice(config["text_config"])
    taken = {"config.json", "generation_config.json", WEIGHTS_INDEX, *shards}
    with write_whole(target) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        write_generation_config(source, folder)
        taken |= copy_companions(source, folder)
        linked = sum(link_or_copy(source / name, folder / name) for name in shards)
        if (source / WEIGHTS_INDEX).is_file():
            shutil.copyfile(source / WEIGHTS_INDEX, folder / WEIGHTS_INDEX)
        check_loads(folder)
    left_out = sorted(path.name for path in source.iterdir() if path.name not in taken)
    return ConvertReport(target, block_size, mask_token_id, context_attention, linked, len(shards) - linked, left_out)


def read_source_config(source: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Qwen3-VL folder.

    Raises:
        FileNotFoundError: If there is no such folder or no config in it.
        ValueError: If it describes another architecture.
    """
    if not source.is_dir():
        raise FileNotFoundError(f"{source}: no such folder; SRC must be the folder of a Qwen3-VL checkpoint")
    if not (source / "config.json").is_file():
        raise FileNotFoundError(f"{source}: has no config.json; SRC must be the folder of a Qwen3-VL checkpoint")
    config = read_object(source / "config.json")
    model_type, architectures = config.get("model_type"), config.get("architectures")
    if model_type != SOURCE_MODEL_TYPE or architectures not in (None, [SOURCE_MODEL_CLASS]):
        name = ", ".join(architectures) if isinstance(architectures, list) else "no architectures"
        raise ValueError(
            f"{source / 'config.json'}: architecture {name} (model_type {model_type!r}) cannot be converted; "
            f"allowed: {SOURCE_MODEL_CLASS} (model_type {SOURCE_MODEL_TYPE!r})"
        )
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{source / 'config.json'}: {section}: missing; a Qwen3-VL config has one")
    return config


def embedding_rows(source: Path, shards: list[str], config: dict[str, Any]) -> int:
    """Return the rows of the token embedding; ValueError if weights and ``vocab_size`` disagree."""
    for shard in shards:
        for name, tensor in read_header(source / shard).items():
            if name.endswith("embed_tokens.weight"):
                rows, stated = tensor["shape"][0], config["text_config"].get("vocab_size")
                if rows != stated:
                    raise ValueError(f"{source / shard}: {name} has {rows} rows, text_config.vocab_size is {stated}")
                return rows
    raise ValueError(f"{source}: no weight named *embed_tokens.weight in {', '.join(shards)}")


def read_tokenizer(source: Path) -> TokenizerFacts:
    """Read the source's tokenizer; ValueError if it cannot be read or lacks Qwen's chat tokens."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, ImportError) as error:
        raise ValueError(f"{source}: cannot read its tokenizer: {error}") from error
    vocabulary = tokenizer.get_vocab()
    for token in (END_OF_TURN, "<|im_start|>"):
        if token not in vocabulary:
            raise ValueError(f"{source}: its tokenizer has no {token}, which Qwen3-VL's chat format needs")
    header = tokenizer.encode(ASSISTANT_HEADER, add_special_tokens=False)
    return TokenizerFacts(frozenset(vocabulary.values()), list(map(int, header)), int(vocabulary[END_OF_TURN]))


def special_ids_of(config: dict[str, Any]) -> frozenset[int]:
    """Return the ids that ``config.json`` gives a meaning to (image placeholder, padding, ...)."""
    sections = (config, config["text_config"])
    values = [value for section in sections for key, value in section.items() if key.endswith("_token_id")]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return frozenset(item for item in flat if isinstance(item, int))


def choose_mask_token_id(wanted: int | None, rows: int, taken: frozenset[int]) -> int:
    """Return the id of ``[MASK]``: ``wanted`` if free, else 151671 if free and above the text, else the first free row.

    Args:
        wanted: The user's choice or None.
        rows: Rows of the embedding.
        taken: Ids that mean something already.

    Raises:
        ValueError: If ``wanted`` is taken or outside the embedding, or if no row is left.
    """
    first = max(taken) + 1
    if first >= rows:
        raise ValueError(
            f"mask_token_id: the embedding has {rows} rows and the tokenizer uses ids up to {first - 1}: none is left; "
            "resize the embedding of SRC first"
        )
    if wanted is None:
        return QWEN3_VL_MASK_TOKEN_ID if first <= QWEN3_VL_MASK_TOKEN_ID < rows else first
    if not 0 <= wanted < rows:
        raise ValueError(f"mask_token_id {wanted} lies outside the embedding; allowed: {first} to {rows - 1}")
    if wanted in taken:
        raise ValueError(f"mask_token_id {wanted} is a token of the tokenizer; allowed: {first} to {rows - 1}")
    return wanted


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


def write_generation_config(source: Path, folder: Path) -> None:
    """Write ``generation_config.json``: BARD's defaults, with the source's padding id."""
    from nemo_bard.generation.settings import BardGenerationConfig

    path = source / "generation_config.json"
    pad_token_id = read_object(path).get("pad_token_id") if path.is_file() else None
    BardGenerationConfig(pad_token_id=pad_token_id).save_pretrained(folder)


def check_loads(folder: Path) -> None:
    """Read the written configuration back, so that a config our classes refuse never becomes a checkpoint."""
    from nemo_bard.generation.settings import BardGenerationConfig
    from nemo_bard.model.configuration import BardVLConfig

    BardVLConfig.from_pretrained(folder)
    BardGenerationConfig.from_pretrained(folder)
