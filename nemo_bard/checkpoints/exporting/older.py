"""What transformers 4.57 reads under other names than 5.x, which wrote the checkpoint: an export says both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nemo_bard.base.files import write_json
from nemo_bard.base.folders import read_object
from nemo_bard.checkpoints.convert import spell_rope_twice

PROCESSOR = "processor_config.json"
PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
"""Section of 5.x's ``processor_config.json`` -> file of 4.57."""
TOKENIZER = "tokenizer_config.json"


def spell_config(config: dict[str, Any]) -> None:
    """Let a configuration say both, in place: RoPE, and that the LM head is tied, which 4.57 looks up in ``text_config``."""
    text = config["text_config"]
    spell_rope_twice(text)
    if "tie_word_embeddings" in config:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]


def spell_companions(folder: Path) -> None:
    """Let the files of tokenizer and processor in a folder be read by both.

    4.57 wants the list of special tokens under another name, where 5.x reads it too, and a file for each processor.
    """
    tokenizer = read_object(folder / TOKENIZER)
    if isinstance(tokenizer.get("extra_special_tokens"), list):
        tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        write_json(folder / TOKENIZER, tokenizer, durable=False)
    if not (folder / PROCESSOR).is_file():
        return
    processor = read_object(folder / PROCESSOR)
    for section, name in PARTS.items():
        if isinstance(processor.get(section), dict) and not (folder / name).is_file():
            kind = {"processor_class": processor["processor_class"]} if "processor_class" in processor else {}
            write_json(folder / name, {**processor[section], **kind}, durable=False)
