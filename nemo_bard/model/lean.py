"""Norm and MLP of the text layers that keep less for the backward pass (torch only).

Written out, as transformers does, RMSNorm keeps its input and the normalised values, and the gated MLP four tensors of the
intermediate size. What is cheap to compute again from the rest is not kept here: half of a text layer's activations. The
numbers of the forward pass are the same; gradients differ by rounding.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from nemo_bard.upstream.torch import become


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """``weight * x / sqrt(mean(x^2) + eps)``; normalised in float32, rounded to the dtype of ``x``."""
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        normed = (wide * scale).to(x.dtype)
        return normed.mul_(weight) if normed.dtype == weight.dtype else weight * normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """With ``n = x * scale``: ``scale * (g - n * mean(g * n))`` for ``x``, where ``g`` is that of ``n``."""
        x, weight, scale = ctx.saved_tensors
        normed, x_grad, weight_grad = x.float() * scale, None, None
        product = grad.float() * normed
        if ctx.needs_input_grad[1]:
            weight_grad = product.flatten(0, -2).sum(0).to(weight.dtype)
        if ctx.needs_input_grad[0]:
            mean = product.mul_(weight).mean(-1, keepdim=True)
            wide = torch.mul(grad, weight, out=product) if grad.dtype == product.dtype else (grad * weight).float()
            x_grad = wide.sub_(normed.mul_(mean)).mul_(scale).to(x.dtype)
        return x_grad, weight_grad, None


class _GatedDown(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, weight: Tensor) -> Tensor:
        """``(silu(gate) * up) @ weight.T``."""
        ctx.save_for_backward(gate, up, weight)
        return F.linear(F.silu(gate).mul_(up), weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``silu'(z) = sigmoid(z) * (1 + z * (1 - sigmoid(z)))``."""
        gate, up, weight = ctx.saved_tensors
        gate_grad = up_grad = weight_grad = None
        active, rows = F.silu(gate), grad.flatten(0, -2)
        inner = torch.empty_like(active)
        if ctx.needs_input_grad[2]:
            inner = active * up
            weight_grad = (rows.T @ inner.to(grad.dtype).flatten(0, -2)).to(weight.dtype)
        if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
            if inner.dtype == grad.dtype == weight.dtype:
                torch.mm(rows, weight, out=inner.view(rows.shape[0], -1))
            else:
                inner = grad @ weight.to(grad.dtype)
            same = active.dtype == inner.dtype
            up_grad = active.mul_(inner) if same else (inner * active).to(up.dtype)
            inner = inner.mul_(up).to(gate.dtype)
            gate_grad = torch.ops.aten.silu_backward.grad_input(inner, gate, grad_input=inner)
        return gate_grad, up_grad, weight_grad


class LeanNorm(nn.Module):
    """Mixin for transformers' RMSNorm."""

    weight: nn.Parameter
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        """As the module it is mixed into."""
        if not torch.is_grad_enabled():
            return super().forward(hidden_states)
        return _RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class LeanMLP(nn.Module):
    """Mixin for transformers' gated MLP."""

    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        """As the module it is mixed into; so is what adapters or quantization made of its last layer."""
        if not torch.is_grad_enabled() or type(self.down_proj) is not nn.Linear:
            return super().forward(x)
        return _GatedDown.apply(self.gate_proj(x), self.up_proj(x), self.down_proj.weight)


def slim(model: nn.Module, norm: type[nn.Module], mlp: type[nn.Module]) -> None:
    """Give the norms and MLPs in ``model`` the forwards above, in place; parameters and names stay.

    Args:
        model: Any module.
        norm: Class of its norms, with ``weight`` and ``variance_epsilon``.
        mlp: Class of its MLPs, with ``gate_proj``, ``up_proj``, ``down_proj`` without bias, and silu.
    """
    lean = {norm: _mixed(LeanNorm, norm), mlp: _mixed(LeanMLP, mlp)}
    for module in model.modules():
        if type(module) in lean:
            become(module, lean[type(module)])


@functools.cache
def _mixed(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    """One class for all models: compiled code of one model is for another one, too."""
    return type(kind.__name__, (mixin, kind), {})
