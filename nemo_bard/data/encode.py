"""Conversations to token ids and pixels: one way for training rows, for measuring them and for prompts.

Everything goes through the processor's chat template. Videos are read here, so that the same frames are sampled
wherever a clip is used.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from transformers import BatchFeature

from nemo_bard.data.video import prepare_videos

Conversation = list[dict[str, Any]]


class MediaTokens(NamedTuple):
    """The config's token ids and geometry that tell media in a conversation's tokens."""

    image: int
    """Placeholder of image tokens."""
    video: int
    """Placeholder of video tokens."""
    merged: int
    """Patches that become one token."""


class Medium(NamedTuple):
    """One image or video among the tokens of a conversation."""

    place: int
    """First placeholder."""
    tokens: int
    """Number of placeholders."""
    patches: Tensor | None = None
    """``[patches, values]`` float32; None if only measured."""
    grid: Tensor | None = None
    """Patch grid ``[3]``; None if only measured."""


def encode(
    processor: Any, conversations: Sequence[Conversation], *, add_generation_prompt: bool = False
) -> BatchFeature:
    """Apply the chat template, tokenise and preprocess.

    Args:
        processor: A Qwen3-VL processor.
        conversations: Turns with typed parts (or text); images as PIL, videos as paths. Not modified.
        add_generation_prompt: End with the header of the assistant's turn: for prompts.

    Returns:
        What the processor returns: ``input_ids`` ``[N, S]`` and ``attention_mask``, rows padded on the left, and the
        vision tensors.

    Raises:
        ValueError: If a video cannot be read, or nothing installed can decode it.
    """
    opened, arguments = prepare_videos(processor, conversations)
    if len(conversations) > 1:  # padding is a state of the tokenizer, which digests of it would see
        arguments |= {"padding": True, "padding_side": "left"}
    return processor.apply_chat_template(
        opened,
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs=arguments,
    )


def encode_prompts(processor: Any, conversations: Sequence[Conversation]) -> BatchFeature:
    """``encode`` for conversations that end with the turn to answer."""
    return encode(processor, conversations, add_generation_prompt=True)


def encode_headers(
    processor: Any, conversation: Conversation, tokens: MediaTokens, *, add_generation_prompt: bool = False
) -> tuple[Tensor, list[Medium]]:
    """What ``encode`` gives for one conversation, without the pixels of its images.

    Args:
        processor: A Qwen3-VL processor.
        conversation: As for ``encode``; of its PIL images only the sizes are read. Its videos are processed, and so is
            everything if an image is no PIL image or the processor does not resize.
        tokens: How media are told from text.
        add_generation_prompt: As for ``encode``.

    Returns:
        Token ids ``[S]``, and the media in them without patches.

    Raises:
        ValueError: If placeholders and images do not match, or a video cannot be read.
    """
    sizes = _image_sizes(conversation)
    if sizes is None or not getattr(processor.image_processor, "do_resize", True):
        blank = _map_parts(conversation, _blank)
        inputs = encode(processor, [blank], add_generation_prompt=add_generation_prompt)
        ids = inputs["input_ids"][0]
        return ids, [Medium(medium.place, medium.tokens) for medium in find_media(ids, inputs, tokens)]
    bare = _map_parts(conversation, lambda part: {"type": "image"} if part["type"] == "image" else part)
    text = processor.apply_chat_template(bare, tokenize=False, add_generation_prompt=add_generation_prompt)
    ids = torch.tensor(processor.tokenizer(text)["input_ids"])
    places = (ids == tokens.image).nonzero().flatten()
    if len(places) != len(sizes):
        raise ValueError(f"{len(places)} image tokens in its text but {len(sizes)} images")
    count = processor.image_processor.get_number_of_image_patches
    counts = torch.tensor([count(height, width) // tokens.merged for width, height in sizes], dtype=torch.int64)
    repeats = torch.ones_like(ids)
    repeats[places] = counts
    starts = (repeats.cumsum(0) - repeats)[places]
    media = [Medium(*item) for item in zip(starts.tolist(), counts.tolist(), strict=True)]
    return ids.repeat_interleave(repeats), media


def find_media(ids: Tensor, inputs: BatchFeature, tokens: MediaTokens) -> list[Medium]:
    """Images and videos of one encoded conversation, in the order of their placeholders.

    Args:
        ids: Its tokens, ``[S]`` int64.
        inputs: What ``encode`` returned.
        tokens: How media are told from text.

    Raises:
        ValueError: If placeholders and patches do not match.
    """
    found: list[Medium] = []
    for kind, token, pixels in (
        ("image", tokens.image, inputs.get("pixel_values")),
        ("video", tokens.video, inputs.get("pixel_values_videos")),
    ):
        places = (ids == token).nonzero().flatten()
        grids = inputs.get(f"{kind}_grid_thw")
        sizes = [] if grids is None else grids.prod(-1).tolist()
        needed = sum(sizes) // tokens.merged
        if len(places) != needed:
            raise ValueError(f"{len(places)} {kind} tokens but {len(sizes)} {kind}s of {needed} tokens")
        if pixels is None or grids is None:
            continue
        start = 0
        for patches, grid in zip(pixels.split(sizes), grids, strict=True):
            size = len(patches) // tokens.merged
            found.append(Medium(int(places[start]), size, patches, grid))
            start += size
    return sorted(found, key=lambda medium: medium.place)


def _map_parts(conversation: Conversation, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Conversation:
    """The conversation with ``change`` applied to its parts; turns of plain text stay."""
    return [
        message
        if isinstance(message["content"], str)
        else {**message, "content": [change(part) for part in message["content"]]}
        for message in conversation
    ]


def _blank(part: dict[str, Any]) -> dict[str, Any]:
    """An image, of which perhaps only the header is read, as one of the same size."""
    if part["type"] != "image" or not isinstance(part.get("image"), Image.Image):
        return part
    return {**part, "image": Image.new("RGB", part["image"].size)}


def _image_sizes(conversation: Conversation) -> list[tuple[int, int]] | None:
    """Width and height of the images in order; None if one of them is not known, or there is a video."""
    parts = [part for message in conversation for part in message["content"] if isinstance(part, dict)]
    media = [part for part in parts if part["type"] != "text"]
    if any(part["type"] != "image" or not isinstance(part.get("image"), Image.Image) for part in media):
        return None
    return [part["image"].size for part in media]
