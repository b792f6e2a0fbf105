"""What ranks share and send: by hand for small numbers, and replicas that fit the ranks."""

from __future__ import annotations

import pytest

from nemo_bard.cost.count import count_parameters
from nemo_bard.cost.shapes import SHAPES, make_config
from nemo_bard.cost.sharding import (
    GradientBytes,
    Links,
    LinkSeconds,
    Sharding,
    Traffic,
    Unit,
    check_replicas,
    fsdp_units,
    gradient_bytes,
    node_replicas,
    step_traffic,
    traffic_seconds,
)
from nemo_bard.train.config import replicas_of

UNITS = [Unit(parameters=400, again=True), Unit(parameters=400, again=False), Unit(parameters=200, again=False)]
"""1000 parameters, 1400 gathered in a microbatch."""


def sharding(ranks: int, replicas: int = 1, per_node: int = 8) -> Sharding:
    return Sharding(ranks=ranks, replicas=replicas, ranks_per_node=per_node)


@pytest.mark.parametrize(
    ("ranks", "per_node", "replicas"), [(1, 1, 1), (8, 8, 1), (64, 8, 8), (4, 2, 2), (4, 1, 1), (12, 8, 1), (2, 2, 1)]
)
def test_auto_is_a_replica_per_node(ranks, per_node, replicas):
    assert node_replicas(ranks, per_node) == replicas
    assert replicas_of({"dp_replicate_size": "auto"}, ranks, per_node) == replicas
    assert replicas_of({}, ranks, per_node) == replicas_of({"dp_replicate_size": None}, ranks, per_node) == 1
    check_replicas("key", replicas, ranks)


@pytest.mark.parametrize(("replicas", "ranks"), [(3, 4), (4, 4), (2, 1)])
def test_replicas_that_do_not_fit_are_named(replicas, ranks):
    with pytest.raises(
        ValueError, match=rf"^distributed.dp_replicate_size={replicas} must divide .* which is {ranks};"
    ):
        replicas_of({"dp_replicate_size": replicas}, ranks, ranks)
    assert replicas_of({"dp_replicate_size": 2}, 4, 4) == 2


def test_shards_and_replicas_lie_on_nodes():
    whole, nodes, inside = sharding(64), sharding(64, 8), sharding(64, 16)
    assert (whole.shards, whole.shard_nodes, whole.replica_nodes) == (64, 8, 1)
    assert (nodes.shards, nodes.shard_nodes, nodes.replica_nodes) == (8, 1, 8)
    assert (inside.shards, inside.shard_nodes, inside.replica_nodes) == (4, 1, 8)


@pytest.mark.parametrize("shape", SHAPES)
def test_units_are_all_parameters(shape):
    config = make_config(shape)
    parameters = count_parameters(config)
    units = fsdp_units(config, parameters)
    assert sum(unit.parameters for unit in units) == parameters.total
    assert all(unit.parameters > 0 for unit in units)
    assert [unit.parameters for unit in units].count(parameters.layer) == config.text_config.num_hidden_layers


@pytest.mark.parametrize(
    ("ranks", "replicas", "microbatches", "deferred", "whole", "sharded"),
    [
        (1, 1, 4, True, 0, 4000),
        (2, 1, 1, True, 0, 2000),
        (2, 1, 2, True, 4000, 0),
        (4, 1, 2, True, 4000, 0),
        (4, 1, 2, False, 0, 1000),
        (4, 2, 2, False, 0, 2000),
    ],
)
def test_gradients_are_whole_only_between_deferred_microbatches(
    ranks, replicas, microbatches, deferred, whole, sharded
):
    held = gradient_bytes(1000, sharding(ranks, replicas), microbatches=microbatches, deferred=deferred)
    assert held == GradientBytes(whole=whole, sharded=sharded)


@pytest.mark.parametrize(
    ("ranks", "replicas", "microbatches", "deferred", "expected"),
    [
        (1, 1, 2, True, (0, 0, 0)),
        (4, 1, 1, True, (2 * 1400 * 3 // 4, 4 * 1000 * 3 // 4, 0)),
        (4, 1, 3, True, (3 * 2100, 3000, 0)),
        (4, 1, 3, False, (3 * 2100, 3 * 3000, 0)),
        (4, 2, 1, True, (2 * 1400 // 2, 4 * 1000 // 2, 2 * 2000 // 2)),
        (8, 4, 2, False, (2 * 1400, 2 * 2000, 2 * 2 * 2000 * 3 // 4)),
    ],
)
def test_traffic_by_hand(ranks, replicas, microbatches, deferred, expected):
    sent = step_traffic(UNITS, 1000, sharding(ranks, replicas), width=2, microbatches=microbatches, deferred=deferred)
    assert sent == Traffic(all_gather=expected[0], reduce_scatter=expected[1], all_reduce=expected[2])


def test_frozen_parameters_are_gathered_and_not_reduced():
    sent = step_traffic(UNITS, 100, sharding(4), width=2, microbatches=1, deferred=True)
    assert sent == Traffic(all_gather=2100, reduce_scatter=300, all_reduce=0)


def test_seconds_by_hand():
    links = Links(node=100.0, network=10.0)
    assert links.seconds(700, members=1, nodes=1) == LinkSeconds(node=0.0, network=0.0)
    assert links.seconds(700, members=8, nodes=1) == LinkSeconds(node=7.0, network=0.0)
    # 800 bytes over two nodes of four: 400 come into each, through four adapters
    assert links.seconds(700, members=8, nodes=2) == LinkSeconds(node=7.0, network=10.0)
    # a member per node: its own adapter alone
    assert links.seconds(300, members=4, nodes=4) == LinkSeconds(node=0.0, network=30.0)
    seconds = traffic_seconds(
        Traffic(all_gather=3000, reduce_scatter=600, all_reduce=200), sharding(16, 2, per_node=8), links
    )
    assert seconds["all_gather"] == LinkSeconds(node=30.0, network=0.0)
    assert seconds["reduce_scatter"].alone == 6.0
    assert seconds["all_reduce"] == LinkSeconds(node=0.0, network=20.0)
