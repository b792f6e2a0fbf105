"""A tiny Qwen3-VL checkpoint made offline: tokenizer, chat template, processors, configuration, random weights.

It has the parts and the special tokens of a real one, so that everything that works on it works on a Qwen3-VL folder:
``python -m nemo_bard.checkpoints.tiny OUT``.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_bard.cost.shapes import make_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLProcessor

logger = logging.getLogger(__name__)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
"""Special tokens of Qwen3-VL, in the order of their ids."""

ADDED_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
)
"""Further tokens behind the special ones, which decoding does not skip."""

CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}
{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' or 'image' in part or 'image_url' in part -%}
{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
{%- elif part.type == 'video' or 'video' in part -%}
{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
{%- elif 'text' in part -%}
{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""

# Splits off contractions, words with one leading mark, single digits, marks, line breaks and blanks, as Qwen's does.
_PRE_TOKENIZER = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_WORDS = """
system user assistant Read Which What Who Where How Describe Answer Count Look Name List Say
 the a an of in on by and or is are was it this that to from with for not all any each row column
 digit digits number numbers image images picture pictures video grid shown see there do does you your
 red green blue white black left right top bottom first second last many one two three colour color shape circle square
 yes no please only word short question answer
"""

QWEN3_VL_TEXT_TOKENS = 151643
"""Of Qwen3-VL's tokenizer, before its special tokens."""
_TOKENS_PER_SIDE = 32  # pixels of a visual token: patch_size * spatial_merge_size


def make_tokenizer(text_tokens: int | None = None) -> PreTrainedTokenizerBase:
    """Build a byte-level BPE tokenizer with Qwen's special tokens; every digit is a token of its own.

    Args:
        text_tokens: Fill the text tokens up with unused ones to this many; ``QWEN3_VL_TEXT_TOKENS`` gives all special tokens
            the ids that they have in Qwen3-VL.

    Returns:
        A tokenizer whose ids run from the text tokens over ``SPECIAL_TOKENS`` to ``ADDED_TOKENS`` without a gap.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = _word_merges(vocab)
    for index in range(len(vocab), text_tokens or 0):
        vocab[f"unused {index}"] = index  # no text becomes one: blanks have another sign
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PRE_TOKENIZER), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    fast = Qwen2Tokenizer(
        tokenizer_object=tokenizer,
        unk_token=None,  # pyright: ignore[reportArgumentType]
        bos_token=None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
        additional_special_tokens=list(SPECIAL_TOKENS),
    )
    fast.add_tokens(list(ADDED_TOKENS))
    return fast


def _word_merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Add the words, with and without a leading blank, to ``vocab`` in place; return the merges that build them.

    Greedy byte-pair encoding over the word list: the most frequent pair first, the alphabetically first one on a tie.
    """
    blank = "\u0120"  # the byte-level alphabet's sign for a blank
    words = [list(word) for word in dict.fromkeys(_WORDS.split())]
    words += [[blank, *word] for word in words if word[0].islower()]
    merges: list[tuple[str, str]] = []
    while any(len(word) > 1 for word in words):
        counts: dict[tuple[str, str], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        best = min(counts, key=lambda pair: (-counts[pair], pair))
        merges.append(best)
        vocab.setdefault("".join(best), len(vocab))
        words = [_merge(word, best) for word in words]
    return merges


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for symbol in word:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] += symbol
        else:
            merged.append(symbol)
    return merged


def make_processor(
    tokenizer: PreTrainedTokenizerBase, *, max_image_tokens: int = 64, max_video_tokens: int = 64
) -> Qwen3VLProcessor:
    """Build the processor: image and video limits are in visual tokens of 32 x 32 pixels.

    Args:
        tokenizer: What ``make_tokenizer`` returned.
        max_image_tokens: Most tokens an image becomes; larger images are scaled down.
        max_video_tokens: Most tokens a video becomes, over all its frames.
    """
    from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

    for name, value in (("max_image_tokens", max_image_tokens), ("max_video_tokens", max_video_tokens)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    common = {
        "patch_size": 16,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    area = _TOKENS_PER_SIDE**2
    image = Qwen2VLImageProcessor(**common, size={"shortest_edge": area, "longest_edge": area * max_image_tokens})
    video = Qwen3VLVideoProcessor(
        **common,
        # Two frames share a token; pixels are counted over all frames.
        size={"shortest_edge": 2 * area, "longest_edge": 2 * area * max_video_tokens},
        fps=2,
        min_frames=4,
        max_frames=16,
    )
    return Qwen3VLProcessor(
        image_processor=image, tokenizer=tokenizer, video_processor=video, chat_template=CHAT_TEMPLATE
    )


def make_tiny_qwen3_vl(
    out: str | Path,
    *,
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    tie_word_embeddings: bool = True,
    max_image_tokens: int = 64,
    max_video_tokens: int = 64,
    spare_tokens: int = 8,
) -> Path:
    """Write a tiny Qwen3-VL checkpoint with random weights, a pure function of its arguments.

    Args:
        out: Folder to write; made if absent, must not hold files.
        seed: Seed of the weights.
        text: Fields of the text configuration that replace those of the shape ``tiny``.
        vision: Fields of the vision configuration that replace those of the shape ``tiny``.
        tie_word_embeddings: Whether the LM head is the embedding.
        max_image_tokens: Most tokens an image becomes.
        max_video_tokens: Most tokens a video becomes.
        spare_tokens: Least rows of the embedding above the tokenizer's last id, where a mask token finds its place; the
            embedding is rounded up to a multiple of 64 rows.

    Returns:
        The folder.

    Raises:
        ValueError: If the folder holds files already or a value is out of range.
    """
    from transformers import GenerationConfig, Qwen3VLForConditionalGeneration

    out = Path(out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"output folder {out} is not empty")
    if isinstance(spare_tokens, bool) or not isinstance(spare_tokens, int) or spare_tokens < 1:
        raise ValueError(f"spare_tokens must be an integer >= 1, got {spare_tokens!r}")
    tokenizer = make_tokenizer()
    processor = make_processor(tokenizer, max_image_tokens=max_image_tokens, max_video_tokens=max_video_tokens)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    special = {"pad_token_id": ids["<|endoftext|>"], "eos_token_id": ids["<|im_end|>"]}
    vocab_size = -(-(len(tokenizer) + spare_tokens) // 64) * 64
    config = make_config(
        "tiny",
        text={"vocab_size": vocab_size, **special, **(text or {})},
        vision=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        **special,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"], do_sample=False
    )
    model.save_pretrained(out)
    processor.save_pretrained(out)
    logger.info("%s: %d parameters, %d rows in the embedding", out, model.num_parameters(), vocab_size)
    return out


def main(argv: list[str] | None = None) -> int:
    """Command line of ``python -m nemo_bard.checkpoints.tiny``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m nemo_bard.checkpoints.tiny", description="Write a tiny Qwen3-VL checkpoint with random weights."
    )
    parser.add_argument("out", help="folder to write, must not hold files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights (default: 0)")
    parser.add_argument("--untied", action="store_true", help="give the LM head weights of its own")
    parser.add_argument("--text", type=json.loads, default={}, metavar="JSON", help="e.g. '{\"num_hidden_layers\": 2}'")
    parser.add_argument(
        "--vision", type=json.loads, default={}, metavar="JSON", help="fields of the vision configuration"
    )
    parser.add_argument("--max-image-tokens", type=int, default=64, help="most tokens of an image (default: 64)")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make_tiny_qwen3_vl(
            args.out,
            seed=args.seed,
            text=args.text,
            vision=args.vision,
            tie_word_embeddings=not args.untied,
            max_image_tokens=args.max_image_tokens,
        )
    except ValueError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
