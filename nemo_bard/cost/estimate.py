"""What a training run costs before it is started: parameters, FLOPs, memory per GPU, time per step, days.

Everything is arithmetic on a model's configuration; ``nemo-bard plan`` prints it with its formulas and assumptions.
Counts of parameters are exact, FLOPs are those of matrix products and attention, memory is that of what autograd keeps
in transformers' Qwen3-VL layers. ``b`` is the bytes of the compute dtype.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

from nemo_bard.base.settings import choice, flag, fraction, integer, number, setting, text
from nemo_bard.upstream.transformers import text_section, vision_section

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig

GIB = 2**30
CHUNK_TOKENS = 1024  # chunked.DEFAULT_CHUNK_TOKENS, that of GPUs; importing it would import torch
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


GPUS: dict[str, Gpu] = {
    "a100": Gpu(gib=80e9 / GIB, bfloat16=312e12, float32=19.5e12),
    "h100": Gpu(gib=80e9 / GIB, bfloat16=989e12, float32=67e12),
    "h200": Gpu(gib=141e9 / GIB, bfloat16=989e12, float32=67e12),
}
"""SXM models; the A100 with 80 GB."""
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
    deepstack = len(vision.deepstack_visual_indexes) * (2 * merged + mlp)
    tower = patch * v + v + vision.num_position_embeddings * v + vision.depth * block + 2 * v + mlp + deepstack
    table = text.vocab_size * h
    return Parameters(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        layer=layer,
        layers=text.num_hidden_layers * layer + h,
        vision=tower,
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


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What ``nemo-bard plan`` is asked.

    Raises:
        ValueError: If a value is not allowed.
    """

    model: str = setting(check=text(), help="shape: tiny, cpu, 2b, 4b or 8b")
    gpus: int = setting(check=integer(), help="GPUs that train")
    max_length: int = setting(8192, integer(), "row length")
    block_size: int = setting(8, integer(), "tokens denoised together")
    global_batch_size: int = setting(256, integer(), "samples of an optimizer step")
    gpu: str = setting("h100", choice(lambda: GPUS), "kind of GPU")
    dtype: str = setting("bfloat16", choice(lambda: DTYPE_BYTES), "compute dtype")
    activation_checkpointing: bool = setting(False, flag(), "compute activations again in backward")
    dense_mask: bool = setting(False, flag(), "attention with a dense mask rather than flex")
    samples: float = setting(4.4e6, number(1.0), "samples of the whole stage; 4.4e6 as published")
    utilisation: float = setting(0.4, fraction(), "share of the GPU's peak")
    prompt_tokens: int = setting(530, integer(), "prompt tokens of a sample")
    image_tokens: int = setting(400, integer(0), "image tokens of the prompt")
    response_tokens: int = setting(170, integer(), "response tokens of a sample")
    supervised: float = setting(0.5, fraction(), "share of the response that is supervised")
    real_tokens: float = setting(0.97, fraction(), "share of a row that is no padding")

    def __post_init__(self) -> None:
        for field in fields(self):
            field.metadata["check"](f"--{field.name.replace('_', '-')}", getattr(self, field.name))
        if not 0 <= self.image_tokens <= self.prompt_tokens:
            raise ValueError(
                f"--image-tokens must be 0 to --prompt-tokens {self.prompt_tokens}, got {self.image_tokens}"
            )
        if self.global_batch_size % self.gpus:
            raise ValueError(f"--global-batch-size {self.global_batch_size} must be a multiple of --gpus {self.gpus}")
        tokens = row_tokens(self.prompt_tokens, self.response_tokens, self.block_size)
        if tokens > self.max_length:
            raise ValueError(f"--max-length {self.max_length} is shorter than one sample of {tokens} tokens")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimate; bytes, FLOPs and seconds."""

    settings: PlanSettings
    parameters: Parameters
    memory: dict[str, float]
    """Bytes on each GPU by part."""
    fits: bool
    row_tokens: int
    tokens_per_gpu: float
    microbatches: int
    flops_per_sample: Flops
    flops_per_gpu: float
    seconds_per_step: float
    steps: float
    days: float

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, with totals, formulas and assumptions."""
        facts = asdict(self)
        facts["parameters"]["total"] = self.parameters.total
        facts["flops_per_sample"].update(forward=self.flops_per_sample.forward, model=self.flops_per_sample.model)
        facts["memory"]["total"] = sum(self.memory.values())
        return {**facts, "formulas": list(FORMULAS), "assumptions": assumptions(self)}


def make_plan(settings: PlanSettings) -> Plan:
    """Estimate a run of one stage.

    Raises:
        ValueError: If the model is no known shape.
    """
    from nemo_bard.cost.shapes import make_config

    config = make_config(settings.model)
    parameters, width = count_parameters(config), DTYPE_BYTES[settings.dtype]
    sample = (settings.prompt_tokens, settings.response_tokens)
    tokens = row_tokens(*sample, settings.block_size)
    images = settings.max_length // tokens * settings.image_tokens
    activations = activation_memory(
        config,
        tokens=settings.max_length,
        image_tokens=images,
        width=width,
        checkpointing=settings.activation_checkpointing,
        dense_mask=settings.dense_mask,
    )
    total, gpus = parameters.total, settings.gpus
    table = parameters.embedding
    root = total - text_section(config).num_hidden_layers * parameters.layer - parameters.vision
    gathered = width * (root + 2 * parameters.layer) if gpus > 1 else (width * total if width < 4 else 0)
    unreduced = width * (root + parameters.layer) + (4 * table if width < 4 else 0) if gpus > 1 else 0
    memory = {
        "weights": 4 * total / gpus,
        "gradients": 4 * total / gpus,
        "optimizer": 8 * total / gpus,
        "gathered weights": float(gathered),
        "unreduced gradients": float(unreduced),
        "activations, text": activations.text,
        "activations, masks": activations.masks,
        "activations, vision": activations.vision,
        "logits of a chunk": activations.logits,
    }
    flops = training_flops(
        config,
        [sample],
        block_size=settings.block_size,
        image_tokens=settings.image_tokens,
        supervised=settings.supervised * -(-settings.response_tokens // settings.block_size) * settings.block_size,
    )
    per_sample = flops.model + (flops.recomputed if settings.activation_checkpointing else 0)
    per_gpu = per_sample * settings.global_batch_size / gpus
    peak = getattr(GPUS[settings.gpu], settings.dtype)
    seconds = per_gpu / settings.real_tokens / (settings.utilisation * peak)
    tokens_per_gpu = tokens * settings.global_batch_size / gpus
    steps = settings.samples / settings.global_batch_size
    per_row = settings.max_length // tokens
    return Plan(
        settings=settings,
        parameters=parameters,
        memory=memory,
        fits=sum(memory.values()) <= GPUS[settings.gpu].gib * GIB,
        row_tokens=tokens,
        tokens_per_gpu=tokens_per_gpu,
        microbatches=-(-(settings.global_batch_size // gpus) // per_row),
        flops_per_sample=flops,
        flops_per_gpu=per_gpu,
        seconds_per_step=seconds,
        steps=steps,
        days=steps * seconds / 86400,
    )


FORMULAS = (
    "row = prompt + (2 ceil(response / B) - 1) B",
    "pairs = visible (query, key) pairs of the row under the block mask",
    "FLOPs forward = 2 row layers (2 H q + 2 H kv + 3 H I) + 4 layers q pairs + 2 supervised H V + vision tower",
    "FLOPs of a sample = 3 forward (+ forward without LM head with activation checkpointing)",
    "weights, gradients, AdamW = 4 N / G, 4 N / G, 8 N / G bytes (float32 masters, FSDP2)",
    "gathered weights = b (root + 2 layers) if G > 1, else b N copies of autocast if b < 4; root: embedding, LM head,"
    " last norm",
    "unreduced gradients = b (root + 1 layer) + 4 V H of the LM head's sum if b < 4; G > 1 only",
    "text activations = tokens layers (4 H + 3 q + 3 kv + 2 I) b; with checkpointing tokens (layers H b + one layer)",
    "vision activations = patches (depth (11 h b + 2 i b + rotary) + mergers); with checkpointing alike",
    "logits = 3 x 4 bytes x 256 tokens x V",
    "seconds = FLOPs of a sample x samples per GPU / real tokens / (utilisation x peak)",
    "days = samples / global batch x seconds / 86400",
)
"""What is computed; q and kv: heads times head size of queries and of keys."""


def assumptions(plan: Plan) -> list[str]:
    """What was assumed rather than computed, one line each."""
    s = plan.settings
    gpu = GPUS[s.gpu]
    return [
        f"{s.gpu}: {gpu.gib:.1f} GiB, peak {getattr(gpu, s.dtype) / 1e12:.0f} TFLOP/s in {s.dtype} (data sheet)",
        f"the hardware runs at {s.utilisation:.0%} of that peak, recomputation included (--utilisation); not measured",
        f"a sample: {s.prompt_tokens} prompt tokens, {s.image_tokens} of them one image, and {s.response_tokens}"
        f" response tokens in one turn; {plan.row_tokens} tokens as a training row",
        f"{s.supervised:.0%} of the response is supervised (mask noise with t uniform in (0, 1])",
        f"{s.real_tokens:.0%} of the positions of packed rows are real tokens",
        "attention: "
        + (
            f"a dense mask, kept by each layer in {s.dtype}; the FLOPs are still those of visible pairs"
            if s.dense_mask
            else "masked tiles are skipped (flex) and no mask is kept"
        ),
        f"{s.samples:g} samples, seen once, at one block size",
        "memory is that of a full row of --max-length; fragmentation, CUDA context and communication buffers are left out",
        "communication hides behind computation; data loading, checkpoints and validation take no time",
    ]


def render(plan: Plan) -> str:
    """Render the plan as text for a terminal."""
    s, parameters, flops = plan.settings, plan.parameters, plan.flops_per_sample
    total = sum(plan.memory.values())
    lines = [
        f"{s.model} on {s.gpus} x {s.gpu}, {s.dtype}, B = {s.block_size}, rows of {s.max_length} tokens, activation"
        f" checkpointing {'on' if s.activation_checkpointing else 'off'}",
        "",
        f"parameters          {parameters.total:,} ({parameters.vision:,} in the vision tower)",
        "",
        "memory per GPU",
        *(f"  {name:<20}{value / GIB:9.2f} GiB" for name, value in plan.memory.items()),
        f"  {'total':<20}{total / GIB:9.2f} GiB of {GPUS[s.gpu].gib:.1f}: {'fits' if plan.fits else 'DOES NOT FIT'}",
        "",
        "work",
        f"  FLOPs of a sample   {flops.model / 1e12:9.2f} TFLOP (text {flops.text / flops.forward:.0%}, attention"
        f" {flops.attention / flops.forward:.0%}, LM head {flops.head / flops.forward:.0%}, vision"
        f" {flops.vision / flops.forward:.0%})",
        f"  of a step and GPU   {plan.flops_per_gpu / 1e12:9.2f} TFLOP, recomputation included",
        f"  tokens per GPU      {plan.tokens_per_gpu:9.0f} in {plan.microbatches} row(s) of at most {s.max_length}",
        f"  time per step       {plan.seconds_per_step:9.2f} s",
        f"  {s.samples:.3g} samples     {plan.days:9.2f} days ({plan.steps:,.0f} steps of {s.global_batch_size})",
    ]
    if plan.tokens_per_gpu < s.max_length:
        lines.append(
            f"  note: a GPU gets {plan.tokens_per_gpu:.0f} tokens a step, fewer than one row of {s.max_length}; a larger"
            " --global-batch-size or fewer --gpus would use them better"
        )
    lines += ["", "formulas (b: bytes of the compute dtype, G: GPUs, N: parameters)", *(f"  {x}" for x in FORMULAS)]
    lines += ["", "assumptions", *(f"  {x}" for x in assumptions(plan))]
    return "\n".join(lines) + "\n"
