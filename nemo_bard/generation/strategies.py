"""Remasking strategies: which of the masked positions a denoising step fixes.

A strategy is a frozen dataclass that owns its parameters; one from another package is registered in
``nemo_bard.generation.parameters.STRATEGIES``. Nothing here imports torch, so that the command line can list what there is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from nemo_bard.base.settings import fraction, integer, number, setting

if TYPE_CHECKING:
    from torch import Tensor


class StepState(NamedTuple):
    """What a strategy sees of one step; tensors are ``[N, B]``."""

    confidence: Tensor
    """Probability of the proposed token; -inf where nothing is masked."""
    entropy: Tensor | None
    """Entropy in nats; inf where nothing is masked. None unless the strategy needs it."""
    is_masked: Tensor
    """True where a token is masked."""
    quota: int | Tensor
    """Tokens the even split gives to this step; for a strategy with ``on_device`` also ``[N, 1]`` int64, a number per row."""


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Base of the strategies; parameters are fields made with ``nemo_bard.base.settings.setting``.

    A parameter is a generation setting, a flag of the command line and a column of calibration as soon as the strategy is
    registered. Two strategies may share a parameter if both declare it alike.
    """

    needs_entropy: ClassVar[bool] = False
    """Whether ``fix`` reads ``StepState.entropy``, which costs a pass over the logits."""
    swept: ClassVar[Mapping[str, Sequence[Any]]] = {}
    """Values that calibration tries for a parameter; without any it tries numbers of steps instead."""
    on_device: ClassVar[bool] = False
    """Whether ``fix`` reads no tensor on the host and takes a tensor as quota, so that it can be part of a CUDA graph; without,
    decoding on CUDA goes step by step from the host."""
    fixed_steps: ClassVar[bool] = False
    """Whether every block takes exactly ``denoising_steps`` steps."""
    calibrated: ClassVar[bool] = True
    """Whether calibration tries this strategy unless it is told which ones to try."""
    by_next_token: ClassVar[bool] = False
    """Whether answers are those of the next-token distribution; see ``NextTokenStrategy``."""

    @abstractmethod
    def fix(self, state: StepState) -> Tensor:
        """Choose the positions to fix, ``[N, B]`` bool.

        Only masked positions may be chosen, and at least ``state.quota`` of every row that has as many: then a block is done
        within ``denoising_steps``.
        """


CONFIDENCE_THRESHOLD = "fix every token above this probability, in (0, 1]; the test is strict"


@dataclass(frozen=True, kw_only=True)
class LowConfidenceStatic(Strategy):
    """Fix the ``quota`` most confident masked tokens."""

    on_device: ClassVar[bool] = True
    fixed_steps: ClassVar[bool] = True

    def fix(self, state: StepState) -> Tensor:
        """See ``Strategy``."""
        return _most_confident(state)


@dataclass(frozen=True, kw_only=True)
class LowConfidenceDynamic(Strategy):
    """Fix every masked token with confidence > threshold; where these are fewer than ``quota``, the most confident."""

    on_device: ClassVar[bool] = True
    swept: ClassVar[Mapping[str, Sequence[Any]]] = {"confidence_threshold": (0.5, 0.7, 0.8, 0.9, 0.95)}

    confidence_threshold: float = setting(0.5, fraction(), CONFIDENCE_THRESHOLD)

    def fix(self, state: StepState) -> Tensor:
        """See ``Strategy``."""
        above = (state.confidence > self.confidence_threshold) & state.is_masked
        enough = above.sum(-1, keepdim=True) >= state.quota
        return above.where(enough, _most_confident(state))


@dataclass(frozen=True, kw_only=True)
class EntropyBound(Strategy):
    """Fix the lowest-entropy tokens while their joint mutual information stays bounded, at least ``quota`` (EB-Sampler).

    With entropies sorted upwards, the ``k`` first are fixed while ``sum_i H_i - max_i H_i <= entropy_bound``
    (arXiv 2505.24857).
    """

    needs_entropy: ClassVar[bool] = True
    on_device: ClassVar[bool] = True
    swept: ClassVar[Mapping[str, Sequence[Any]]] = {"entropy_bound": (0.05, 0.1, 0.2, 0.4, 0.8)}
    calibrated: ClassVar[bool] = False

    entropy_bound: float = setting(
        0.1, number(), "bound in nats on the joint mutual information of tokens fixed together (arXiv 2505.24857)"
    )

    def fix(self, state: StepState) -> Tensor:
        """See ``Strategy``."""
        assert state.entropy is not None
        values, order = state.entropy.sort(dim=-1, stable=True)
        finite = values.masked_fill(~values.isfinite(), 0.0)
        keep = ((finite.cumsum(-1) - finite) <= self.entropy_bound) & values.isfinite()
        keep = keep | (keep.new_ones(keep.shape).long().cumsum(-1) <= state.quota)
        return keep.scatter(-1, order, keep) & state.is_masked


@dataclass(frozen=True, kw_only=True)
class NextTokenStrategy(Strategy):
    """Base of the strategies whose answers are those of the next-token distribution of a causal context.

    ``nemo_bard.generation.next_token`` decodes them; no denoising step asks them anything.
    """

    by_next_token: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False

    @property
    def num_drafts(self) -> int:
        """How many blocks a forward drafts."""
        return 0

    def fix(self, state: StepState) -> Tensor:
        """Not used.

        Raises:
            RuntimeError: Always.
        """
        raise RuntimeError(f"{type(self).__name__} takes no denoising steps")


@dataclass(frozen=True, kw_only=True)
class Autoregressive(NextTokenStrategy):
    """Nothing: the next-token distribution of the same weights gives one token per forward (causal context only)."""


@dataclass(frozen=True, kw_only=True)
class SelfSpeculative(NextTokenStrategy):
    """Nothing: a block is drafted by diffusion and verified by the next-token distribution in the following forward, so that answers are exactly those of ``autoregressive`` (causal context only; arXiv 2604.06832 describes the idea).

    A forward verifies a draft and drafts the block behind it. How much of the draft will be accepted is not known before, so
    that blocks are drafted behind several of its tokens: those at which the draft most likely ends.
    """

    swept: ClassVar[Mapping[str, Sequence[Any]]] = {"drafts": (1, 2, 4, 8)}

    drafts: int = setting(
        4, integer(1), "blocks that a forward drafts, each behind another token of the draft that it verifies"
    )

    @property
    def num_drafts(self) -> int:
        """See ``NextTokenStrategy``."""
        return self.drafts


def _most_confident(state: StepState) -> Tensor:
    order = state.confidence.sort(dim=-1, descending=True, stable=True).indices
    rank = order.argsort(dim=-1)
    return (rank < state.quota) & state.is_masked
