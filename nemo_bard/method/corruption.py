"""Noise of a training batch: a pure function of (seed, epoch, sample index); torch only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nemo_bard.method.layout import IGNORE_INDEX, NOISY, PADDING
from nemo_bard.method.noise import sample_generator
from nemo_bard.method.schedule import NoiseSettings

PADDING_WEIGHT = 0.5
"""Loss weight of response padding relative to text: BARD doubles ``t`` there, and the weight is ``1 / t``."""


@dataclass(frozen=True, kw_only=True)
class NoiseContext:
    """What the noise of a batch depends on besides its settings and samples."""

    block_size: int
    mask_token_id: int
    num_random_ids: int
    seed: int
    epoch: int
    stream: int = 0
    """Which of several independent draws of a sample."""


def corrupt_batch(batch: dict[str, Any], settings: NoiseSettings, context: NoiseContext) -> dict[str, Any]:
    """Draw the noise of a collated batch.

    Every response has its own draw, in order, from the generator of its sample; with ``per: sample`` the level is drawn
    once, before them. If fewer than ``min_masked`` tokens of the sample came out masked, random further ones are.
    With ``complementary`` the first of a response's two noisy copies gets the draw, at the levels ``t``, and the second
    its complement, at the levels ``1 - t``.

    Args:
        batch: What the collator returned, on CPU; not modified. With ``complementary`` it has two noisy copies.
        settings: Kind and levels of the noise.
        context: Token ids, block size, seed and epoch.

    Returns:
        The batch with corrupted ``input_ids`` and, in addition, ``loss_mask`` ``[N, L]`` bool and ``loss_weight``
        ``[N, L]`` float32: ``1 / t``, half on padding, 0 outside noisy tokens. ``labels`` are ``-100`` where the loss
        does not count.
    """
    noise, levels = settings.noise, settings.levels()
    input_ids = batch["input_ids"].clone()
    loss_mask = torch.zeros_like(batch["padding_mask"])
    t = torch.ones(input_ids.shape)
    for row, sample_id, sample_index in batch["noise_keys"]:
        generator = sample_generator(context.seed, context.epoch, sample_index, stream=context.stream)
        inside = (batch["sample_ids"][row] == sample_id) & (batch["branch_ids"][row] == NOISY)
        responses = batch["response_ids"][row]
        shared = levels.sample(1, generator=generator) if settings.per == "sample" else None
        for response in responses[inside].unique().tolist():
            places = (inside & (responses == response)).nonzero().flatten()
            second = None
            if settings.complementary:
                places, second = places.chunk(2)
                own = batch["block_ids"][row]
                assert (own[places] - own[second] == 1).all(), "the collator lays out two noisy copies, see layout"
            blocks = len(places) // context.block_size
            assert blocks * context.block_size == len(places), "a noisy copy is whole blocks"
            drawn = shared.expand(blocks) if shared is not None else levels.sample(blocks, generator=generator)
            t[row, places] = drawn.repeat_interleave(context.block_size)
            result = noise.corrupt(
                input_ids[row, places],
                t[row, places],
                mask_token_id=context.mask_token_id,
                num_random_ids=context.num_random_ids,
                generator=generator,
            )
            input_ids[row, places] = result.noisy_ids
            loss_mask[row, places] = result.loss_mask
            if second is not None:
                other = noise.complement(input_ids[row, second], result, mask_token_id=context.mask_token_id)
                t[row, second] = (1 - t[row, places]).clamp_min(levels.low)
                input_ids[row, second], loss_mask[row, second] = other.noisy_ids, other.loss_mask
        missing = settings.min_masked - int(loss_mask[row, inside].sum())
        if missing > 0:
            free = (inside & ~loss_mask[row]).nonzero().flatten()
            chosen = free[torch.randperm(len(free), generator=generator)[:missing]]
            input_ids[row, chosen] = context.mask_token_id
            loss_mask[row, chosen] = True
    return {
        **batch,
        "input_ids": input_ids,
        "labels": batch["labels"].masked_fill(~loss_mask, IGNORE_INDEX),
        "loss_mask": loss_mask,
        "loss_weight": loss_weight(t, batch),
    }


def loss_weight(t: Tensor, batch: dict[str, Any]) -> Tensor:
    """``1 / t`` at noisy tokens, half on padding, 0 elsewhere; ``[N, L]`` float32 from ``t`` of that shape."""
    weight = torch.where(batch["padding_mask"], PADDING_WEIGHT, 1.0) / t
    return weight * (batch["response_ids"] >= 0)


def without_samples(batch: dict[str, Any], repeated: set[int]) -> dict[str, Any]:
    """Turn samples into row padding.

    Args:
        batch: What the collator returned; not modified.
        repeated: Slots (places of samples in the microbatch, as in ``batch["slots"]``) that must not count.

    Returns:
        The batch, in which the tokens of those samples belong to nobody and ``num_samples`` leaves them out, as does
        ``rejects``.
    """
    if not repeated:
        return batch
    batch = {**batch, "rejects": [bad for bad in batch["rejects"] if bad.slot not in repeated]}
    out = [number for number, slot in enumerate(batch["slots"]) if slot in repeated]
    if not out:
        return batch
    gone = torch.zeros_like(batch["padding_mask"])
    for number in out:
        row, sample_id, _ = batch["noise_keys"][number]
        gone[row] |= batch["sample_ids"][row] == sample_id
    keep = [number for number in range(len(batch["slots"])) if number not in out]
    return {
        **batch,
        "labels": batch["labels"].masked_fill(gone, IGNORE_INDEX),
        "sample_ids": batch["sample_ids"].masked_fill(gone, PADDING),
        **{key: batch[key].masked_fill(gone, -1) for key in ("response_ids", "ar_response_ids") if key in batch},
        "noise_keys": [batch["noise_keys"][number] for number in keep],
        "slots": [batch["slots"][number] for number in keep],
        "num_samples": len(keep),
    }
