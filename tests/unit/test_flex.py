"""Compiled flex_attention without a GPU: how many graphs a chain takes, and what happens beyond the limit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as flex
from torch.nn.attention.flex_attention import BlockMask

from nemo_bard.model import attention
from nemo_bard.train.masks import FLEX_SHORTEST_ROW, block_mask

CHAIN = [
    # what: rows, length, heads, gradients, context attention, graphs that it adds
    ("training", 1, 256, 4, True, "block", 1),
    ("another length", 1, 384, 4, True, "block", 1),
    ("any length", 1, 1280, 4, True, "block", 0),
    ("validation", 1, 256, 4, False, "block", 1),
    ("validation, any length", 1, 640, 4, False, "block", 0),
    ("several rows", 4, 384, 4, True, "block", 1),
    ("several rows, any length, the last batch of an epoch", 3, 512, 4, True, "block", 0),
    ("several rows of validation", 3, 384, 4, False, "block", 1),
    ("an anchor with other heads", 1, 384, 8, False, "block", 1),
    ("the anchor, any length", 1, 512, 8, False, "block", 0),
    ("causal context", 1, 384, 4, True, "causal", 1),
    ("causal context, any length", 1, 512, 4, True, "causal", 0),
    ("causal context, validation", 1, 512, 4, False, "causal", 1),
    ("causal context, several rows", 4, 512, 4, True, "causal", 1),
    ("causal context, several rows of validation", 3, 512, 4, False, "causal", 1),
    ("the next stage", 1, 896, 4, True, "block", 0),
]
GRAPHS_OF_A_CHAIN = 10


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Graphs that ``counting`` was given."""
    monkeypatch.setattr(flex, "_validate_device", lambda *_: None)
    monkeypatch.setattr(counting, "seen", [], raising=False)
    torch._dynamo.reset()
    yield counting.seen
    torch._dynamo.reset()


def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., tuple[Tensor]]:
    """A backend of torch.compile that compiles nothing; results are zeros in the shape of the queries."""
    del inputs
    counting.seen.append(graph)
    return lambda *args: (torch.zeros(next(x.shape for x in args if isinstance(x, Tensor) and x.is_floating_point())),)


def mask(rows: int, length: int, context: str) -> BlockMask:
    zeros = torch.zeros(rows, length, dtype=torch.int64)
    blocks = torch.arange(length).expand(rows, length) // 8
    return block_mask({"sample_ids": zeros, "branch_ids": zeros, "block_ids": blocks}, context)


def run(compiled: Callable[..., Tensor], rows: int, length: int, heads: int, grad: bool, context: str) -> None:
    query, key, value = (torch.randn(rows, number, length, 16, requires_grad=grad) for number in (heads, 2, 2))
    with torch.set_grad_enabled(grad):
        out = compiled(query, key, value, mask(rows, length, context), 0.25)
    assert out.shape == query.shape


def test_a_chain_of_stages_stays_within_its_budget(graphs: list[Any]) -> None:
    compiled = attention.compile_flex(counting)
    added = {}
    for what, *shape, _ in CHAIN:
        before = len(graphs)
        run(compiled, *shape)
        added[what] = len(graphs) - before
    assert added == {what: number for what, *_, number in CHAIN}
    assert len(graphs) == GRAPHS_OF_A_CHAIN
    assert GRAPHS_OF_A_CHAIN * 3 <= attention.FLEX_GRAPHS
    assert min(shape[1] for _, *shape in CHAIN) >= FLEX_SHORTEST_ROW


def test_beyond_the_limit_a_call_raises(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "FLEX_GRAPHS", 1)
    compiled = attention.compile_flex(counting)
    run(compiled, 1, 256, 4, True, "block")
    with pytest.raises(Exception, match="Hard failure") as failed:
        run(compiled, 1, 256, 4, False, "block")
    assert type(failed.value).__name__ == "FailOnRecompileLimitHit"
    assert len(graphs) == 1
