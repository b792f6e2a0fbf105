"""Conversations to training batches: ``BlockDiffusionCollator``.

The geometry is ``layout``'s; here conversations become token ids, responses, positions and padded rows. Noise is not
drawn here but in the recipe, so that it can't depend on workers or batching.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin

from nemo_bard.base.errors import one_line
from nemo_bard.data.encode import MediaTokens, encode, encode_headers, find_media
from nemo_bard.data.rejects import ERRORS, BadSample
from nemo_bard.method.layout import (
    CONTEXT,
    IGNORE_INDEX,
    PADDING,
    PLAIN_ROW,
    RowOptions,
    find_responses,
    sample_layout,
)
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.upstream.transformers import rope_index, vision_section

logger = logging.getLogger(__name__)

TURNS: tuple[str, ...] = ("all", "last")
DEFAULT_MAX_LENGTH = 8192
OVERLONG: tuple[str, ...] = ("drop", "error")


@dataclass(frozen=True, kw_only=True)
class TrainingSample:
    """One conversation laid out as ``[context | noisy copies]``; token fields are ``[L]``, int64 unless said."""

    input_ids: Tensor
    """Clean ids everywhere."""
    labels: Tensor
    """Clean ids at noisy tokens (padding included), ``-100`` elsewhere."""
    position_ids: Tensor
    """M-RoPE positions, ``[3, L]``; a noisy token has its clean token's."""
    branch: Tensor
    block: Tensor
    response: Tensor
    """Index of the supervised response (0, 1, ...) for noisy tokens, ``-1`` elsewhere."""
    padding: Tensor
    """bool, noisy tokens after the true end of a response."""
    anchor_block: Tensor | None = None
    """Block under the anchor's block size, see ``layout.SampleLayout``; None without an anchor."""
    next_response: Tensor | None = None
    """Supervised response (0, 1, ...) whose token comes next in the context, ``-1`` elsewhere; None if not asked for."""
    sample_index: int = 0
    pixel_values: Tensor | None = None
    """Patches of all images and videos in the order of their placeholders, ``[patches, values]`` float32."""
    grid_thw: Tensor | None = None
    """Patch grids in the same order, ``[media, 3]``."""

    def __len__(self) -> int:
        return self.input_ids.numel()


class Outline(NamedTuple):
    """Where responses and media of a conversation lie, in tokens."""

    responses: list[tuple[int, int]]
    """Half-open spans of the assistant responses, end token included."""
    media: list[tuple[int, int]]
    """First placeholder and number of tokens of every image and video."""


def lay_out_sample(
    input_ids: Tensor,
    position_ids: Tensor,
    responses: Sequence[tuple[int, int]],
    block_size: int,
    *,
    supervised: Sequence[int] | None = None,
    pad_token_id: int | None = None,
    options: RowOptions = PLAIN_ROW,
    **extra: Any,
) -> TrainingSample:
    """Lay one tokenised conversation out for training.

    Args:
        input_ids: The conversation, ``[S]`` int64.
        position_ids: Its M-RoPE positions, ``[3, S]``.
        responses: Half-open spans of the assistant responses, end token included.
        block_size: Tokens per block.
        supervised: Indices of the responses to learn; all if None.
        pad_token_id: Id that fills the last block of a response; the token that ends the response if None.
        options: What the row holds besides, see ``layout.sample_layout``.
        **extra: Further fields of ``TrainingSample``.

    Returns:
        The sample.

    Raises:
        ValueError: If there is no response, the spans are wrong or ``block_size`` < 1.
    """
    layout = sample_layout(
        len(input_ids),
        responses,
        block_size,
        supervised=supervised,
        options=options,
    )
    ends = torch.tensor([end - 1 for _, end in responses])
    source = torch.where(layout.padding, ends[layout.response.clamp_min(0)], layout.source)
    ids = input_ids[source]
    if pad_token_id is not None:
        ids = ids.masked_fill(layout.padding, pad_token_id)
    known = torch.cat([torch.tensor([-1]), layout.response]).unique()
    following = layout.next_response
    return TrainingSample(
        input_ids=ids,
        labels=torch.where(layout.response >= 0, ids, IGNORE_INDEX),
        position_ids=position_ids[:, source] + layout.offset,
        branch=layout.branch,
        block=layout.block,
        response=torch.searchsorted(known, layout.response) - 1,
        padding=layout.padding,
        anchor_block=layout.anchor_block,
        next_response=None if following is None else torch.searchsorted(known, following) - 1,
        **extra,
    )


def _checked(example: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
    """Conversation and index of a sample, or a ValueError."""
    missing = [key for key in ("conversation", "sample_index") if key not in example]
    if missing:
        raise ValueError(f"a sample has no {missing[0]!r}; found {', '.join(sorted(example))}")
    return example["conversation"], int(example["sample_index"])


@contextlib.contextmanager
def _of_sample(index: int) -> Iterator[None]:
    """Name the sample in the error of what is done with it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"sample {index}: {error}") from error


def _pad(rows: Sequence[Tensor], length: int, value: int | bool) -> Tensor:
    """Stack 1-D tensors, filled with ``value`` on the right up to ``length``."""
    out = torch.full((len(rows), length), value, dtype=rows[0].dtype)
    for row, tensor in zip(out, rows, strict=True):
        row[: tensor.numel()] = tensor
    return out


def _join(pixels: Sequence[Tensor]) -> Tensor:
    """Patches of several images one after the other; of one, 25 MB for a megapixel, without a copy."""
    return pixels[0] if len(pixels) == 1 else torch.cat(list(pixels))


class BlockDiffusionCollator:
    """Turns samples ``{"conversation": [...], "sample_index": int}`` into the batch described in docs/architecture.md.

    An example is a sample, which gets a row of its own, or a list of samples that share a row (``nemo_bard.data.packing``).

    A recipe names this class as ``dataloader.collate_fn``; AutoModel binds the processor and the settings to it, and
    the recipe completes it with the model's configuration, the only home of the block size and the token ids.

    Every batch holds image patches: without an image in it, row 0 ends in one image token that nobody sees, because
    all ranks have to run the vision tower equally often (FSDP). Videos join the images for the same reason; Qwen3-VL's
    tower treats a frame of a video as an image, so the features are the same.

    Args:
        processor: Qwen3-VL's processor.
        config: The model's configuration.
        max_length: Longest training row of a sample, noisy copies included, in tokens. Nothing is ever cut.
        turns: Supervise ``all`` assistant turns, or only the ``last``.
        overlong: What to do with a longer sample: ``drop`` (logged; ``num_dropped`` of the batch) or ``error``.
        pad_to_multiple_of: Round the row length up to a multiple of this.
        max_row_length: Longest row of samples that share one, ``max_length`` if None (the recipe's, not a setting).
        options: What rows hold besides (the recipe's): with ``anchor_block_size`` a batch has ``anchor_block_ids``, with
            ``next_token`` it has ``ar_response_ids``; noise with its complement needs two noisy copies.

    Raises:
        ValueError: If a setting is not allowed or the configuration lacks a token id.
    """

    def __init__(
        self,
        processor: ProcessorMixin,
        config: BardVLConfig,
        *,
        max_length: int = DEFAULT_MAX_LENGTH,
        turns: str = "all",
        overlong: str = "drop",
        pad_to_multiple_of: int = 1,
        max_row_length: int | None = None,
        options: RowOptions = PLAIN_ROW,
    ) -> None:
        for name, value, allowed in (("turns", turns, TURNS), ("overlong", overlong, OVERLONG)):
            if value not in allowed:
                raise ValueError(f"collate_fn.{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, value in (("max_length", max_length), ("pad_to_multiple_of", pad_to_multiple_of)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"collate_fn.{name} must be an integer >= 1, got {value!r}")
        for name, value in (
            ("mask_token_id", config.mask_token_id),
            ("assistant_header_ids", config.assistant_header_ids),
            ("eos_token_id", config.end_ids),
        ):
            if value is None or value == []:
                raise ValueError(f"the model's config.json has no {name}; make a start point with `nemo-bard convert`")
        self.processor, self.config = processor, config
        self.max_length, self.turns, self.overlong = max_length, turns, overlong
        self.pad_to_multiple_of, self.options = pad_to_multiple_of, options
        self.max_row_length = max_row_length or max_length
        self._media_tokens = MediaTokens(
            config.image_token_id, config.video_token_id, vision_section(config).spatial_merge_size ** 2
        )
        self._rope_index = rope_index(config)
        self.keep_bad = False
        """Leave samples that cannot be used out of the batch, which names them in ``rejects``, and what to do about them
        to the recipe, instead of raising ValueError."""
        self.shortest_row = 1
        """Rows are padded to at least this many tokens (the recipe's)."""
        self.pixel_dtype = torch.float32
        """Of ``pixel_values``: what the vision tower computes in, which it would cast them to (the recipe's)."""
        self.lengths_file: Path | None = None
        """Where the lengths that rows were planned with are kept, if they are."""

    @property
    def block_size(self) -> int:
        """Tokens per block, the model's.

        Raises:
            ValueError: If its configuration does not say.
        """
        if self.config.block_size is None:
            raise ValueError("the model's config.json has no block_size; make a start point with `nemo-bard convert`")
        return self.config.block_size

    def __call__(self, examples: Sequence[Any]) -> dict[str, Any]:
        """Collate rows of samples; see ``stack`` for the batch.

        Raises:
            ValueError: If a sample is too long and must not be dropped. Without ``keep_bad``, if a sample cannot be
                trained on (names its index), or samples that share a row take more than ``max_row_length`` tokens.
        """
        rows, slots, dropped, rejects = [], [], 0, []
        for slot, example in enumerate(examples):
            row: list[TrainingSample] = []
            for item in example if isinstance(example, list) else [example]:
                sample = self._try(item, row)
                if isinstance(sample, BadSample):
                    rejects.append(replace(sample, slot=slot))
                elif sample is None:
                    dropped += 1
                else:
                    row.append(sample)
            if row:
                rows.append(row)
                slots += [slot] * len(row)
        return {**self.stack(rows), "slots": slots, "num_dropped": dropped, "rejects": rejects}

    def _try(self, example: Any, row: Sequence[TrainingSample]) -> TrainingSample | BadSample | None:
        """Lay a sample out beside those of its row: the sample, None if it is too long, or why it cannot be used."""
        if isinstance(example, BadSample):
            return example
        try:
            sample = self._lay_out(example)
            if self._fits(sample):
                self._check_room(sample, row)
        except ERRORS as error:
            if not self.keep_bad:
                raise
            index = int(example.get("index", example.get("sample_index", -1)))
            reason, sample_index = one_line(error), int(example.get("sample_index", index))
            return BadSample(index=index, reason=reason, sample_index=sample_index)
        return self._short_enough(sample)

    def _check_room(self, sample: TrainingSample, row: Sequence[TrainingSample]) -> None:
        length = len(sample) + sum(len(other) for other in row)
        if length > self.max_row_length:
            names = ", ".join(str(one.sample_index) for one in (*row, sample))
            where = f"; delete {self.lengths_file}" if self.lengths_file else ""
            raise ValueError(
                f"samples {names} share a row and take {length} tokens, more than {self.max_row_length}: they are not as"
                f" they were when their lengths were measured{where}"
            )

    def encode(self, example: dict[str, Any]) -> TrainingSample | None:
        """Tokenise and lay out one sample.

        Args:
            example: ``conversation`` as ``processor.apply_chat_template`` takes it, and ``sample_index``.

        Returns:
            The sample, or None if it is longer than ``max_length`` and ``overlong`` is ``drop``.

        Raises:
            ValueError: If it cannot be trained on: no or an empty answer, placeholders that do not match the images,
                or too long with ``overlong: error``.
        """
        return self._short_enough(self._lay_out(example))

    def _lay_out(self, example: dict[str, Any]) -> TrainingSample:
        conversation, index = _checked(example)
        with _of_sample(index):
            inputs = encode(self.processor, [conversation])
            ids = inputs["input_ids"][0]
            media = find_media(ids, inputs, self._media_tokens)
            self._check_ids(ids)
        responses = self._responses(ids, conversation, index)
        sample = lay_out_sample(
            ids.masked_fill(ids == self.config.video_token_id, self.config.image_token_id),
            self._positions(ids, inputs),
            responses,
            self.block_size,
            supervised=None if self.turns == "all" else [len(responses) - 1],
            options=self.options,
            sample_index=index,
        )
        kept = int((sample.branch == CONTEXT).sum())  # what follows the last supervised block is not laid out
        laid_out = [medium for medium in media if medium.place < kept]
        if laid_out:
            pixels = _join([medium.patches for medium in laid_out if medium.patches is not None])
            grids = torch.stack([medium.grid for medium in laid_out if medium.grid is not None])
            sample = replace(sample, pixel_values=pixels, grid_thw=grids)
        return sample

    def _fits(self, sample: TrainingSample) -> bool:
        return len(sample) <= self.max_length

    def _short_enough(self, sample: TrainingSample) -> TrainingSample | None:
        """The sample, or None if it is longer than ``max_length`` and ``overlong`` is ``drop``."""
        if self._fits(sample):
            return sample
        message = (
            f"sample {sample.sample_index} takes {len(sample)} tokens (noisy copies included), more than"
            f" collate_fn.max_length {self.max_length}"
        )
        if self.overlong == "error":
            raise ValueError(message)
        logger.warning("%s; dropped", message)
        return None

    def outline(self, example: dict[str, Any]) -> Outline:
        """Find out where responses and media of a sample lie, without pixels where the sizes of images are known.

        Args:
            example: As for ``encode``; pixels of its images are not read. Videos, and images of unknown size, are
                processed as for training.

        Returns:
            Exactly what ``encode`` finds.

        Raises:
            ValueError: If it cannot be trained on, as ``encode``.
        """
        conversation, index = _checked(example)
        with _of_sample(index):
            ids, media = encode_headers(self.processor, conversation, self._media_tokens)
            self._check_ids(ids)
        spans = [(medium.place, medium.tokens) for medium in media]
        return Outline(self._responses(ids, conversation, index), spans)

    def _check_ids(self, ids: Tensor) -> None:
        if bool((ids == self.config.mask_token_id).any()):
            raise ValueError(f"its text holds the mask token (id {self.config.mask_token_id})")

    def _responses(self, ids: Tensor, conversation: Sequence[dict[str, Any]], index: int) -> list[tuple[int, int]]:
        spans = find_responses(ids, self.config.assistant_header_ids, self.config.end_ids)
        turns = sum(message["role"] == "assistant" for message in conversation)
        if turns == 0:
            raise ValueError(f"sample {index} has no assistant turn")
        if len(spans) != turns:
            raise ValueError(
                f"sample {index} has {turns} assistant turns but {len(spans)} responses in its tokens; does its text"
                f" hold chat markup, or do assistant_header_ids and eos_token_id not fit the chat template?"
            )
        for number, (start, end) in enumerate(spans):
            if int(ids[end - 1]) not in self.config.end_ids:
                raise ValueError(f"sample {index}: the chat template does not end assistant turn {number}")
            if end - start == 1:
                raise ValueError(f"sample {index}: assistant turn {number} is empty")
        return spans

    def _positions(self, ids: Tensor, inputs: BatchFeature) -> Tensor:
        """M-RoPE positions ``[3, S]`` of a conversation, by Qwen3-VL's own function."""
        kinds = (ids == self.config.image_token_id).long() + 2 * (ids == self.config.video_token_id).long()
        positions, _ = self._rope_index(
            ids[None],
            mm_token_type_ids=kinds[None],
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
        )
        return positions[:, 0]

    def _hidden_image(self) -> TrainingSample:
        """One image token with blank patches, part of no sample."""
        vision = vision_section(self.config)
        side = vision.spatial_merge_size
        frames, patch = cast("tuple[int, int]", (vision.temporal_patch_size, vision.patch_size))
        values = vision.in_channels * frames * patch**2
        one = torch.zeros(1, dtype=torch.int64)
        return TrainingSample(
            input_ids=one + self.config.image_token_id,
            labels=one + IGNORE_INDEX,
            position_ids=torch.zeros(3, 1, dtype=torch.int64),
            branch=one + CONTEXT,
            block=one,
            response=one - 1,
            padding=torch.zeros(1, dtype=torch.bool),
            anchor_block=one,
            next_response=one - 1,
            sample_index=-1,
            pixel_values=torch.zeros(side * side, values),
            grid_thw=torch.tensor([[1, side, side]]),
        )

    def stack(self, rows: Sequence[Sequence[TrainingSample]]) -> dict[str, Any]:
        """Pad rows of one or more samples to one length.

        Args:
            rows: Samples of each row, in order; no row at all gives one row of padding.

        Returns:
            The batch, see docs/architecture.md; ``[N, L]`` tensors, ``position_ids`` ``[3, N, L]``.
        """
        keys, parts = [], [[(sample, number) for number, sample in enumerate(row)] for row in rows] or [[]]
        for row, samples in enumerate(rows):
            keys += [(row, number, sample.sample_index) for number, sample in enumerate(samples)]
        if all(sample.grid_thw is None for samples in rows for sample in samples):
            parts[0] = [*parts[0], (self._hidden_image(), PADDING)]
        lengths = [sum(len(sample) for sample, _ in row) for row in parts]
        multiple = self.pad_to_multiple_of
        length = -(-max(*lengths, self.shortest_row) // multiple) * multiple
        names = ("response", "next_response") if self.options.next_token else ("response",)
        offset, responses = 0, {name: [] for name in names}
        for row in parts:
            shifted = {name: [] for name in names}
            for sample, _ in row:
                for name in names:
                    own = getattr(sample, name)
                    shifted[name].append(torch.where(own >= 0, own + offset, -1))
                offset += int(sample.response.max()) + 1
            for name in names:
                responses[name].append(torch.cat(shifted[name]))

        def rows_of(name: str, fill: int | bool) -> Tensor:
            return _pad([torch.cat([getattr(sample, name) for sample, _ in row]) for row in parts], length, fill)

        laid_out = [sample for row in parts for sample, _ in row]
        pixels = [one.pixel_values.to(self.pixel_dtype) for one in laid_out if one.pixel_values is not None]
        positions = [torch.cat([sample.position_ids for sample, _ in row], 1) for row in parts]
        extra = {} if self.options.anchor_block_size is None else {"anchor_block_ids": rows_of("anchor_block", 0)}
        if self.options.next_token:
            extra["ar_response_ids"] = _pad(responses["next_response"], length, -1)
        return {
            **extra,
            "input_ids": rows_of("input_ids", self.config.end_ids[0]),
            "labels": rows_of("labels", IGNORE_INDEX),
            "position_ids": torch.stack([_pad([p[axis] for p in positions], length, 0) for axis in range(3)]),
            "sample_ids": _pad(
                [torch.cat([torch.full((len(s),), number) for s, number in row]) for row in parts], length, PADDING
            ),
            "branch_ids": rows_of("branch", CONTEXT),
            "block_ids": rows_of("block", 0),
            "response_ids": _pad(responses["response"], length, -1),
            "padding_mask": rows_of("padding", False),
            "noise_keys": keys,
            "num_samples": len(keys),
            "rejects": [],
            "pixel_values": _join(pixels),
            "image_grid_thw": torch.cat([sample.grid_thw for sample in laid_out if sample.grid_thw is not None]),
        }
