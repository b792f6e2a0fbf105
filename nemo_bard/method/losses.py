"""Losses of block diffusion, over any set of tokens (torch only).

Every loss is a sum over supervised tokens of ``scale * weight * loss``: ``weight`` is the noise weight (``1 / t``, half
on padding), ``scale`` the normalisation (``token_scale``), computed from totals of the whole optimizer step, so that
gradients do not depend on how a global batch is split over ranks and accumulation steps.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

REDUCTIONS: tuple[str, ...] = ("mean", "sum")
KD_DIRECTIONS: tuple[str, ...] = ("forward", "reverse")


def check_reduction(reduction: str) -> None:
    """Raise ValueError unless ``reduction`` is one of ``REDUCTIONS``."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_kd(temperature: float, direction: str) -> None:
    """Raise ValueError unless ``temperature`` is > 0 and ``direction`` is one of ``KD_DIRECTIONS``."""
    if not temperature > 0:
        raise ValueError(f"kd_temperature must be > 0, got {temperature}")
    if direction not in KD_DIRECTIONS:
        raise ValueError(f"kd_direction must be one of {', '.join(KD_DIRECTIONS)}, got {direction!r}")


def token_scale(
    reduction: str,
    response_ids: Tensor,
    *,
    num_samples: int | Tensor,
    num_loss_tokens: int | Tensor,
) -> Tensor:
    """Normalisation of each token.

    ``mean``: the sample-level macro average; a token counts one over its response's number of tokens (padding
    included), over ``num_samples``. ``sum``: one over ``num_loss_tokens``.

    Args:
        reduction: ``mean`` or ``sum``.
        response_ids: Response of each token, ``[...]`` int64, distinct over the whole tensor, ``-1`` outside responses.
        num_samples: Samples in the whole optimizer step, over all ranks and accumulation steps.
        num_loss_tokens: Supervised tokens in the whole optimizer step.

    Returns:
        float32 with the shape of ``response_ids``; 0 outside responses.

    Raises:
        ValueError: If ``reduction`` is unknown.
    """
    check_reduction(reduction)
    inside = response_ids >= 0
    if reduction == "sum":
        return inside.float() / max(int(num_loss_tokens), 1)
    lengths = torch.bincount(response_ids[inside].flatten(), minlength=1)
    per_token = lengths[response_ids.clamp_min(0)].clamp_min(1).float()
    return inside.float() / per_token / max(int(num_samples), 1)


class _OverwritingCrossEntropy(torch.autograd.Function):
    """Cross-entropy of each token, whose loss and gradient are computed in the memory of the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        """``logsumexp(logits) - logits[label]``, ``[K]``."""
        labels = labels.unsqueeze(-1)
        own = logits.gather(-1, labels)
        top = logits.amax(-1, keepdim=True)
        values = logits.detach().sub_(top).exp_()
        total = values.sum(-1, keepdim=True)
        ctx.save_for_backward(values, labels, total)
        ctx.done = False
        return (top + total.log() - own).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """``g * (softmax(logits) - one_hot(label))``."""
        if ctx.done:
            raise RuntimeError("a loss that overwrote its logits can be differentiated only once")
        ctx.done = True
        values, labels, total = ctx.saved_tensors
        grad = grad.unsqueeze(-1)
        return values.mul_(grad / total).scatter_add_(-1, labels, -grad), None


class BlockDiffusionLoss(nn.Module):
    """Base: a per-token loss, weighted and summed. Any AutoModel YAML can name a subclass as ``loss_fn``."""

    path: ClassVar[str | None] = None
    """The noise's ``path`` on which the formula holds; None means any."""

    def __init__(self, reduction: str = "mean") -> None:
        """Create the loss.

        Args:
            reduction: ``mean`` (sample-level macro average) or ``sum`` (token sum over supervised tokens).

        Raises:
            ValueError: If ``reduction`` is unknown.
        """
        super().__init__()
        check_reduction(reduction)
        self.reduction = reduction

    def per_token(self, logits: Tensor, labels: Tensor, noisy_ids: Tensor | None) -> Tensor:
        """Return the unweighted loss of each token, ``[K]`` float32 (or float64), from ``logits`` ``[K, V]``."""
        raise NotImplementedError

    def per_token_overwriting(self, logits: Tensor, labels: Tensor, noisy_ids: Tensor | None) -> Tensor:
        """As ``per_token``, and may compute in the memory of ``logits``; by default it does not."""
        return self.per_token(logits, labels, noisy_ids)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor,
        noisy_ids: Tensor | None = None,
        overwrite: bool = False,
    ) -> Tensor:
        """Weighted sum over tokens.

        Args:
            logits: Logits at the supervised tokens, ``[K, V]``; computed in at least float32.
            labels: Clean ids, ``[K]`` int64.
            weight: ``token_scale * loss_weight``, ``[K]``.
            noisy_ids: Ids the model saw, ``[K]`` int64; needed by ``MixturePathKL``.
            overwrite: Nobody needs ``logits`` any more: the loss may compute in their memory, and be differentiated once.

        Returns:
            Scalar; a zero connected to ``logits`` when ``K`` is 0.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        per_token = self.per_token_overwriting if overwrite else self.per_token
        return (per_token(logits, labels, noisy_ids) * weight.to(logits.dtype)).sum()


class BlockDiffusionCrossEntropy(BlockDiffusionLoss):
    """Cross-entropy of the clean token, weighted ``1 / t`` (MDLM, arXiv 2406.07524; BARD, arXiv 2604.16514)."""

    def per_token(self, logits: Tensor, labels: Tensor, noisy_ids: Tensor | None) -> Tensor:
        """``-log p(label)``, ``[K]``."""
        del noisy_ids
        return F.cross_entropy(logits, labels, reduction="none")

    def per_token_overwriting(self, logits: Tensor, labels: Tensor, noisy_ids: Tensor | None) -> Tensor:
        """``-log p(label)``, ``[K]``, computed in the memory of ``logits``."""
        del noisy_ids
        return _OverwritingCrossEntropy.apply(logits, labels)


class MixturePathKL(BlockDiffusionLoss):
    """Generalised KL of the mixture path (discrete flow matching, arXiv 2407.15595 and 2412.03487), for uniform noise.

    With ``x`` the noisy and ``c`` the clean token, on the conditional-OT path, per token and before the weight ``1/t``:
    ``-(p(x) - [x == c] + [x != c] * log p(c))``.
    """

    path = "uniform"

    def per_token(self, logits: Tensor, labels: Tensor, noisy_ids: Tensor | None) -> Tensor:
        """The generalised KL of each token without its weight, ``[K]``."""
        if noisy_ids is None:
            raise ValueError("MixturePathKL needs noisy_ids")
        log_p = F.log_softmax(logits, -1)
        log_clean = log_p.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
        p_noisy = log_p.gather(-1, noisy_ids.unsqueeze(-1)).squeeze(-1).exp()
        same = (noisy_ids == labels).to(log_p.dtype)
        return -(p_noisy - same + (1 - same) * log_clean)


def top_k_kd(
    student_logits: Tensor,
    anchor_top_logits: Tensor,
    anchor_top_ids: Tensor,
    *,
    temperature: float = 1.0,
    direction: str = "forward",
) -> Tensor:
    """Distillation from an anchor's top-k logits, per token, without a ``T^2`` factor.

    ``forward``: ``-sum softmax(anchor_topk / T) * log_softmax(student / T)[topk]`` (the anchor's entropy is not
    subtracted). ``reverse``: KL(student || anchor), both renormalised over the anchor's top-k.

    Args:
        student_logits: ``[K, V]``.
        anchor_top_logits: The anchor's largest logits, ``[K, k]``.
        anchor_top_ids: Their ids, ``[K, k]`` int64.
        temperature: ``T`` > 0.
        direction: ``forward`` or ``reverse``.

    Returns:
        ``[K]``.

    Raises:
        ValueError: If ``temperature`` <= 0 or ``direction`` is unknown.
    """
    check_kd(temperature, direction)
    dtype = torch.float64 if student_logits.dtype == torch.float64 else torch.float32
    student, anchor = student_logits.to(dtype) / temperature, anchor_top_logits.to(dtype) / temperature
    anchor_log_p = F.log_softmax(anchor, -1)
    if direction == "forward":
        student_log_p = student.gather(-1, anchor_top_ids) - student.logsumexp(-1, keepdim=True)
        return -(anchor_log_p.exp() * student_log_p).sum(-1)
    student_log_p = F.log_softmax(student.gather(-1, anchor_top_ids), -1)
    return (student_log_p.exp() * (student_log_p - anchor_log_p)).sum(-1)


class DistillationOutput(NamedTuple):
    """Scalars over some tokens."""

    loss: Tensor
    """``ce_weight * ce + kd_weight * kd``."""
    ce: Tensor
    kd: Tensor


class DistillationLoss(nn.Module):
    """Cross-entropy of the clean token and distillation from an anchor (BARD, arXiv 2604.16514); no noise weight."""

    reduction: ClassVar[str] = "sum"

    def __init__(
        self,
        ce_weight: float = 1.0,
        kd_weight: float = 0.5,
        kd_top_k: int = 16,
        kd_temperature: float = 1.0,
        kd_direction: str = "forward",
    ) -> None:
        """Create the loss.

        Args:
            ce_weight: Weight of the cross-entropy, >= 0.
            kd_weight: Weight of the distillation, >= 0; not both 0.
            kd_top_k: How many of the anchor's largest logits count, 1 to the size of the vocabulary.
            kd_temperature: Divides the logits of both, > 0.
            kd_direction: ``forward`` or ``reverse``, see ``top_k_kd``.

        Raises:
            ValueError: If a value is not allowed.
        """
        super().__init__()
        for name, value in (("ce_weight", ce_weight), ("kd_weight", kd_weight), ("kd_temperature", kd_temperature)):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be a number >= 0, got {value!r}")
        if not ce_weight + kd_weight > 0:
            raise ValueError("ce_weight and kd_weight must not both be 0")
        if isinstance(kd_top_k, bool) or not isinstance(kd_top_k, int) or kd_top_k < 1:
            raise ValueError(f"kd_top_k must be an integer >= 1, got {kd_top_k!r}")
        check_kd(kd_temperature, kd_direction)
        self.ce_weight, self.kd_weight, self.kd_top_k = float(ce_weight), float(kd_weight), kd_top_k
        self.kd_temperature, self.kd_direction = float(kd_temperature), kd_direction

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        weight: Tensor,
        anchor_top_logits: Tensor,
        anchor_top_ids: Tensor,
        kd_mask: Tensor,
    ) -> DistillationOutput:
        """Weighted sums over tokens.

        Args:
            logits: The student's logits at the supervised tokens, ``[K, V]``; computed in at least float32.
            labels: Clean ids, ``[K]`` int64.
            weight: One over the supervised tokens of the whole optimizer step, ``[K]``.
            anchor_top_logits: The anchor's largest logits, ``[K, k]``.
            anchor_top_ids: Their ids, ``[K, k]`` int64.
            kd_mask: Tokens that the anchor teaches, ``[K]`` bool.

        Returns:
            The loss and its two parts, the latter without their weights.
        """
        logits = logits if logits.dtype == torch.float64 else logits.float()
        weight = weight.to(logits.dtype)
        ce = (F.cross_entropy(logits, labels, reduction="none") * weight).sum()
        per_token = top_k_kd(
            logits, anchor_top_logits, anchor_top_ids, temperature=self.kd_temperature, direction=self.kd_direction
        )
        kd = (per_token * weight * kd_mask).sum()
        return DistillationOutput(self.ce_weight * ce + self.kd_weight * kd, ce, kd)
