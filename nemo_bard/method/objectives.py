"""What training minimises: from corrupted microbatches to the loss of an optimizer step (torch only).

An ``Objective`` says which tokens of a microbatch count and how much (``weigh``), what they cost (``loss``, chunk by
chunk inside the LM head), what the cost is made of (``parts``) and what is logged (``reduce``). PBM, distillation (SWD) and
the joint autoregressive loss are three of them; a recipe, a benchmark and a test call them alike:

    batch = objective.weigh(corrupt_batch(...), count([...]))
    loss = objective.loss(batch)
    total = model(..., output_positions=batch["output_positions"], output_fn=partial(chunked_loss, loss=loss))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_bard.method.chunked import ChunkLoss
from nemo_bard.method.layout import PADDING
from nemo_bard.method.losses import BlockDiffusionLoss, DistillationLoss, token_scale

Batch = Mapping[str, Any]


class StepTotals(NamedTuple):
    """Counts over all microbatches, and after reduction over all ranks, of an optimizer step."""

    num_samples: int
    """Samples that count: not dropped, not repeated to fill up the last step of an epoch."""
    num_loss_tokens: int
    """Supervised tokens."""
    num_tokens: int
    """Tokens that belong to a sample, noisy copies included."""
    num_dropped: int
    """Samples dropped because they are too long."""
    num_ar_tokens: int = 0
    """Tokens that the context predicts, with ``ar_loss_weight``."""
    num_positions: int = 0
    """Positions of all rows, padding included."""
    num_bad: int = 0
    """Samples left out because they cannot be used."""


UNIT_TOTALS = StepTotals(1, 1, 0, 0, num_ar_tokens=1)
"""Totals that normalise nothing: for a pass whose totals are known at its end only."""


def count(batches: Iterable[Batch]) -> StepTotals:
    """Count what corrupted microbatches hold on this rank."""
    return add_up(
        StepTotals(
            b["num_samples"],
            int(b["loss_mask"].sum()),
            int((b["sample_ids"] != PADDING).sum()),
            b["num_dropped"],
            int((b["ar_response_ids"] >= 0).sum()) if "ar_response_ids" in b else 0,
            b["sample_ids"].numel(),
            len(b["rejects"]),
        )
        for b in batches
    )


def add_up(totals: Iterable[StepTotals]) -> StepTotals:
    """Counts of all of them together; of none, all 0."""
    return StepTotals(*(sum(column) for column in zip(StepTotals(0, 0, 0, 0), *totals, strict=True)))


class BatchLoss:
    """The loss of a microbatch: a ``ChunkLoss`` that keeps the sums of its parts.

    Args:
        chunk: Loss of a chunk of logits; adds its parts to ``sums``.
        sums: Parts so far, ``[P]``, without gradient and without the parts' weights in the total.
    """

    def __init__(self, chunk: ChunkLoss, sums: Tensor) -> None:
        self.chunk, self.sums = chunk, sums

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """Loss of the tokens ``part``, whose logits are ``[C, V]``."""
        return self.chunk(logits, part)

    def parts(self) -> Tensor:
        """Sums of all parts, ``[P]`` float64, once the last chunk is done."""
        return self.sums.double()


class Objective(ABC):
    """What a training step minimises.

    A loss class of one's own may name the objective that it belongs to, by an attribute ``objective_class``; a recipe's
    ``loss_fn`` then brings its objective.

    Args:
        loss_fn: What the recipe's ``loss_fn`` built.
    """

    parts: ClassVar[tuple[str, ...]] = ()
    """Names of what the loss is made of, as logged; empty if it has one part."""

    def __init__(self, loss_fn: nn.Module) -> None:
        self.loss_fn = loss_fn

    def part_names(self) -> tuple[str, ...]:
        """Names of the parts in the order of ``BatchLoss.parts``."""
        return self.parts

    @property
    def reduction(self) -> str:
        """``mean`` or ``sum``, see ``losses.token_scale``."""
        return cast(str, self.loss_fn.reduction)

    def weigh(self, batch: Batch, totals: StepTotals) -> dict[str, Any]:
        """Add what the step needs at the ``K`` supervised tokens of a corrupted microbatch.

        Args:
            batch: A microbatch from ``corrupt_batch``; not modified.
            totals: Totals of the whole optimizer step, over all ranks.

        Returns:
            The batch with ``output_positions`` ``[K]`` int64 (flat indices into ``[N * L]``, what the LM head sees) and
            ``output_weight`` ``[K]``; the loss of the step is the sum over microbatches and ranks.
        """
        positions = batch["loss_mask"].flatten().nonzero().flatten()
        return {**batch, "output_positions": positions, "output_weight": self.token_weight(batch, totals, positions)}

    @abstractmethod
    def token_weight(self, batch: Batch, totals: StepTotals, positions: Tensor) -> Tensor:
        """Weight of each supervised token in the step's loss, ``[K]``, for flat ``positions`` ``[K]``."""

    @abstractmethod
    def loss(self, batch: Batch) -> BatchLoss:
        """Loss of a weighed microbatch on the model's device, in the order of ``output_positions``."""

    def divisor(self, totals: StepTotals) -> int:
        """What the sums of a pass that was weighed with ``UNIT_TOTALS`` are divided by, at least 1."""
        return max(totals.num_samples if self.reduction == "mean" else totals.num_loss_tokens, 1)

    def reduce(self, total: float, sums: Sequence[float], totals: StepTotals) -> dict[str, float]:
        """Turn sums over microbatches and ranks into what is logged.

        Args:
            total: Sum of the losses.
            sums: Sums of the parts.
            totals: What the microbatches still have to be normalised by: the counts of the pass if they were weighed with
                ``UNIT_TOTALS``, and ``UNIT_TOTALS`` if they were weighed with the counts of the step.

        Returns:
            ``loss`` and the parts by name.
        """
        divisor = self.divisor(totals)
        parts = {name: value / divisor for name, value in zip(self.part_names(), sums, strict=True)}
        return {"loss": total / divisor, **parts}


class PBMObjective(Objective):
    """Supervised block diffusion: the noise's weight at every supervised token, normalised by ``reduction``."""

    loss_fn: BlockDiffusionLoss

    def token_weight(self, batch: Batch, totals: StepTotals, positions: Tensor) -> Tensor:
        """``token_scale * loss_weight``, see ``method.losses``."""
        scale = token_scale(
            self.reduction,
            batch["response_ids"],
            num_samples=totals.num_samples,
            num_loss_tokens=totals.num_loss_tokens,
        )
        return (scale * batch["loss_weight"]).flatten()[positions]

    def loss(self, batch: Batch) -> BatchLoss:
        """The block-diffusion loss, which may overwrite its logits."""
        positions, weight = batch["output_positions"], batch["output_weight"]
        labels, noisy_ids = batch["labels"].flatten()[positions], batch["input_ids"].flatten()[positions]

        def chunk(logits: Tensor, part: slice) -> Tensor:
            return self.loss_fn(logits, labels[part], weight=weight[part], noisy_ids=noisy_ids[part], overwrite=True)

        return BatchLoss(chunk, torch.zeros(0, device=positions.device))


Teach = Callable[[Batch], tuple[Tensor, Tensor]]
"""From a weighed microbatch to the anchor's largest logits at ``output_positions`` and their ids, each ``[K, k]``."""


class SWDObjective(Objective):
    """Distillation from an anchor: means of cross-entropy and distillation over all supervised tokens.

    Args:
        loss_fn: The recipe's loss.
        teach: Runs the anchor.
    """

    parts = ("ce_loss", "kd_loss")
    loss_fn: DistillationLoss

    def __init__(self, loss_fn: nn.Module, teach: Teach) -> None:
        super().__init__(loss_fn)
        self.teach = teach

    def token_weight(self, batch: Batch, totals: StepTotals, positions: Tensor) -> Tensor:
        """One over the supervised tokens of the step, for all of them."""
        del batch
        return torch.full(positions.shape, 1 / max(totals.num_loss_tokens, 1))

    def loss(self, batch: Batch) -> BatchLoss:
        """Cross-entropy and distillation; the anchor runs before the student."""
        positions, weight = batch["output_positions"], batch["output_weight"]
        labels = batch["labels"].flatten()[positions]
        kd_mask = batch["anchor_block_ids"].flatten()[positions] != PADDING
        top_logits, top_ids = self.teach(batch)
        sums = torch.zeros(2, device=positions.device)

        def chunk(logits: Tensor, part: slice) -> Tensor:
            out = self.loss_fn(
                logits,
                labels[part],
                weight=weight[part],
                anchor_top_logits=top_logits[part],
                anchor_top_ids=top_ids[part],
                kd_mask=kd_mask[part],
            )
            sums.add_(torch.stack([out.ce, out.kd]).detach())
            return out.loss

        return BatchLoss(chunk, sums)


def make_objective(loss_fn: nn.Module, default: type[Objective], **arguments: Any) -> Objective:
    """The objective that a loss names with ``objective_class``, else ``default``; ``arguments`` are those of its class."""
    return getattr(loss_fn, "objective_class", default)(loss_fn, **arguments)


class JointObjective(Objective):
    """Another objective and the source's own: the context predicts the responses too, token by token.

    With ``context_attention: causal`` the context is what the autoregressive source computes, and this is the source's
    own training loss on the responses: the token at place ``i`` predicts the one at ``i + 1``. It is normalised like the
    other one (``losses.token_scale``), over the tokens of the responses without padding. The context tokens follow the
    noisy ones at the LM head, which runs once for both.

    Args:
        diffusion: The objective of the noisy tokens.
        ar_weight: Weight of the autoregressive loss in the total, > 0.
    """

    parts = ("diffusion_loss", "ar_loss")

    def __init__(self, diffusion: Objective, ar_weight: float) -> None:
        super().__init__(diffusion.loss_fn)
        self.diffusion, self.ar_weight = diffusion, ar_weight

    def part_names(self) -> tuple[str, ...]:
        """Both losses, without ``ar_weight``, and the parts of the diffusion loss."""
        return (*self.parts, *self.diffusion.part_names())

    def weigh(self, batch: Batch, totals: StepTotals) -> dict[str, Any]:
        """As ``Objective.weigh``, over ``K`` noisy tokens and, behind them, the ``A`` tokens that predict the next one.

        ``num_noisy`` of the result is ``K``.
        """
        noisy, ids = self.diffusion.weigh(batch, totals), batch["ar_response_ids"]
        scale = token_scale(
            self.reduction, ids, num_samples=totals.num_samples, num_loss_tokens=totals.num_ar_tokens
        ).flatten()
        positions = (ids.flatten() >= 0).nonzero().flatten()
        return {
            **noisy,
            "output_positions": torch.cat([noisy["output_positions"], positions]),
            "output_weight": torch.cat([noisy["output_weight"], scale[positions]]),
            "num_noisy": len(noisy["output_positions"]),
        }

    def token_weight(self, batch: Batch, totals: StepTotals, positions: Tensor) -> Tensor:
        """Those of the diffusion loss; ``weigh`` adds the others."""
        return self.diffusion.token_weight(batch, totals, positions)

    def loss(self, batch: Batch) -> BatchLoss:
        """Loss of the noisy tokens, and of the tokens behind the others; the next token always lies right behind."""
        number, positions, weight = batch["num_noisy"], batch["output_positions"], batch["output_weight"]
        noisy = self.diffusion.loss({**batch, "output_positions": positions[:number], "output_weight": weight[:number]})
        labels = batch["input_ids"].flatten()[positions[number:] + 1]
        return _JointLoss(noisy, number, labels, weight[number:], self.ar_weight)

    def reduce(self, total: float, sums: Sequence[float], totals: StepTotals) -> dict[str, float]:
        """As ``Objective.reduce``: the two losses are averages over different tokens."""
        del total
        diffusion, ar, *rest = sums
        parts = self.diffusion.reduce(diffusion, rest, totals)
        number = totals.num_samples if self.reduction == "mean" else totals.num_ar_tokens
        diffusion, ar = parts.pop("loss"), ar / max(number, 1)
        return {"loss": diffusion + self.ar_weight * ar, "diffusion_loss": diffusion, "ar_loss": ar, **parts}


class _JointLoss(BatchLoss):
    """Loss over ``K`` noisy tokens and, behind them, ``A`` context tokens."""

    def __init__(self, noisy: BatchLoss, number: int, labels: Tensor, weight: Tensor, ar_weight: float) -> None:
        super().__init__(noisy, torch.zeros(2, dtype=torch.float64, device=labels.device))
        self.noisy, self.number, self.labels, self.weight, self.ar_weight = noisy, number, labels, weight, ar_weight

    def __call__(self, logits: Tensor, part: slice) -> Tensor:
        """Total of a chunk, which may hold tokens of both kinds."""
        cut = min(max(self.number - part.start, 0), len(logits))
        total = logits.new_zeros((), dtype=torch.float64 if logits.dtype == torch.float64 else torch.float32)
        if cut:
            value = self.noisy(logits[:cut], slice(part.start, part.start + cut))
            self.sums[0] += value.detach()
            total = total + value
        if cut < len(logits):
            rest = slice(part.start + cut - self.number, part.stop - self.number)
            own = logits[cut:] if logits.dtype == torch.float64 else logits[cut:].float()
            per_token = F.cross_entropy(own, self.labels[rest], reduction="none")
            value = (per_token * self.weight[rest].to(per_token.dtype)).sum()
            self.sums[1] += value.detach()
            total = total + self.ar_weight * value
        return total

    def parts(self) -> Tensor:
        """Both losses, then the parts of the first."""
        return torch.cat([self.sums, self.noisy.parts()])
