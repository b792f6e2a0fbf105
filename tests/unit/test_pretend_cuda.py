"""The tool that pretends CUDA: each kind of host synchronisation is counted, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from pretend_cuda import CUDA, CudaTensor, PretendCuda, to_cuda
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda x: x.sum().item(),
    "bool": lambda x: bool((x > 2).any()),
    "int": lambda x: int(x.sum()),
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "to cpu": lambda x: x.to("cpu"),
    "nonzero": lambda x: x.nonzero(),
    "where": lambda x: torch.where(x > 2),
    "boolean index": lambda x: x[x > 2],
    "boolean index_put": lambda x: x.index_put_((x > 2,), x.sum()),
    "masked_select": lambda x: x.masked_select(x > 2),
    "unique": lambda x: x.unique(),
    "equal": lambda x: torch.equal(x, x),
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long().clamp(1, 3)),
    "new data": lambda x: torch.tensor([1.0], device=x.device),
    "as_tensor": lambda x: torch.as_tensor([1, 2], device=CUDA),
    "new_tensor": lambda x: x.new_tensor([1.0]),
    "copied in": lambda x: x.copy_(torch.zeros(4)),
    "copied out": lambda x: torch.zeros(4).copy_(x),
    "scalar assignment to one element": lambda x: x.__setitem__(0, 3.0),
    "CPU index": lambda x: x[torch.tensor([0, 2])],
    "pageable": lambda x: torch.zeros(100_000).to(CUDA, non_blocking=True),
    "read while pinned": lambda x: torch.zeros(100_000).pin_memory().to(CUDA),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.Event().synchronize(),
}
RUNS_ON: dict[str, Callable[[Tensor], object]] = {
    "arithmetic": lambda x: (x * 2 + 1).softmax(-1),
    "scalar assignment": lambda x: x.__setitem__(slice(2), 3.0),
    "boolean fill": lambda x: x.__setitem__(x > 2, 0.0),
    "masked_fill": lambda x: x.masked_fill(x > 2, 0.0),
    "masked_scatter": lambda x: x.masked_scatter(x > 2, x),
    "device index": lambda x: x[torch.arange(2, device=x.device)],
    "repeat_interleave": lambda x: torch.repeat_interleave(x, x.long().clamp(1, 3), output_size=9),
    "small pageable": lambda x: torch.zeros(4).to(CUDA, non_blocking=True),
    "pinned": lambda x: torch.zeros(100_000).pin_memory()[5:].to("cuda", non_blocking=True),
    "topk": lambda x: x.topk(2),
    "multinomial": lambda x: torch.multinomial(x, 1),
    "attention": lambda x: F.scaled_dot_product_attention(*[x.view(1, 1, 2, 2)] * 3),
    "CPU scalar": lambda x: x * torch.tensor(2.0),
    "shape": lambda x: x.view(2, 2).T.contiguous().shape[0],
    "stream": lambda x: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()),
}


def ones() -> CudaTensor:
    return CudaTensor(torch.tensor([1.0, 2.0, 3.0, 4.0]))


@pytest.mark.parametrize("kind", WAITS)
def test_a_synchronisation_is_counted(kind: str) -> None:
    with PretendCuda() as log:
        WAITS[kind](ones())
    assert len(log.syncs) == 1
    assert "test_pretend_cuda.py" in log.syncs[0].where.split(" < ")[0]


@pytest.mark.parametrize("kind", RUNS_ON)
def test_what_does_not_wait_is_not_counted(kind: str) -> None:
    with PretendCuda() as log:
        RUNS_ON[kind](ones())
    assert log.syncs == []
    assert log.mismatches == []


def test_tensors_of_two_devices_raise() -> None:
    with PretendCuda() as log:
        with pytest.raises(RuntimeError, match="same device"):
            ones() + torch.ones(4)
        with pytest.raises(RuntimeError, match="same device"):
            torch.cat([ones(), torch.ones(4)])
    assert len(log.mismatches) == 2


def test_launches_bytes_and_allocations() -> None:
    with PretendCuda() as log:
        x = torch.zeros(3, 2).to("cuda")
        y = x.T + 1
        y.add_(1)
        torch.empty(2, device="cuda")
        assert (log.launches, log.copied_to_device) == (3, 24)
        assert [(a.operation, a.shape) for a in log.allocations] == [("add", (2, 3)), ("empty", (2,))]
        log.reset()
        with log.kernel("fused"):
            (x * 2).sum().item()
        assert (log.launches, log.syncs, log.operations) == (1, [], {"fused": 1})


def test_values_are_real_and_writes_go_through_views() -> None:
    with PretendCuda():
        x = ones()
        x.view(2, 2)[:, 0] = 0
        x[1:2].add_(5)
        assert x.device == CUDA
        assert x.is_cuda
        assert x.tolist() == [0.0, 7.0, 0.0, 4.0]
        x.data = ones()
        assert x.tolist() == [1.0, 2.0, 3.0, 4.0]
    assert not torch.cuda.is_available()
    with PretendCuda(available=True):
        assert torch.cuda.is_available()


def test_backward_gives_the_gradients_of_the_engine() -> None:
    def loss(model: nn.Module, x: Tensor) -> Tensor:
        hidden = checkpoint(model[0], x, use_reentrant=False)
        hidden = checkpoint(lambda h: model[1](h) + h, hidden, use_reentrant=False)
        return (model[2](hidden) * model[0].weight.sum()).square().mean()

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.LayerNorm(4), nn.GELU(), nn.Linear(4, 4)), nn.Linear(4, 2))
    x = torch.randn(5, 3)
    for _ in range(2):
        loss(model, x).backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    with PretendCuda() as log:
        to_cuda(model)
        x = x.to("cuda")
        log.reset()
        for _ in range(2):
            loss(model, x).backward()
        assert log.syncs == []
        for want, parameter in zip(expected, model.parameters(), strict=True):
            torch.testing.assert_close(parameter.grad.cpu(), want)


def test_the_gradient_of_a_leaf_and_memory_that_is_used_again() -> None:
    with PretendCuda():
        x, other, memory = CudaTensor(torch.ones(3), requires_grad=True), ones().requires_grad_(), ones()
        (found,) = torch.autograd.grad((x * 2).sum() * other.sum(), x)
        assert found.tolist() == [20.0, 20.0, 20.0]
        assert x.grad is None
        assert other.grad is None
        part = memory.new_empty(0).set_(memory.untyped_storage(), 0, (1, 2), (2, 1))
        torch.mm(ones().view(2, 2)[:1], ones().view(2, 2), out=part)
        assert memory.tolist() == [7.0, 10.0, 3.0, 4.0]


def test_tied_weights_stay_tied() -> None:
    model = nn.ModuleList([nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)])
    model[1].weight = model[0].weight
    with PretendCuda():
        to_cuda(model)
        assert model[0].weight is model[1].weight
        assert isinstance(model[0].weight, nn.Parameter)


def test_a_captured_graph_runs_again_on_what_its_tensors_hold_then() -> None:
    with PretendCuda() as log:
        x, total = ones(), torch.zeros(4, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            total.add_(x)
            doubled = (x * 2).view(2, 2)
        x.fill_(10.0)
        log.reset()
        graph.replay()
        assert log.launches == 1
        assert doubled.tolist() == [[20.0, 20.0], [20.0, 20.0]]
        assert total.tolist() == [11.0, 12.0, 13.0, 14.0]
        with pytest.raises(RuntimeError, match="capturing"), torch.cuda.graph(torch.cuda.CUDAGraph()):
            x.sum().item()


def test_varlen_attention_equals_dense_attention() -> None:
    torch.manual_seed(0)
    lengths, heads, size = [3, 5], 2, 8
    starts = torch.tensor([0, 3, 8], dtype=torch.int32)
    host = [torch.randn(8, heads, size, dtype=torch.bfloat16).requires_grad_() for _ in range(3)]
    dense = torch.cat(
        [
            F.scaled_dot_product_attention(*(x.transpose(0, 1).float() for x in parts)).transpose(0, 1)
            for parts in zip(*(x.split(lengths) for x in host), strict=True)
        ]
    )
    dense.square().sum().backward()
    with PretendCuda() as log:
        device = [CudaTensor(x.detach(), requires_grad=True) for x in host]
        starts = CudaTensor(starts)
        out = varlen_attn(*device, starts, starts, 5, 5)
        out.float().square().sum().backward()
        assert log.operations["_varlen_attn"] == log.operations["_varlen_attn_backward"] == 1
        assert log.syncs == []
        torch.testing.assert_close(out.cpu().float(), dense, atol=2e-2, rtol=2e-2)
        for want, got in zip(host, device, strict=True):
            torch.testing.assert_close(got.grad.cpu(), want.grad, atol=5e-2, rtol=5e-2)
        with pytest.raises(RuntimeError, match="fp16 and bf16"):
            varlen_attn(*(x.float() for x in device), starts, starts, 5, 5)


def test_varlen_attention_with_a_cache_sees_what_is_used() -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(n, h, 8, dtype=torch.bfloat16) for n, h in ((4, 4), (10, 2), (10, 2)))
    with PretendCuda():
        got = varlen_attn(
            CudaTensor(query),
            CudaTensor(key),
            CudaTensor(value),
            CudaTensor(torch.tensor([0, 2, 4], dtype=torch.int32)),
            CudaTensor(torch.tensor([0, 5, 10], dtype=torch.int32)),
            2,
            5,
            enable_gqa=True,
            seqused_k=CudaTensor(torch.tensor([3, 5], dtype=torch.int32)),
            num_splits=1,
        ).cpu()
    for rows, columns in ((slice(0, 2), slice(0, 3)), (slice(2, 4), slice(5, 10))):
        parts = (x.float().transpose(0, 1).unsqueeze(0) for x in (query[rows], key[columns], value[columns]))
        want = F.scaled_dot_product_attention(*parts, enable_gqa=True)[0].transpose(0, 1)
        torch.testing.assert_close(got[rows].float(), want, atol=2e-2, rtol=2e-2)
