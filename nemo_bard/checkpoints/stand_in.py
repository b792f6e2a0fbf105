"""A checkpoint that stands in for a released Qwen3-VL: its shape, ids and files, with random weights, made offline.

Weights are drawn and written one file at a time, so that a large one needs little memory:
``python -m nemo_bard.checkpoints.stand_in 2b OUT``.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nemo_bard.base.files import write_whole
from nemo_bard.base.folders import CONFIG
from nemo_bard.checkpoints.folder import DTYPES, WEIGHTS_INDEX
from nemo_bard.checkpoints.tiny import QWEN3_VL_TEXT_TOKENS, make_processor, make_tokenizer
from nemo_bard.cost.shapes import SHAPES, make_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Qwen3VLConfig

GIB = 1024**3


def make_stand_in(
    out: str | Path,
    shape: str,
    *,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    dtype: str = "bfloat16",
    seed: int = 0,
    max_shard_bytes: int = GIB,
    max_image_tokens: int = 64,
) -> Path:
    """Write a Qwen3-VL checkpoint with random weights, a pure function of its arguments.

    Args:
        out: Folder to write; must not be there.
        shape: One of ``nemo_bard.cost.shapes.SHAPES``.
        text: Fields of the text configuration that replace those of the shape, such as ``num_hidden_layers``.
        vision: Fields of the vision configuration that replace those of the shape.
        dtype: ``float32``, ``bfloat16`` or ``float16``.
        seed: Seed of the weights.
        max_shard_bytes: Most bytes of a weight file; a larger tensor is a file of its own.
        max_image_tokens: Most tokens an image becomes.

    Returns:
        The folder.

    Raises:
        ValueError: If the shape or dtype is unknown, or the folder is there.
    """
    out = Path(out)
    if dtype not in DTYPES[1:]:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES[1:])}, got {dtype!r}")
    if out.exists():
        raise ValueError(f"output folder {out} exists")
    tokenizer = make_tokenizer(QWEN3_VL_TEXT_TOKENS)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    config = make_config(shape, text=text, vision=vision)
    config.architectures = ["Qwen3VLForConditionalGeneration"]
    config.dtype = getattr(torch, dtype)
    with write_whole(out) as folder:
        config.save_pretrained(folder)
        make_processor(tokenizer, max_image_tokens=max_image_tokens).save_pretrained(folder)
        generation = {"eos_token_id": end, "pad_token_id": tokenizer.pad_token_id}
        (folder / "generation_config.json").write_text(json.dumps(generation) + "\n", encoding="utf-8")
        write_random_weights(folder, config, seed=seed, max_shard_bytes=max_shard_bytes)
    assert (out / CONFIG).is_file()
    return out


def write_random_weights(folder: Path, config: Qwen3VLConfig, *, seed: int, max_shard_bytes: int) -> None:
    """Write the weights of a configuration in its dtype, drawn as transformers would initialise them, and their index."""
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    shapes = weight_shapes(config)
    assert isinstance(config.dtype, torch.dtype)
    size = config.dtype.itemsize
    files = list(split({name: size * meta.numel() for name, meta in shapes.items()}, max_shard_bytes))
    place: dict[str, str] = {}
    for number, names in enumerate(files, start=1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        tensors = {name: draw(name, shapes[name], config, generator) for name in names}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        place |= dict.fromkeys(names, file)
    total = sum(size * meta.numel() for meta in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": place}
    (folder / WEIGHTS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def weight_shapes(config: Qwen3VLConfig) -> dict[str, Tensor]:
    """Names and shapes of the weights as a checkpoint has them, on the device ``meta``; a tied head is left out."""
    from transformers import Qwen3VLForConditionalGeneration

    with torch.device("meta"):
        state = Qwen3VLForConditionalGeneration(config).state_dict()
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    return dict(state)


def split(sizes: dict[str, int], most: int) -> Iterator[list[str]]:
    """Group names in their order, each group of at most ``most`` bytes or of one name."""
    group: list[str] = []
    taken = 0
    for name, size in sizes.items():
        if group and taken + size > most:
            yield group
            group, taken = [], 0
        group.append(name)
        taken += size
    if group:
        yield group


def draw(name: str, meta: Tensor, config: Any, generator: torch.Generator) -> Tensor:
    """Draw a weight: norms are 1, biases 0, all else normal with the configuration's deviation."""
    weight = torch.empty(meta.shape, dtype=config.dtype)
    if name.endswith(".bias"):
        return weight.zero_()
    if meta.ndim == 1:
        return weight.fill_(1)
    section = config.vision_config if ".visual." in name else config.text_config
    return weight.normal_(0, section.initializer_range, generator=generator)


def main(argv: list[str] | None = None) -> int:
    """Make a stand-in from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m nemo_bard.checkpoints.stand_in", description=__doc__)
    parser.add_argument("shape", choices=SHAPES, metavar="SHAPE", help=f"one of {', '.join(SHAPES)}")
    parser.add_argument("out", type=Path, help="folder to write")
    parser.add_argument("--layers", type=int, help="layers of the language model (default: all)")
    parser.add_argument("--dtype", default="bfloat16", help="float32, bfloat16 (default) or float16")
    args = parser.parse_args(argv)
    try:
        text = None if args.layers is None else {"num_hidden_layers": args.layers}
        folder = make_stand_in(args.out, args.shape, text=text, dtype=args.dtype)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(f"{folder}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
