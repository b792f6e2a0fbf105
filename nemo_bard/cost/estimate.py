"""What a training run costs before it is started: memory per GPU, computation, communication, time per step, days.

``cost.count`` counts what one GPU computes and keeps, ``cost.sharding`` what GPUs share and send; here both become the
plan that ``nemo-bard plan`` prints (``cost.report``). ``train.plan`` makes one of a recipe.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

from nemo_bard.base.settings import choice, flag, fraction, integer, number, setting, text
from nemo_bard.cost.count import (
    DTYPE_BYTES,
    GIB,
    GPUS,
    Activations,
    Flops,
    Gpu,
    Parameters,
    activation_memory,
    count_parameters,
    row_tokens,
    training_flops,
)
from nemo_bard.cost.sharding import (
    Links,
    LinkSeconds,
    Sharding,
    Traffic,
    check_replicas,
    fsdp_units,
    gradient_bytes,
    node_replicas,
    step_traffic,
    traffic_seconds,
)
from nemo_bard.upstream.transformers import text_section

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig

__all__ = ["Plan", "PlanSettings", "estimate", "make_plan", "training_flops"]
WORTH = 0.95
"""A change that leaves more than this of the time per step is not worth mentioning."""


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What ``nemo-bard plan`` is asked.

    Raises:
        ValueError: If a value is not allowed.
    """

    model: str = setting(check=text(), help="shape: tiny, cpu, 2b, 4b, 8b or 32b")
    gpus: int = setting(check=integer(), help="GPUs that train")
    gpus_per_node: int = setting(8, integer(), "GPUs of a node")
    dp_replicate_size: int | None = setting(
        None, integer(optional=True), "copies of the model, each sharded over equally many GPUs; null: one per node"
    )
    max_length: int = setting(8192, integer(), "row length")
    packing: bool = setting(True, flag(), "several samples in a row; without, a row holds one sample")
    block_size: int = setting(8, integer(), "tokens denoised together")
    global_batch_size: int = setting(256, integer(), "samples of an optimizer step")
    local_batch_size: int = setting(1, integer(), "rows of a microbatch")
    gpu: str = setting("h100", choice(lambda: GPUS), "kind of GPU")
    dtype: str = setting("bfloat16", choice(lambda: DTYPE_BYTES), "compute dtype")
    activation_checkpointing: bool = setting(False, flag(), "compute activations again in backward")
    defer_fsdp_grad_sync: bool = setting(True, flag(), "reduce gradients after the last microbatch of a step only")
    dense_mask: bool = setting(False, flag(), "attention with a dense mask rather than flex")
    samples: float = setting(4.4e6, number(1.0), "samples of the whole stage; 4.4e6 as published")
    utilisation: float = setting(0.4, fraction(), "share of the GPU's peak")
    link_utilisation: float = setting(0.7, fraction(), "share of the links' bandwidth")
    node_bandwidth: float | None = setting(
        None, number(1.0, optional=True), "GB/s of a GPU to those of its node, each way; null: its data sheet's"
    )
    network_bandwidth: float | None = setting(
        None, number(1.0, optional=True), "GB/s of a GPU out of its node, each way; null: as its maker builds nodes"
    )
    prompt_tokens: int = setting(530, integer(), "prompt tokens of a sample")
    image_tokens: int = setting(400, integer(0), "image tokens of the prompt")
    response_tokens: int = setting(170, integer(), "response tokens of a sample")
    supervised: float = setting(0.5, fraction(), "share of the response that is supervised")
    real_tokens: float = setting(0.97, fraction(), "share of a packed row that is no padding")

    def __post_init__(self) -> None:
        for field in fields(self):
            field.metadata["check"](f"--{field.name.replace('_', '-')}", getattr(self, field.name))
        if not 0 <= self.image_tokens <= self.prompt_tokens:
            raise ValueError(
                f"--image-tokens must be 0 to --prompt-tokens {self.prompt_tokens}, got {self.image_tokens}"
            )
        if self.global_batch_size % self.gpus:
            raise ValueError(f"--global-batch-size {self.global_batch_size} must be a multiple of --gpus {self.gpus}")
        if self.sample_tokens > self.max_length:
            raise ValueError(
                f"--max-length {self.max_length} is shorter than one sample of {self.sample_tokens} tokens"
            )
        check_replicas("--dp-replicate-size", self.sharding.replicas, self.gpus)

    @property
    def sample_tokens(self) -> int:
        """Tokens of a sample as a training row."""
        return row_tokens(self.prompt_tokens, self.response_tokens, self.block_size)

    @property
    def samples_per_row(self) -> int:
        """Samples that share a row."""
        return self.max_length // self.sample_tokens if self.packing else 1

    @property
    def microbatches(self) -> int:
        """Microbatches of a step on each GPU."""
        return -(-self.global_batch_size // (self.gpus * self.samples_per_row * self.local_batch_size))

    @property
    def sharding(self) -> Sharding:
        """How the GPUs share the model."""
        ranks_per_node = min(self.gpus, self.gpus_per_node)
        replicas = self.dp_replicate_size or node_replicas(self.gpus, ranks_per_node)
        return Sharding(ranks=self.gpus, replicas=replicas, ranks_per_node=ranks_per_node)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The estimate; bytes, FLOPs and seconds."""

    settings: PlanSettings
    gpu: Gpu
    sharding: Sharding
    parameters: Parameters
    memory: dict[str, float]
    """Bytes on each GPU by part."""
    row_tokens: int
    """Tokens of a sample as a training row."""
    tokens_per_gpu: float
    microbatches: int
    flops_per_sample: Flops
    flops_per_gpu: float
    compute_seconds: float
    """Of a step."""
    traffic: Traffic
    links: Links
    """As fast as they are assumed to be."""
    communication: dict[str, LinkSeconds]
    """Of a step by kind, as in ``traffic``."""
    advice: tuple[str, ...] = ()
    """What to change, and what comes of it."""

    @property
    def memory_total(self) -> float:
        """Bytes on each GPU."""
        return sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the GPU holds them."""
        return self.memory_total <= self.gpu.gib * GIB

    @property
    def communication_seconds(self) -> float:
        """Of a step: of the busier kind of link, as what goes over different links goes on at the same time."""
        kinds = self.communication.values()
        return max(sum(kind.node for kind in kinds), sum(kind.network for kind in kinds))

    @property
    def bound(self) -> str:
        """What the time of a step is bound by."""
        return "communication" if self.communication_seconds > self.compute_seconds else "computation"

    @property
    def seconds_per_step(self) -> float:
        """With communication behind computation, or the other way round."""
        return max(self.compute_seconds, self.communication_seconds)

    @property
    def seconds_one_by_one(self) -> float:
        """Of a step in which nothing overlaps."""
        return self.compute_seconds + sum(kind.alone for kind in self.communication.values())

    @property
    def steps(self) -> float:
        """Of the whole stage."""
        return self.settings.samples / self.settings.global_batch_size

    @property
    def days(self) -> float:
        """Of the whole stage."""
        return self.steps * self.seconds_per_step / 86400


def make_plan(settings: PlanSettings) -> Plan:
    """Estimate a run of one stage.

    Raises:
        ValueError: If the model is no known shape.
    """
    from nemo_bard.cost.shapes import make_config

    return estimate(make_config(settings.model), settings)


def estimate(
    config: Qwen3VLConfig,
    settings: PlanSettings,
    *,
    gpu: Gpu | None = None,
    trained: int | None = None,
    anchor: Qwen3VLConfig | None = None,
    anchor_offloaded: bool = False,
) -> Plan:
    """Estimate a run of one stage, and what could be changed.

    Args:
        config: The model.
        settings: Everything else; ``settings.model`` is its name only.
        gpu: In place of the one that ``settings.gpu`` names.
        trained: Parameters that have a gradient; all if None.
        anchor: The frozen model that is distilled from, sharded alike and kept in the compute dtype.
        anchor_offloaded: Whether its shards lie in CPU memory while the model trains.
    """

    def plan_of(changed: PlanSettings) -> Plan:
        one = _estimate(config, changed, gpu or GPUS[changed.gpu], trained)
        return one if anchor is None else _with_anchor(one, anchor, offloaded=anchor_offloaded)

    plan = plan_of(settings)
    advice: list[str] = []
    for words, changes in _changes(settings):
        try:
            other = plan_of(replace(settings, **changes))
        except ValueError:  # not with so many GPUs
            continue
        seconds, saved = other.seconds_per_step, (plan.memory_total - other.memory_total) / GIB
        if not plan.fits and saved > 0:
            fits = "fits" if other.fits else "still does not fit"
            advice.append(f"{words}: {saved:.1f} GiB less, {fits}; {seconds:.2f} s per step")
        elif plan.fits and plan.bound == "communication" and seconds < WORTH * plan.seconds_per_step:
            advice.append(f"{words}: {seconds:.2f} s per step{'' if other.fits else ', but does not fit'}")
    return replace(plan, advice=tuple(advice))


def _changes(settings: PlanSettings) -> list[tuple[str, dict[str, object]]]:
    """What could be different: recipe keys and values, and the settings that say the same."""
    changes: list[tuple[str, dict[str, object]]] = []
    if settings.defer_fsdp_grad_sync and settings.microbatches > 1:
        changes.append(("distributed.defer_fsdp_grad_sync: false", {"defer_fsdp_grad_sync": False}))
    if not settings.activation_checkpointing:
        changes.append(("distributed.activation_checkpointing: true", {"activation_checkpointing": True}))
    if not settings.packing:
        changes.append((f"packing.max_length: {settings.max_length}", {"packing": True}))
    for replicas in {1, node_replicas(settings.gpus, settings.sharding.ranks_per_node)} - {settings.sharding.replicas}:
        changes.append((f"distributed.dp_replicate_size: {replicas}", {"dp_replicate_size": replicas}))
    if settings.local_batch_size > 1:
        changes.append(("step_scheduler.local_batch_size: 1", {"local_batch_size": 1}))
    if settings.microbatches > 1:
        rows = 2 * settings.local_batch_size
        changes.append((f"step_scheduler.local_batch_size: {rows}", {"local_batch_size": rows}))
    if settings.max_length // 2 >= settings.sample_tokens:
        half = settings.max_length // 2
        changes.append((f"rows of {half} tokens (longer samples are dropped)", {"max_length": half}))
    return changes


def _estimate(config: Qwen3VLConfig, settings: PlanSettings, gpu: Gpu, trained: int | None) -> Plan:
    parameters, width, sharding = count_parameters(config), DTYPE_BYTES[settings.dtype], settings.sharding
    trained = parameters.total if trained is None else trained
    synced = {"microbatches": settings.microbatches, "deferred": settings.defer_fsdp_grad_sync}
    gradients = gradient_bytes(trained, sharding, **synced)
    traffic = step_traffic(fsdp_units(config, parameters), trained, sharding, width=width, **synced)
    flops = _sample_flops(config, settings)
    per_sample = flops.model + (flops.recomputed if settings.activation_checkpointing else 0)
    samples = settings.global_batch_size / settings.gpus
    node = settings.node_bandwidth * 1e9 if settings.node_bandwidth else gpu.node_bandwidth
    network = settings.network_bandwidth * 1e9 if settings.network_bandwidth else gpu.network_bandwidth
    links = Links(node=settings.link_utilisation * node, network=settings.link_utilisation * network)
    return Plan(
        settings=settings,
        gpu=gpu,
        sharding=sharding,
        parameters=parameters,
        memory={
            "weights": 4 * parameters.total / sharding.shards,
            "gradients": float(gradients.sharded),
            "gradients, deferred": float(gradients.whole),
            "optimizer": 8 * trained / sharding.shards,
            **_gathered_memory(config, parameters, sharding, width),
            **_activations(config, settings, width),
        },
        row_tokens=settings.sample_tokens,
        tokens_per_gpu=settings.sample_tokens * samples,
        microbatches=settings.microbatches,
        flops_per_sample=flops,
        flops_per_gpu=per_sample * samples,
        compute_seconds=_compute_seconds(settings, gpu, per_sample),
        traffic=traffic,
        links=links,
        communication=traffic_seconds(traffic, sharding, links),
    )


def _with_anchor(plan: Plan, anchor: Qwen3VLConfig, *, offloaded: bool) -> Plan:
    """The plan with a forward of the anchor before each of the model's."""
    settings, sharding = plan.settings, plan.sharding
    width, size = DTYPE_BYTES[settings.dtype], count_parameters(anchor).total
    forward = _sample_flops(anchor, settings).forward
    gathered = settings.microbatches * width * size * (sharding.shards - 1) // sharding.shards
    traffic = replace(plan.traffic, all_gather=plan.traffic.all_gather + gathered)
    return replace(
        plan,
        memory={**plan.memory, "anchor": 0.0 if offloaded else width * size / sharding.shards},
        flops_per_gpu=plan.flops_per_gpu + forward * settings.global_batch_size / settings.gpus,
        compute_seconds=plan.compute_seconds + _compute_seconds(settings, plan.gpu, forward),
        traffic=traffic,
        communication=traffic_seconds(traffic, sharding, plan.links),
    )


def _compute_seconds(settings: PlanSettings, gpu: Gpu, flops_of_sample: float) -> float:
    """Seconds that a GPU computes in a step."""
    real = settings.real_tokens if settings.packing else 1.0
    flops = flops_of_sample * settings.global_batch_size / settings.gpus
    return flops / real / (settings.utilisation * getattr(gpu, settings.dtype))


def _gathered_memory(config: Qwen3VLConfig, parameters: Parameters, sharding: Sharding, width: int) -> dict[str, float]:
    """Bytes of whole weights, their gradients, and the buffers that collectives read and write."""
    if sharding.ranks == 1:
        return {"gathered weights": float(width * parameters.total if width < 4 else 0)}
    layer, head = parameters.layer, parameters.head
    root = parameters.total - text_section(config).num_hidden_layers * layer - parameters.vision
    return {
        "gathered weights": float(width * (root + 2 * layer)),
        "unreduced gradients": float(width * (root + layer) + (4 * parameters.embedding if width < 4 else 0)),
        "buffers of collectives": float(width * layer + 4 * max(head, layer)),
    }


def _activations(config: Qwen3VLConfig, settings: PlanSettings, width: int) -> dict[str, float]:
    """Bytes that autograd keeps of a microbatch of full rows."""
    kept: Activations = activation_memory(
        config,
        tokens=settings.max_length,
        image_tokens=settings.max_length // settings.sample_tokens * settings.image_tokens,
        width=width,
        checkpointing=settings.activation_checkpointing,
        dense_mask=settings.dense_mask,
    )
    rows = settings.local_batch_size
    return {
        "activations, text": rows * kept.text,
        "activations, masks": rows * kept.masks,
        "activations, vision": rows * kept.vision,
        "logits of a chunk": kept.logits,
    }


def _sample_flops(config: Qwen3VLConfig, settings: PlanSettings) -> Flops:
    """FLOPs of one forward over a sample."""
    blocks = -(-settings.response_tokens // settings.block_size)
    return training_flops(
        config,
        [(settings.prompt_tokens, settings.response_tokens)],
        block_size=settings.block_size,
        image_tokens=settings.image_tokens,
        supervised=settings.supervised * blocks * settings.block_size,
    )
