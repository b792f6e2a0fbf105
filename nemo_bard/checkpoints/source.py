"""What ``convert`` starts from: the configuration, the embedding and the tokenizer of a Qwen3-VL or Bard-VL folder."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_bard.base.folders import CONFIG, read_object
from nemo_bard.base.names import MODEL_CLASS, MODEL_TYPE, SOURCE_MODEL_CLASS, SOURCE_MODEL_TYPE
from nemo_bard.checkpoints.folder import read_header

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ASSISTANT_HEADER = "<|im_start|>assistant\n"
END_OF_TURN = "<|im_end|>"
CLASSES = {SOURCE_MODEL_TYPE: SOURCE_MODEL_CLASS, MODEL_TYPE: MODEL_CLASS}
"""``model_type`` -> the class that its ``architectures`` names."""
_EXPERTS = (
    "mixture-of-experts layers: BARD has no model class, no balancing of experts in its losses, no decoder, no plan of "
    "memory and no vLLM model for them"
)
MISSING = {
    r"qwen3_vl_moe": _EXPERTS,
    r"qwen3_(5|next).*": "linear attention layers, whose state cannot see a block in both directions",
    r".*_moe|.*_omni.*": _EXPERTS,
    r"qwen2_5_vl": "another vision tower (window attention, no deepstack features) and its own M-RoPE; take a Qwen3-VL",
    r"qwen2_vl": "another vision tower (no deepstack features) and its own M-RoPE; take a Qwen3-VL",
    r"qwen[23]": "a text model, without a vision tower; take a Qwen3-VL",
}
"""``model_type`` (a pattern) -> what BARD lacks for it."""


class TokenizerFacts(NamedTuple):
    """What the conversion needs to know about a tokenizer."""

    ids: frozenset[int]
    """Every id that stands for text or a special token, the mask token's left out."""
    assistant_header_ids: list[int]
    end_of_turn_id: int
    tokenizer: PreTrainedTokenizerBase
    """The tokenizer itself."""


def read_source_config(source: Path) -> dict[str, Any]:
    """Return ``config.json`` of a Qwen3-VL or Bard-VL folder.

    Raises:
        FileNotFoundError: If there is no such folder or no config in it.
        ValueError: If it describes another architecture; says what is missing for it, where that is known.
    """
    if not source.is_dir():
        raise FileNotFoundError(
            f"{source}: no such folder; SRC must be the folder or the Hugging Face name of a Qwen3-VL checkpoint"
        )
    if not (source / CONFIG).is_file():
        raise FileNotFoundError(f"{source}: has no {CONFIG}; SRC must be the folder of a Qwen3-VL checkpoint")
    config = read_object(source / CONFIG)
    model_type, architectures = config.get("model_type"), config.get("architectures")
    expected = CLASSES.get(str(model_type))
    if expected is None or architectures not in (None, [expected]):
        name = ", ".join(map(str, architectures)) if isinstance(architectures, list) else "no architectures"
        raise ValueError(
            f"{source / CONFIG}: architecture {name} (model_type {model_type!r}) cannot be converted"
            f"{_what_is_missing(str(model_type), name)}; allowed: {SOURCE_MODEL_CLASS} (model_type "
            f"{SOURCE_MODEL_TYPE!r}) and {MODEL_CLASS} ({MODEL_TYPE!r})"
        )
    for section in ("text_config", "vision_config"):
        if not isinstance(config.get(section), dict):
            raise ValueError(f"{source / CONFIG}: {section}: missing; a Qwen3-VL config has one")
    return config


def _what_is_missing(model_type: str, architecture: str) -> str:
    """The reason as a half sentence, empty where it is not known."""
    if "Moe" in architecture:
        return f": {_EXPERTS}"
    return next((f": {reason}" for pattern, reason in MISSING.items() if re.fullmatch(pattern, model_type)), "")


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


def read_tokenizer(source: Path, *, mask_token_id: int | None = None) -> TokenizerFacts:
    """Read the source's tokenizer.

    Args:
        source: Its folder.
        mask_token_id: Of a Bard-VL folder: left out of the ids if its token is the tokenizer's mask token.

    Raises:
        ValueError: If it cannot be read or lacks Qwen's chat tokens.
    """
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
    ids = set(vocabulary.values())
    if mask_token_id is not None and mask_token_id == tokenizer.mask_token_id:
        ids.discard(mask_token_id)
    return TokenizerFacts(frozenset(ids), list(map(int, header)), int(vocabulary[END_OF_TURN]), tokenizer)


def special_ids_of(config: dict[str, Any]) -> frozenset[int]:
    """Return the ids that ``config.json`` gives a meaning to (image placeholder, padding, ...), the mask token's left out."""
    sections = (config, config["text_config"])
    values = [
        value
        for section in sections
        for key, value in section.items()
        if key.endswith("_token_id") and key != "mask_token_id"
    ]
    flat = [item for value in values for item in (value if isinstance(value, list) else [value])]
    return frozenset(item for item in flat if isinstance(item, int))
