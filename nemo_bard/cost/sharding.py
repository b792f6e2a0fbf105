"""What ranks that share a model hold of it, and send each other: FSDP2, and HSDP with several replicas.

Ranks are counted node by node, as torchrun does; the shards of a replica lie on ranks that follow each other. Bytes are
exact where the ranks divide the first dimension of every parameter, as they do for the released shapes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_bard.cost.count import Parameters
from nemo_bard.upstream.transformers import text_section, vision_section

if TYPE_CHECKING:
    from transformers import Qwen3VLConfig

GRADIENT_BYTES = 4
"""Of a gradient between backward and optimizer, and of its reduction: float32 whatever the compute dtype."""


def node_replicas(ranks: int, ranks_per_node: int) -> int:
    """Replicas of the model with ``dp_replicate_size: auto``: one per node.

    Args:
        ranks: All ranks.
        ranks_per_node: Ranks of one node.

    Returns:
        The number of nodes; 1 where a node has one rank alone (replicas have to be sharded), or nodes are not alike.
    """
    if ranks_per_node < 2 or ranks % ranks_per_node:
        return 1
    return ranks // ranks_per_node


def check_replicas(key: str, replicas: int, ranks: int) -> None:
    """Check a number of replicas.

    Raises:
        ValueError: Names ``key`` unless the replicas divide the ranks, with several ranks for each.
    """
    if replicas != 1 and (ranks % replicas or replicas == ranks):
        raise ValueError(
            f"{key}={replicas} must divide the number of ranks and be smaller than it, which is {ranks}; 1: no replicas"
        )


@dataclass(frozen=True, kw_only=True)
class Sharding:
    """How ranks share a model."""

    ranks: int
    replicas: int
    """Copies of the model, each sharded over equally many ranks."""
    ranks_per_node: int

    @property
    def shards(self) -> int:
        """Ranks that share a replica."""
        return self.ranks // self.replicas

    @property
    def shard_nodes(self) -> int:
        """Nodes that a replica lies on."""
        return -(-self.shards // self.ranks_per_node)

    @property
    def replica_nodes(self) -> int:
        """Nodes that the ranks with the same shard lie on."""
        return min(self.replicas, -(-self.ranks // self.ranks_per_node))


@dataclass(frozen=True, kw_only=True)
class Unit:
    """Parameters that are gathered, and whose gradients are reduced, together; AutoModel makes the units."""

    parameters: int
    again: bool
    """Whether they are gathered again for the backward, having been given up after the forward."""


def fsdp_units(config: Qwen3VLConfig, parameters: Parameters) -> list[Unit]:
    """The units: each layer, block and deepstack merger, untied embeddings, and the rest.

    The last of each list stays gathered from forward to backward, and so do LM head and rest.

    Args:
        config: The model.
        parameters: Its numbers of parameters.
    """
    vision = vision_section(config)
    lists = (
        (text_section(config).num_hidden_layers, parameters.layer),
        (vision.depth, parameters.block),
        (len(vision.deepstack_visual_indexes), parameters.deepstack),
    )
    units = [Unit(parameters=size, again=i + 1 < number) for number, size in lists for i in range(number)]
    if parameters.head:
        units += [Unit(parameters=parameters.embedding, again=True), Unit(parameters=parameters.head, again=False)]
    rest = parameters.total - sum(unit.parameters for unit in units)
    return [*units, Unit(parameters=rest, again=False)]


@dataclass(frozen=True, kw_only=True)
class GradientBytes:
    """Bytes of gradients that a rank holds between two microbatches, or after the last one."""

    whole: int
    """Unreduced, of the whole model: what a rank holds between microbatches while gradient sync is deferred."""
    sharded: int
    """This rank's share of the reduced ones."""


def gradient_bytes(trained: int, sharding: Sharding, *, microbatches: int, deferred: bool) -> GradientBytes:
    """The most that a rank holds of gradients when no backward is running.

    Args:
        trained: Parameters with a gradient.
        sharding: How ranks share the model.
        microbatches: Microbatches of an optimizer step on a rank.
        deferred: ``distributed.defer_fsdp_grad_sync``: gradients are reduced after the last microbatch alone.

    Returns:
        Bytes of either kind. While the last backward turns whole gradients into shards there are never more bytes than
        of the whole ones, so that only one of the two counts.
    """
    if deferred and microbatches > 1 and sharding.ranks > 1:
        return GradientBytes(whole=GRADIENT_BYTES * trained, sharded=0)
    return GradientBytes(whole=0, sharded=-(-GRADIENT_BYTES * trained // sharding.shards))


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that a rank receives, and sends, in an optimizer step."""

    all_gather: int
    reduce_scatter: int
    all_reduce: int
    """Between replicas."""


def step_traffic(
    units: Iterable[Unit], trained: int, sharding: Sharding, *, width: int, microbatches: int, deferred: bool
) -> Traffic:
    """Communication of an optimizer step, with the ring algorithm.

    Args:
        units: What is gathered together.
        trained: Parameters with a gradient.
        sharding: How ranks share the model.
        width: Bytes of the compute dtype, in which weights are gathered.
        microbatches: Microbatches of the step on a rank.
        deferred: Whether gradients are reduced once a step rather than once a microbatch.
    """
    shards, replicas = sharding.shards, sharding.replicas
    gathered = sum(unit.parameters * (2 if unit.again else 1) for unit in units)
    reductions = 1 if deferred else microbatches
    share = GRADIENT_BYTES * trained // shards
    return Traffic(
        all_gather=microbatches * width * gathered * (shards - 1) // shards,
        reduce_scatter=reductions * GRADIENT_BYTES * trained * (shards - 1) // shards,
        all_reduce=reductions * 2 * share * (replicas - 1) // replicas,
    )


@dataclass(frozen=True, kw_only=True)
class LinkSeconds:
    """How long a collective keeps either kind of link busy."""

    node: float
    network: float

    @property
    def alone(self) -> float:
        """Time of the collective where nothing else is sent."""
        return max(self.node, self.network)


@dataclass(frozen=True, kw_only=True)
class Links:
    """What connects the ranks, bytes/s in each direction."""

    node: float
    """Of a rank to the others of its node."""
    network: float
    """Of a rank, out of its node."""

    def seconds(self, received: float, *, members: int, nodes: int) -> LinkSeconds:
        """Time of a ring collective.

        Args:
            received: Bytes that each member receives.
            members: Ranks that take part, equally many on each node.
            nodes: Nodes that they lie on.

        Returns:
            Within a node each member receives the bytes; into a node comes what its members do not have, over the network
            adapters of all of them at once.
        """
        if members == 1:
            return LinkSeconds(node=0.0, network=0.0)
        whole = received * members / (members - 1)
        return LinkSeconds(
            node=received / self.node if members > nodes else 0.0,
            network=whole * (nodes - 1) / nodes / (members / nodes * self.network),
        )


def traffic_seconds(traffic: Traffic, sharding: Sharding, links: Links) -> dict[str, LinkSeconds]:
    """Seconds of each kind of communication in an optimizer step.

    Args:
        traffic: What is sent.
        sharding: Between whom.
        links: Over what.
    """
    within = {"members": sharding.shards, "nodes": sharding.shard_nodes}
    across = {"members": sharding.replicas, "nodes": sharding.replica_nodes}
    return {
        "all_gather": links.seconds(traffic.all_gather, **within),
        "reduce_scatter": links.seconds(traffic.reduce_scatter, **within),
        "all_reduce": links.seconds(traffic.all_reduce, **across),
    }
