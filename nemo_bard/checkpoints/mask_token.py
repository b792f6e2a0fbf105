"""The mask token of a converted folder: which row of the embedding it is, and its name in the tokenizer.

The name is an added special token, so that decoding shows or skips the id like others. The embedding does not grow: the row
is there already. tokenizers numbers added tokens without gaps, so ids between the last token and the mask get names too.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_bard.base.folders import read_object
from nemo_bard.base.names import MASK_TOKEN

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QWEN3_VL_MASK_TOKEN_ID = 151671
RESERVED_NAME = "<|reserved_{}|>"
"""Name of an id between the tokenizer's last token and the mask token."""
MOST_NAMES = 1024
"""Most names that are added; a mask token further away from the tokenizer's last one stays without a name."""
_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def choose_mask_token_id(wanted: int | None, rows: int, taken: frozenset[int]) -> int:
    """Return the id of the mask token: ``wanted`` if free, else 151671 if free and above the text, else the first free row.

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


def name_mask_token(folder: Path, tokenizer: PreTrainedTokenizerBase, mask_token_id: int) -> str | None:
    """Give the mask token a name in a folder's tokenizer files.

    Args:
        folder: Folder with ``tokenizer_config.json`` and, unless it is to be made, ``tokenizer.json``; both are rewritten.
        tokenizer: What those files hold.
        mask_token_id: A row of the embedding that no text uses.

    Returns:
        The name; None if none can be given: the tokenizer has a mask token or the name for another id, numbers its
        tokens beyond this id, or ends too far below it.

    Raises:
        ValueError: If what was written does not read back as meant.
    """
    vocabulary = tokenizer.get_vocab()
    if mask_token_id in vocabulary.values():
        token = tokenizer.convert_ids_to_tokens(mask_token_id)
        return str(token) if mask_token_id == tokenizer.mask_token_id else None
    file = folder / "tokenizer.json"
    backend: Any = tokenizer.backend_tokenizer
    content = read_object(file) if file.is_file() else json.loads(backend.to_str())
    added: list[dict[str, Any]] = content["added_tokens"]
    last = max((token["id"] for token in added), default=-1)
    first = max(last + 1, len(content["model"]["vocab"]))
    names = {id_: RESERVED_NAME.format(id_) for id_ in range(first, mask_token_id)} | {mask_token_id: MASK_TOKEN}
    taken = set(vocabulary.values()).intersection(names) or set(vocabulary).intersection(names.values())
    if tokenizer.mask_token is not None or not 0 < len(names) <= MOST_NAMES or mask_token_id < first or taken:
        return None
    added += [{"id": id_, "content": name, **_FLAGS} for id_, name in names.items()]
    _write(file, content)
    _name_in_config(folder / "tokenizer_config.json", names)
    _extend(folder / "added_tokens.json", {name: id_ for id_, name in names.items()})
    _extend(folder / "special_tokens_map.json", {"mask_token": MASK_TOKEN})
    _check(folder, mask_token_id, len(vocabulary) + len(names))
    return MASK_TOKEN


def _name_in_config(file: Path, names: dict[int, str]) -> None:
    """Say in ``tokenizer_config.json`` which token the mask token is; in its list of added tokens, if it has one, too."""
    if not file.is_file():
        return
    config = read_object(file)
    config["mask_token"] = MASK_TOKEN
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] |= {str(id_): {"content": name, **_FLAGS} for id_, name in names.items()}
    _write(file, config)


def _extend(file: Path, values: dict[str, Any]) -> None:
    if file.is_file():
        _write(file, read_object(file) | values)


def _write(file: Path, value: object) -> None:
    file.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check(folder: Path, mask_token_id: int, size: int) -> None:
    """Read the tokenizer back; ValueError if the name has another id, or tokens came or went."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found = tokenizer.convert_tokens_to_ids(MASK_TOKEN)
    if found != mask_token_id or len(tokenizer) != size:
        raise ValueError(
            f"{folder / 'tokenizer.json'}: {MASK_TOKEN} became {found} of {len(tokenizer)} tokens, not {mask_token_id} of"
            f" {size}; the tokenizer of SRC numbers its tokens in an unknown way"
        )
