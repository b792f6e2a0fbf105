"""Turn what a processor returned into aligned prompts: checked, left-padded, with positions and block ids."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nemo_bard.base.names import mask_in_prompt
from nemo_bard.method.layout import CONTEXT, PADDING, TokenIds, context_block_ids, find_responses
from nemo_bard.upstream.torch import to_device_without_waiting

if TYPE_CHECKING:
    from nemo_bard.generation.protocol import DecodableModel

VISION_KEYS = ("pixel_values", "image_grid_thw", "pixel_values_videos", "video_grid_thw")
PROMPT_KEYS = ("input_ids", "attention_mask", "mm_token_type_ids", *VISION_KEYS)


@dataclass(kw_only=True)
class Prompt:
    """``N`` prompts, left-padded to ``P`` tokens."""

    input_ids: Tensor
    """``[N, P]`` int64."""
    position_ids: Tensor
    """``[3, N, P]`` int64 M-RoPE positions."""
    ids: TokenIds
    """What the attention mask is made of, each ``[N, P]``."""
    next_block: Tensor
    """Block id of the first response block, ``[N]``."""
    next_position: Tensor
    """Position of the first response token, ``[N]``."""
    block_sizes: list[list[int]]
    """Tokens of each block of each row."""
    vision: dict[str, Tensor] = field(default_factory=dict)
    """Pixels on the model's device, grids on the CPU."""

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, padding left out."""
        return [sum(sizes) for sizes in self.block_sizes]

    @property
    def real(self) -> Tensor:
        """True on prompt tokens, False on padding, ``[N, P]``."""
        return self.ids.sample != PADDING


def prepare_prompt(
    model: DecodableModel,
    inputs: dict[str, Tensor],
    *,
    block_size: int,
    max_new_tokens: int,
    end_ids: list[int],
    pad_token_id: int = 0,
    mask_token_id: int | None = None,
) -> Prompt:
    """Check and align prompts.

    Args:
        model: Gives the configuration and M-RoPE positions.
        inputs: ``input_ids`` ``[N, P]`` (padded on either side, with ``attention_mask``) and the vision tensors.
        block_size: ``B``, for the block ids.
        max_new_tokens: For the check against the model's positions.
        end_ids: Ids that end an earlier assistant turn of the prompt.
        pad_token_id: Id put on the left; nothing attends to it.
        mask_token_id: Id that no prompt may hold; the model's if None.

    Returns:
        The prompts on the model's device; grids stay on the CPU.

    Raises:
        ValueError: For an empty or too long prompt, one with the mask token, images without placeholders or the reverse, or missing tensors.
    """
    config = model.config
    device = model.get_input_embeddings().weight.device
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f'{name} must be a tensor, got {type(value).__name__}; call the processor with return_tensors="pt"'
            )
    input_ids = inputs["input_ids"]
    if input_ids.is_floating_point() or input_ids.ndim != 2 or 0 in input_ids.shape:
        raise ValueError(
            f"input_ids must be integers [rows, tokens] with at least one of each, got {input_ids.dtype} {tuple(input_ids.shape)}"
        )
    attention_mask = inputs.get("attention_mask")
    if attention_mask is None:
        attention_mask = torch.ones_like(input_ids)
    if attention_mask.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask must have the shape of input_ids {tuple(input_ids.shape)}, got {tuple(attention_mask.shape)}"
        )
    vision = {
        name: to_device_without_waiting(inputs[name], device) if name.startswith("pixel") else inputs[name].cpu()
        for name in VISION_KEYS
        if inputs.get(name) is not None
    }
    rows = [row[keep] for row, keep in zip(input_ids.cpu(), attention_mask.cpu().bool(), strict=True)]
    vocab_size = config.text_config.vocab_size
    mask_token_id = config.mask_token_id if mask_token_id is None else mask_token_id
    for index, row in enumerate(rows):
        if row.numel() == 0:
            raise ValueError(f"row {index} of input_ids is empty")
        if int(row.min()) < 0 or int(row.max()) >= vocab_size:
            bad = row[(row < 0) | (row >= vocab_size)][0]
            raise ValueError(f"row {index} of input_ids holds {int(bad)}; ids must be 0 to {vocab_size - 1}")
        if mask_token_id is not None and bool((row == mask_token_id).any()):
            raise ValueError(f"row {index} of input_ids: {mask_in_prompt(mask_token_id)}")
    _check_vision(config, rows, vision)

    width = max(row.numel() for row in rows)
    aligned = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
    sample = torch.full_like(aligned, PADDING)
    blocks = torch.zeros_like(aligned)
    next_block = torch.zeros(len(rows), dtype=torch.int64)
    block_sizes: list[list[int]] = []
    for index, row in enumerate(rows):
        size = row.numel()
        row_blocks = context_block_ids(size, find_responses(row, config.assistant_header_ids, end_ids), block_size)
        aligned[index, width - size :] = row
        sample[index, width - size :] = 0
        blocks[index, width - size :] = row_blocks
        next_block[index] = row_blocks[-1] + 1
        block_sizes.append(torch.unique_consecutive(row_blocks, return_counts=True)[1].tolist())
    real = sample != PADDING
    types = ((aligned == config.image_token_id).int() + 2 * (aligned == config.video_token_id).int()) * real
    positions, _ = model.model.get_rope_index(
        aligned,
        mm_token_type_ids=types,
        image_grid_thw=vision.get("image_grid_thw"),
        video_grid_thw=vision.get("video_grid_thw"),
        attention_mask=real.long(),
    )
    next_position = positions.masked_fill(~real, -1).amax((0, 2)) + 1
    limit = config.text_config.max_position_embeddings
    needed = int(next_position.max()) + -(-max_new_tokens // block_size) * block_size
    if needed > limit:
        raise ValueError(
            f"the prompt ends at position {int(next_position.max())} and max_new_tokens={max_new_tokens} (whole blocks of "
            f"{block_size}) would reach {needed}, but max_position_embeddings is {limit}"
        )
    order = torch.arange(width).expand_as(aligned)
    token_ids = TokenIds(sample, torch.full_like(sample, CONTEXT), blocks, order)
    return Prompt(
        input_ids=aligned.to(device, non_blocking=True),
        position_ids=positions.to(device, non_blocking=True),
        ids=TokenIds(*(x.to(device, non_blocking=True) for x in token_ids)),
        next_block=next_block.to(device, non_blocking=True),
        next_position=next_position.to(device, non_blocking=True),
        block_sizes=block_sizes,
        vision=vision,
    )


def _check_vision(config: Any, rows: list[Tensor], vision: dict[str, Tensor]) -> None:
    merge = config.vision_config.spatial_merge_size**2
    for kind, pixels, grid, token in (
        ("image", "pixel_values", "image_grid_thw", config.image_token_id),
        ("video", "pixel_values_videos", "video_grid_thw", config.video_token_id),
    ):
        if (pixels in vision) != (grid in vision):
            missing, given = (grid, pixels) if pixels in vision else (pixels, grid)
            raise ValueError(f"{missing} is missing although {given} is given; pass both as the processor returns them")
        found = sum(int((row == token).sum()) for row in rows)
        needed = int(vision[grid].prod(-1).sum()) // merge if grid in vision else 0
        if found and grid not in vision:
            raise ValueError(f"the prompt has {found} {kind} tokens (id {token}) but {pixels} is missing")
        if found != needed:
            raise ValueError(f"the prompt has {found} {kind} tokens (id {token}) but {grid} needs {needed}")
        if grid not in vision:
            continue
        # A video's frames are separate runs of placeholders, with time stamps between them.
        frames = [(t, h * w // merge) for t, h, w in vision[grid].tolist()]
        sizes = [size for t, size in frames for _ in range(t)] if kind == "video" else [t * size for t, size in frames]
        runs = [size for row in rows for size in _runs(row == token)]
        if runs != sizes:
            where = next(
                (i for i, (a, b) in enumerate(zip(runs, sizes, strict=False)) if a != b), min(len(runs), len(sizes))
            )
            raise ValueError(
                f"runs of {kind} tokens in the prompt are {runs} long but {grid} needs {sizes} (first difference at {where})"
            )
        if int(vision[grid].prod(-1).sum()) != vision[pixels].shape[0]:
            raise ValueError(
                f"{pixels} has {vision[pixels].shape[0]} patches but {grid} needs {int(vision[grid].prod(-1).sum())}"
            )


def _runs(flags: Tensor) -> list[int]:
    """Lengths of the runs of True in ``[P]`` bool."""
    edges = torch.nn.functional.pad(flags.int(), (1, 1)).diff()
    return ((edges == -1).nonzero() - (edges == 1).nonzero()).flatten().tolist()
