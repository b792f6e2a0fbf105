"""Counts for one model on one GPU: parameters, tokens, FLOPs, activations.

Everything is arithmetic on a model's configuration. Counts of parameters are exact, FLOPs are those of matrix products and
attention, memory is that of what autograd keeps in transformers' Qwen3-VL layers. ``b`` is the bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_bard.upstream.transformers import text_section, vision_section

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

GIB = 2**30
CHUNK_TOKENS = 256  # chunked.DEFAULT_CHUNK_TOKENS, that of GPUs; importing it would import torch
LOGIT_COPIES = 3
"""Logits of a chunk, their log-probabilities and their gradient; cross-entropy alone needs one."""


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A data-centre GPU, from its maker's data sheet."""

    gib: float
    bfloat16: float
    """Dense peak, FLOP/s."""
    float32: float
    """Dense peak outside the tensor cores, FLOP/s."""
    node_bandwidth: float
    """To the other GPUs of its node (NVLink), bytes/s in each direction."""
    network_bandwidth: float
    """Its share of what leaves the node, bytes/s in each direction."""


GPUS: dict[str, Gpu] = {
    "a100": Gpu(gib=80e9 / GIB, bfloat16=312e12, float32=19.5e12, node_bandwidth=300e9, network_bandwidth=25e9),
    "h100": Gpu(gib=80e9 / GIB, bfloat16=989e12, float32=67e12, node_bandwidth=450e9, network_bandwidth=50e9),
    "h200": Gpu(gib=141e9 / GIB, bfloat16=989e12, float32=67e12, node_bandwidth=450e9, network_bandwidth=50e9),
}
"""SXM models in nodes with a network adapter per GPU (200 Gb/s beside an A100, else 400); the A100 with 80 GB."""
DTYPE_BYTES = {"bfloat16": 2, "float32": 4}


def peak_flops(device_name: str, dtype: str) -> float | None:
    """Peak FLOP/s of a CUDA device by the name it reports, None if it is not known."""
    return next((getattr(gpu, dtype) for key, gpu in GPUS.items() if key in device_name.lower()), None)


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """Numbers of parameters; a tied LM head is counted once, in ``embedding``."""

    embedding: int
    head: int
    """LM head; 0 if tied."""
    layer: int
    """One text layer."""
    layers: int
    """All text layers and the last norm."""
    vision: int
    """Vision tower with its mergers."""
    block: int
    """One block of the vision tower."""
    deepstack: int
    """One deepstack merger."""

    @property
    def total(self) -> int:
        """All parameters."""
        return self.embedding + self.head + self.layers + self.vision


def attention_widths(text: Qwen3VLTextConfig) -> tuple[int, int]:
    """Width of the queries of all heads, and of the keys."""
    return text.num_attention_heads * text.head_dim, (
        text.num_key_value_heads or text.num_attention_heads
    ) * text.head_dim


def patch_pixels(vision: Qwen3VLVisionConfig) -> int:
    """Pixels of a patch, over the frames that share it."""
    side, frames = vision.patch_size, vision.temporal_patch_size
    if not isinstance(side, int) or not isinstance(frames, int):
        raise ValueError(f"vision_config: patch_size {side!r} and temporal_patch_size {frames!r} must be integers")
    return frames * side**2


def count_parameters(config: Qwen3VLConfig) -> Parameters:
    """Count a Qwen3-VL model's parameters from its configuration, exactly."""
    text, vision = text_section(config), vision_section(config)
    h, inter = text.hidden_size, text.intermediate_size
    q, kv = attention_widths(text)
    layer = 2 * h * q + 2 * h * kv + 3 * h * inter + 2 * text.head_dim + 2 * h
    v, vi, out = vision.hidden_size, vision.intermediate_size, vision.out_hidden_size
    merged = v * vision.spatial_merge_size**2
    block = 4 * v + (3 * v * v + 3 * v) + (v * v + v) + (2 * v * vi + vi + v)
    patch = vision.in_channels * patch_pixels(vision)
    mlp = merged * merged + merged + merged * out + out
    deepstack, number = 2 * merged + mlp, len(vision.deepstack_visual_indexes)
    tower = patch * v + v + vision.num_position_embeddings * v + vision.depth * block + 2 * v + mlp + number * deepstack
    table = text.vocab_size * h
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        layer=layer,
        layers=text.num_hidden_layers * layer + h,
        vision=tower,
        block=block,
        deepstack=deepstack,
    )


def row_tokens(prompt: int, response: int, block_size: int) -> int:
    """Tokens of a single-turn training row ``[prompt | clean | noisy]``: the last clean block is not laid out."""
    blocks = -(-response // block_size)
    return prompt + (2 * blocks - 1) * block_size


def visible_pairs(prompt: int, response: int, block_size: int) -> int:
    """(query, key) pairs that may attend in such a row, with ``context_attention: block``."""
    blocks, (whole, rest) = -(-response // block_size), divmod(prompt, block_size)
    inside = block_size**2 * whole * (whole + 1) // 2 + rest * prompt
    sums = [n * block_size * prompt + block_size**2 * n * (n + 1) // 2 for n in (blocks - 1, blocks)]
    return inside + sum(sums)  # a clean and a noisy block j see as many keys: prompt + (j + 1) * B


@dataclass(frozen=True, kw_only=True)
class Flops:
    """FLOPs of one forward, 2 for a multiplication and an addition."""

    text: float
    attention: float
    head: float
    vision: float

    def __add__(self, other: Flops) -> Flops:
        """Both together."""
        return Flops(**{key: value + getattr(other, key) for key, value in vars(self).items()})

    @property
    def forward(self) -> float:
        """One forward."""
        return self.text + self.attention + self.head + self.vision

    @property
    def model(self) -> float:
        """Forward and backward (twice the forward), nothing recomputed."""
        return 3 * self.forward

    @property
    def recomputed(self) -> float:
        """What activation checkpointing runs again: the layers, not the LM head."""
        return self.forward - self.head


def training_flops(
    config: Qwen3VLConfig,
    samples: Sequence[tuple[int, int]],
    *,
    block_size: int,
    image_tokens: int,
    supervised: float,
    dense_attention: bool = False,
) -> Flops:
    """FLOPs of training rows.

    Args:
        config: The model.
        samples: Prompt and response tokens of each single-turn sample.
        block_size: Tokens per block.
        image_tokens: Tokens of the one image of each sample; 0 for none.
        supervised: Supervised tokens of all samples together.
        dense_attention: Count all pairs of a row of one sample, as a dense mask computes them, not the visible ones.

    Returns:
        FLOPs of one forward over all samples, and what follows from them.
    """
    lengths = [row_tokens(prompt, response, block_size) for prompt, response in samples]
    pairs = sum(
        length**2 if dense_attention else visible_pairs(*sample, block_size)
        for length, sample in zip(lengths, samples, strict=True)
    )
    patches = image_tokens * vision_section(config).spatial_merge_size ** 2
    return row_flops(config, tokens=sum(lengths), pairs=pairs, supervised=supervised, frames=[patches] * len(samples))


def row_flops(
    config: Qwen3VLConfig, *, tokens: int, pairs: int, supervised: float, frames: Sequence[int] = ()
) -> Flops:
    """FLOPs of one forward: matrix products and attention.

    Args:
        config: The model.
        tokens: Tokens of the rows, noisy copies included.
        pairs: (query, key) pairs that may attend.
        supervised: Tokens at which the LM head runs.
        frames: Patches of each image, or of each frame of a video.
    """
    text, vision = text_section(config), vision_section(config)
    h, (q, kv) = text.hidden_size, attention_widths(text)
    weights = 2 * h * q + 2 * h * kv + 3 * h * text.intermediate_size
    v, merged = vision.hidden_size, vision.hidden_size * vision.spatial_merge_size**2
    patches = sum(frames)
    block = 2 * patches * (4 * v * v + 2 * v * vision.intermediate_size) + 4 * sum(n**2 for n in frames) * v
    merge = 2 * patches // vision.spatial_merge_size**2 * (merged**2 + merged * vision.out_hidden_size)
    patch = 2 * patches * v * vision.in_channels * patch_pixels(vision)
    tower = patch + vision.depth * block + (1 + len(vision.deepstack_visual_indexes)) * merge
    return Flops(
        text=2.0 * tokens * text.num_hidden_layers * weights,
        attention=4.0 * text.num_hidden_layers * q * pairs,
        head=2.0 * supervised * h * text.vocab_size,
        vision=float(tower),
    )


@dataclass(frozen=True, kw_only=True)
class Activations:
    """Bytes that autograd keeps for one microbatch."""

    text: float
    masks: float
    """Dense masks that each layer keeps in the compute dtype; 0 with flex."""
    vision: float
    logits: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.text + self.masks + self.vision + self.logits


def text_layer_bytes(config: Qwen3VLConfig, width: int) -> int:
    """Bytes that one text layer keeps for each token; ``width`` is ``b``.

    With ``nemo_bard.model.lean``: inputs and outputs of the two norms of width H, what enters the norms of queries and keys,
    queries, keys, values and output of attention, and the two halves of the MLP.
    """
    text = text_section(config)
    q, kv = attention_widths(text)
    return (4 * text.hidden_size + 3 * q + 3 * kv + 2 * text.intermediate_size) * width


def vision_block_bytes(config: Qwen3VLConfig, width: int) -> int:
    """Bytes that one vision block keeps for each patch; its rotary embedding is computed in float32."""
    vision = vision_section(config)
    h, inter = vision.hidden_size, vision.intermediate_size
    rotary = 2 * h * 4 * (1 if width == 4 else 2)
    return 11 * h * width + rotary + 2 * inter * width


def activation_memory(
    config: Qwen3VLConfig,
    *,
    tokens: int,
    image_tokens: int,
    width: int,
    checkpointing: bool = False,
    dense_mask: bool = False,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Activations:
    """Activations of a microbatch of ``tokens`` tokens, ``image_tokens`` of them image tokens.

    With checkpointing a layer keeps its input, and one layer at a time everything.
    """
    text, vision = text_section(config), vision_section(config)
    layers, masks = text.num_hidden_layers, 1 if checkpointing else text.num_hidden_layers
    layer, block = text_layer_bytes(config, width), vision_block_bytes(config, width)
    patches = image_tokens * vision.spatial_merge_size**2
    mergers = (1 + len(vision.deepstack_visual_indexes)) * 4 * vision.hidden_size * width
    if checkpointing:
        text_bytes, vision_bytes = layers * text.hidden_size * width + layer, vision.depth * vision.hidden_size * width
        vision_bytes += block
    else:
        text_bytes, vision_bytes = layers * layer, vision.depth * block
    return Activations(
        text=float(tokens * text_bytes),
        masks=float(masks * tokens**2 * width if dense_mask else 0),
        vision=float(patches * (vision_bytes + mergers)),
        logits=float(LOGIT_COPIES * 4 * chunk_tokens * text.vocab_size),
    )


def one_process_peak(parameters: Parameters, activations: Activations) -> float:
    """Peak bytes of one forward and backward in float32 on one device, without optimizer and from empty gradients.

    The LM head's gradient exists from the end of the forward, beside all activations; the others come while activations
    go: ``weights + max(activations + head gradient, all gradients)``.
    """
    head = 4 * (parameters.head or parameters.embedding)
    return 4 * parameters.total + max(activations.total + head, 4 * parameters.total)
