"""Losses straight from hidden states, a few tokens at a time, so that no ``[K, V]`` logits exist (torch only).

With a vocabulary of 151,936 the logits of a long row, their log-probabilities and their gradient take more memory than
the rest of a training step. Here they exist for ``chunk_tokens`` tokens at once. A chunk's gradient is computed right
behind its loss, in the forward pass, so the LM head is never run twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

DEFAULT_CHUNK_TOKENS = 1024
"""Tokens whose logits exist at once: with 151,936 ids 0.58 GiB of float32, once for cross-entropy, three times for other losses.

Every chunk reads and writes the whole float32 sum of the weight's gradient, 2.3 GiB for a head of 151,936 x 4096. At 256
tokens that takes a GPU about as long as the chunk's three products, at 1024 a quarter of it."""
CPU_CHUNK_TOKENS = 128
"""The same on a CPU, whose matrix products need fewer tokens to be efficient."""

ChunkLoss = Callable[[Tensor, slice], Tensor]
"""``(logits [C, V], which of the K tokens they belong to) -> scalar``; the loss is the sum over all chunks.

The logits are the loss's own: it may overwrite them, and must not keep them, as the next chunk uses their memory.
"""


class OutputHead(nn.Linear):
    """The LM head: a linear layer that can hand its weight to a function instead of computing all logits.

    The function runs inside the module's forward, where FSDP has the whole weight at hand, so that it is gathered once
    and its gradient is reduced once, however many chunks there are.
    """

    def forward(self, input: Tensor, output_fn: Callable[[Tensor, Tensor], Any] | None = None) -> Any:
        """Logits ``[..., V]`` of hidden states ``[..., H]``, or what ``output_fn(input, weight [V, H])`` returns."""
        assert self.bias is None
        return F.linear(input, self.weight) if output_fn is None else output_fn(input, self.weight)


def check_chunk_tokens(chunk_tokens: int | None) -> None:
    """Raise ValueError unless ``chunk_tokens`` is an integer >= 1 or None."""
    if chunk_tokens is None:
        return
    if isinstance(chunk_tokens, bool) or not isinstance(chunk_tokens, int) or chunk_tokens < 1:
        raise ValueError(f"loss_chunk_tokens must be an integer >= 1 or null, got {chunk_tokens!r}")


def choose_chunk_tokens(chunk_tokens: int | None, device: torch.device) -> int:
    """Tokens of a chunk on ``device``: as asked, or what suits the device if None.

    Raises:
        ValueError: If ``chunk_tokens`` < 1.
    """
    check_chunk_tokens(chunk_tokens)
    return chunk_tokens or (CPU_CHUNK_TOKENS if device.type == "cpu" else DEFAULT_CHUNK_TOKENS)


def chunked_loss(hidden: Tensor, weight: Tensor, loss: ChunkLoss, *, chunk_tokens: int | None = None) -> Tensor:
    """Sum of ``loss`` over chunks of tokens; gradients flow into ``hidden`` and ``weight``.

    Under autocast the logits are computed in its dtype, otherwise in the dtype of ``weight``. Gradients of ``weight``
    are summed over chunks in at least float32.

    Args:
        hidden: Hidden states of the supervised tokens, ``[K, H]``; K may be 0.
        weight: Weight of the LM head, ``[V, H]``.
        loss: Loss of a chunk, a differentiable function of its logits alone; called once for each chunk, in order.
        chunk_tokens: Tokens of a chunk; None means what suits the device.

    Returns:
        Scalar, at least float32; a zero connected to ``hidden`` and ``weight`` when ``K`` is 0. It can be
        differentiated once.

    Raises:
        ValueError: If ``chunk_tokens`` < 1.
    """
    chunk_tokens = choose_chunk_tokens(chunk_tokens, weight.device)
    needs_gradient = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if needs_gradient:
        return _ChunkedLoss.apply(hidden, weight, loss, chunk_tokens)
    dtype = _compute_dtype(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = weight.new_zeros((), dtype=_sum_dtype(weight))
    for part in chunks(len(hidden), chunk_tokens):
        total += loss(hidden[part] @ weight.T, part)
    return total


@torch.no_grad()
def chunked_top_k(hidden: Tensor, weight: Tensor, *, k: int, chunk_tokens: int | None = None) -> tuple[Tensor, Tensor]:
    """Largest logits of each token and their ids, without gradient.

    Args:
        hidden: Hidden states, ``[K, H]``; K may be 0.
        weight: Weight of the LM head, ``[V, H]``.
        k: How many, 1 to V.
        chunk_tokens: Tokens of a chunk; None means what suits the device.

    Returns:
        Logits ``[K, k]`` in the compute dtype, largest first, and ids ``[K, k]`` int64.

    Raises:
        ValueError: If ``k`` is not within 1 and V, or ``chunk_tokens`` < 1.
    """
    chunk_tokens = choose_chunk_tokens(chunk_tokens, weight.device)
    if not 1 <= k <= len(weight):
        raise ValueError(f"kd_top_k must be 1 to {len(weight)} (the vocabulary), got {k}")
    dtype = _compute_dtype(weight)
    hidden, weight = hidden.to(dtype), weight.to(dtype)
    values = hidden.new_empty(len(hidden), k)
    ids = torch.empty(len(hidden), k, dtype=torch.int64, device=hidden.device)
    for part in chunks(len(hidden), chunk_tokens):
        values[part], ids[part] = (hidden[part] @ weight.T).topk(k)
    return values, ids


def chunks(length: int, chunk_tokens: int) -> list[slice]:
    """Consecutive slices of at most ``chunk_tokens`` tokens that cover ``length``, as few and as even as possible."""
    number = -(-length // chunk_tokens)
    edges = [length * index // max(number, 1) for index in range(number + 1)]
    return [slice(start, stop) for start, stop in zip(edges, edges[1:], strict=False)]


def _compute_dtype(weight: Tensor) -> torch.dtype:
    kind = weight.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


class _Sum:
    """A sum of matrix products ``a.T @ b``, ``[V, H]``; the first is written, not added to zeros."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.total = torch.empty_like(like, dtype=dtype)
        self.started = False

    def add(self, a: Tensor, b: Tensor) -> None:
        if a.dtype == self.total.dtype:
            self.total.addmm_(a.T, b, beta=int(self.started))
        elif self.started:
            self.total += a.T @ b
        else:
            self.total.copy_(a.T @ b)
        self.started = True

    def value(self) -> Tensor:
        return self.total if self.started else self.total.zero_()


class _Logits(torch.autograd.Function):
    """Logits whose gradient is turned into those of the inputs on the spot.

    Nobody but the loss holds the logits, so that they are gone when their gradient comes.
    """

    @staticmethod
    def forward(
        ctx: Any,
        start: Tensor,
        inputs: Tensor,
        weight: Tensor,
        memory: Tensor,
        grads: tuple[Tensor | None, _Sum | None],
    ) -> Tensor:
        """``inputs @ weight.T`` in ``memory``; ``start`` makes it differentiable, ``grads`` take the other two's."""
        del start
        ctx.inputs, ctx.weight, ctx.grads = inputs, weight, grads
        # Not a slice of it: autograd would take the logits of all chunks for views of one another.
        logits = memory.new_empty(0).set_(memory.untyped_storage(), 0, (len(inputs), len(weight)), (len(weight), 1))
        return torch.mm(inputs, weight.T, out=logits)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, logits_grad: Tensor) -> tuple[None, None, None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Write the gradient of ``inputs``, add to that of ``weight``."""
        inputs_grad, weight_grad = ctx.grads
        if inputs_grad is not None:
            inputs_grad.copy_(logits_grad @ ctx.weight)
        if weight_grad is not None:
            weight_grad.add(logits_grad, ctx.inputs)
        return None, None, None, None, None


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients of all chunks; backward only scales the gradients."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, loss: ChunkLoss, chunk_tokens: int) -> Tensor:
        """See ``chunked_loss``."""
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        dtype, sum_dtype = _compute_dtype(weight), _sum_dtype(weight)
        dense = weight.detach().to(dtype)
        parts = chunks(len(hidden), chunk_tokens)
        # The products of a chunk: autocast would cast (and keep) the weight again for each of them.
        with torch.autocast(weight.device.type, enabled=False):
            hidden_grad = torch.zeros_like(hidden) if needs_hidden else None
            weight_grad = _Sum(dense, sum_dtype) if needs_weight else None
            total = torch.zeros((), dtype=sum_dtype, device=hidden.device)
            start = torch.zeros((), device=hidden.device, requires_grad=True)
            memory = dense.new_empty(max((part.stop - part.start for part in parts), default=0), len(dense))
            for part in parts:
                inputs = hidden[part].detach().to(dtype)
                grads = (None if hidden_grad is None else hidden_grad[part], weight_grad)
                with torch.enable_grad():
                    value = loss(_Logits.apply(start, inputs, dense, memory, grads), part)
                torch.autograd.grad(value, start, allow_unused=True)
                total += value.detach()
                del value
        ctx.grads = (hidden_grad, None if weight_grad is None else weight_grad.value().to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scale what forward has computed."""
        grads, ctx.grads = ctx.grads, None
        if grads is None:
            raise RuntimeError("chunked_loss can be differentiated only once")
        hidden_grad, weight_grad = (None if grad is None else grad.mul_(grad_output) for grad in grads)
        return hidden_grad, weight_grad, None, None
