"""Which samples a rehearsed stage trains on: the longest rows for its first step, typical ones for its second.

All lengths are measured where the data set is small; of a large one, a bounded part: its longest lines where the data set
knows them, and samples at random.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nemo_bard.data.chosen import ChosenSamples
from nemo_bard.data.collate import DEFAULT_MAX_LENGTH, BlockDiffusionCollator
from nemo_bard.data.lengths import UNKNOWN_LENGTH, SampleSizes, measure
from nemo_bard.data.readers import open_dataset
from nemo_bard.method.layout import RowOptions
from nemo_bard.train.keys import is_our_collator

MEASURED = 4096
"""Most samples whose rows are measured."""
HEAVY = 1024
"""How many of these have the longest lines, where lines are known; the others are drawn at random."""
EXTRA = 2048
"""Samples behind those of the two steps, from which the loader's speed is measured."""
MOST = 16384
"""Most samples of a rehearsed stage, repeated ones counted."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """What is known of a stage's training rows; lengths in tokens, None where they cannot be measured."""

    total: int
    """Samples of the data set."""
    measured: int
    """Samples whose rows were measured."""
    too_long: int
    """Samples among them that are longer than a row may be."""
    longest: int | None
    """Longest row that is trained on: a packed row is full."""
    typical: float | None
    """Mean length of a sample's row."""
    longest_sample: SampleShape | None
    """What the longest row is made of; with packing, a typical sample."""
    typical_sample: SampleShape | None


@dataclass(frozen=True, kw_only=True)
class SampleShape:
    """Tokens of a sample, as a ``plan`` asks for them."""

    prompt_tokens: int
    """Everything that is no response."""
    image_tokens: int
    """Those of images and videos among them."""
    response_tokens: int


@dataclass(frozen=True)
class Measured:
    """Part of a data set and the sizes of its samples."""

    total: int
    heavy: np.ndarray
    """Samples with the longest lines, ``[h]`` int64; may be empty."""
    random: np.ndarray
    """Others, at random, ``[r]`` int64."""
    sizes: SampleSizes | None
    """Of ``[heavy, random]``; None where the collator cannot tell."""


def measure_part(recipe: Mapping[str, Any], start: Path, block_size: int | None) -> Measured:
    """Open a stage's training set and measure all of it or a part.

    Args:
        recipe: The stage's recipe, environment variables filled in.
        start: The folder that the stage starts from, for processor and token ids.
        block_size: The stage's.

    Raises:
        ValueError: If the data set cannot be opened.
    """
    section = {key: value for key, value in recipe["dataset"].items() if key != "chat_template"}
    dataset = open_dataset(section, validate=False)
    total, chance = len(dataset), np.random.default_rng(0)
    heavy = np.empty(0, dtype=np.int64)
    if total > MEASURED and hasattr(dataset, "line_bytes"):
        heavy = np.argsort(-dataset.line_bytes(), kind="stable")[:HEAVY]
    random = chance.permutation(np.setdiff1d(chance.choice(total, min(total, MEASURED), replace=False), heavy))
    random = random[: MEASURED - len(heavy)]
    collator = _collator(recipe, start, block_size)
    if collator is None:
        return Measured(total, heavy, random, None)
    part = ChosenSamples(dataset, np.concatenate([heavy, random]).tolist())
    workers = (recipe.get("dataloader") or {}).get("num_workers") or 0
    return Measured(total, heavy, random, measure(part, collator, num_workers=workers, drop_bad=True))


def _collator(recipe: Mapping[str, Any], start: Path, block_size: int | None) -> BlockDiffusionCollator | None:
    section = (recipe.get("dataloader") or {}).get("collate_fn") or {}
    if block_size is None or not is_our_collator(section.get("_target_")):
        return None
    from transformers import AutoProcessor

    from nemo_bard.model.configuration import BardVLConfig

    config = BardVLConfig.from_pretrained(start)
    config.block_size = block_size
    return BlockDiffusionCollator(AutoProcessor.from_pretrained(start), config)


def choose(
    part: Measured, recipe: Mapping[str, Any], block_size: int | None, *, anchor_block_size: int | None, samples: int
) -> tuple[list[int], Rows]:
    """Put the samples of a rehearsed stage in order.

    Args:
        part: What was measured.
        recipe: The stage's recipe, environment variables filled in.
        block_size: The stage's.
        anchor_block_size: The anchor's, if there is one.
        samples: Samples (with packing: rows) that its two steps take together.

    Returns:
        Samples of the data set: the longest for the first step, then typical ones; and what is known of the rows.
    """
    everything = np.concatenate([part.heavy, part.random])
    first = -(-samples // 2)
    if part.sizes is None:
        known = Rows(
            total=part.total,
            measured=0,
            too_long=0,
            longest=None,
            typical=None,
            longest_sample=None,
            typical_sample=None,
        )
        return _cycled(everything, samples + min(EXTRA, len(everything))), known
    assert block_size is not None
    collate, packed = recipe["dataloader"]["collate_fn"], (recipe.get("packing") or {}).get("max_length")
    longest = min(collate.get("max_length", DEFAULT_MAX_LENGTH), packed or math.inf)
    options = row_options(recipe, anchor_block_size)
    lengths = part.sizes.row_lengths(block_size, turns=collate.get("turns", "all"), options=options)
    unknown, fits = lengths >= UNKNOWN_LENGTH, lengths <= longest
    at_random = np.arange(len(everything)) >= len(part.heavy)
    typical = np.flatnonzero(fits & at_random if (fits & at_random).any() else fits)
    vision = part.sizes.vision_tokens(block_size, options=options)
    top = lengths[fits].max() if fits.any() else None
    mean = _shape(part.sizes, vision, typical)
    facts = Rows(
        total=part.total,
        measured=len(everything),
        too_long=int((~fits & ~unknown).sum()),
        longest=None if top is None else int(packed or top),
        typical=float(lengths[typical].mean()) if len(typical) else None,
        longest_sample=mean if packed else _shape(part.sizes, vision, np.flatnonzero(fits & (lengths == top))),
        typical_sample=mean,
    )
    by_length = everything[np.argsort(np.where(fits, -lengths, 0), kind="stable")]
    long = _cycled(by_length[: max(min(first, int(fits.sum())), 1)], first)
    bad = everything[unknown | (~fits if collate.get("overlong") == "error" else False)]
    rest = np.concatenate([bad, part.random[~np.isin(part.random, bad)]])
    count = max(first, min(EXTRA, len(rest)))
    if packed and facts.typical:
        count = math.ceil(1.2 * samples * packed / facts.typical)
    return [*long, *_cycled(rest, min(count, MOST))], facts


def _shape(sizes: SampleSizes, vision: np.ndarray, samples: np.ndarray) -> SampleShape | None:
    """The mean shape of some samples, None for none."""
    if not len(samples):
        return None
    spans = sizes.responses.astype(np.int64)
    responses = np.add.reduceat(spans[:, 1] - spans[:, 0], sizes.response_edges[:-1])[samples].mean()
    whole = spans[sizes.response_edges[1:] - 1, 1][samples].mean()
    prompt = max(round(whole - responses), 1)
    return SampleShape(
        prompt_tokens=prompt,
        image_tokens=min(round(vision[samples].mean()), prompt),
        response_tokens=max(round(responses), 1),
    )


def row_options(recipe: Mapping[str, Any], anchor_block_size: int | None) -> RowOptions:
    """What a stage's training rows hold besides context and one noisy copy, as its recipe class will say."""
    complementary = bool((recipe.get("noise") or {}).get("complementary"))
    return RowOptions(
        anchor_block_size=anchor_block_size,
        noisy_copies=2 if complementary else 1,
        next_token=(recipe.get("ar_loss_weight") or 0) > 0,
    )


def _cycled(samples: np.ndarray, count: int) -> list[int]:
    """The first ``count`` samples, from the start again where there are fewer."""
    return np.resize(samples, count).tolist()
