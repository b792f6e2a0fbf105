"""Noise of block diffusion: levels per block, corruptions, and the generator that makes both reproducible (torch only).

``t`` is the noise level, 0 clean and 1 fully corrupted, for every noise.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from nemo_bard.base.registry import Registry
from nemo_bard.base.settings import check_settings, fraction, setting

MIN_CLASS_WEIGHT = 1e-3


class NoiseOutput(NamedTuple):
    """A corrupted response; every field is ``[R]`` like the clean ids."""

    noisy_ids: Tensor
    """int64 ids after corruption."""
    noise_mask: Tensor
    """True where a token was corrupted (for random replacements: drawn anew, even if the same id came out)."""
    loss_mask: Tensor
    """True where the loss counts."""


def sample_generator(seed: int, epoch: int, sample_index: int, *, stream: int = 0) -> torch.Generator:
    """Return the CPU generator of one sample's noise: a pure function of its arguments.

    World size, micro-batching, workers and resuming therefore cannot change the noise.

    Args:
        seed: Seed of the run, any integer.
        epoch: Epoch, >= 0.
        sample_index: Index of the sample in the data set, >= 0.
        stream: Which of several independent draws of the sample.
    """
    mask64, state = (1 << 64) - 1, 0x9E3779B97F4A7C15
    for part in (seed, epoch, sample_index, stream):
        state = (state ^ (int(part) & mask64)) & mask64
        state = (state + 0x9E3779B97F4A7C15) & mask64  # splitmix64, Steele et al. 2014
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask64
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask64
        state ^= state >> 31
    return torch.Generator().manual_seed(state >> 1)


@dataclass(frozen=True, kw_only=True)
class NoiseLevels:
    """How the noise level ``t`` of each block is drawn."""

    low: float = 1e-3
    """Smallest ``t``, > 0 because the loss weight is ``1 / t``."""
    high: float = 1.0
    """Largest ``t``."""
    per: str = "block"
    """``block``: stratified over the blocks of a response; ``sample``: one level for the whole sample."""

    PER: ClassVar[tuple[str, ...]] = ("block", "sample")

    def __post_init__(self) -> None:
        if not 0.0 < self.low <= self.high <= 1.0:
            raise ValueError(f"noise levels need 0 < low <= high <= 1, got low={self.low}, high={self.high}")
        if self.per not in self.PER:
            raise ValueError(f"noise level 'per' must be one of {', '.join(self.PER)}, got {self.per!r}")

    def sample(self, num_blocks: int, *, generator: torch.Generator | None = None) -> Tensor:
        """Draw one level per block.

        ``block``: ``[low, high]`` is cut into ``num_blocks`` equal strata, one uniform draw from each, in random order
        (stratified sampling; the reference stratifies [0, 1] and clamps inside a stratum, so that its bounds bind
        nothing).

        Args:
            num_blocks: Number of blocks, >= 1.
            generator: Source of randomness; the global one if None.

        Returns:
            ``[num_blocks]`` float32 in [low, high].

        Raises:
            ValueError: If ``num_blocks`` < 1.
        """
        if num_blocks < 1:
            raise ValueError(f"num_blocks must be >= 1, got {num_blocks}")
        if self.per == "sample":
            u = torch.rand(1, generator=generator).expand(num_blocks)
        else:
            strata = torch.randperm(num_blocks, generator=generator)
            u = (torch.rand(num_blocks, generator=generator) + strata) / num_blocks
        return (self.low + (self.high - self.low) * u).clamp(self.low, self.high)


def mixed_probabilities(t: Tensor) -> Tensor:
    """Probabilities of (mask, random id, keep) of the mixed noise scheduler (BARD, arXiv 2604.16514).

    With ``phi = pi / 2 * t`` they are proportional to ``1 - cos(phi)``, ``sin(phi) + cos(phi) - 1``, ``1 - sin(phi)``,
    each at least 0.001.

    Args:
        t: Noise levels of any shape in [0, 1].

    Returns:
        float32 ``[..., 3]``, summing to 1.
    """
    phi = t.float() * (math.pi / 2)
    weights = torch.stack([1 - phi.cos(), phi.sin() + phi.cos() - 1, 1 - phi.sin()], -1).clamp_min(MIN_CLASS_WEIGHT)
    return weights / weights.sum(-1, keepdim=True)


def _check(clean_ids: Tensor, t: Tensor, upper: int, name: str) -> None:
    if t.shape != clean_ids.shape:
        raise ValueError(f"t must have the shape of clean_ids {tuple(clean_ids.shape)}, got {tuple(t.shape)}")
    if t.numel() and not bool(((t > 0) & (t <= 1)).all()):
        raise ValueError(f"t must be in (0, 1], got values from {t.min().item():g} to {t.max().item():g}")
    if upper < 1:
        raise ValueError(f"{name} must be >= 1, got {upper}")


@dataclass(frozen=True, kw_only=True)
class Noise(ABC):
    """How tokens are corrupted, and what goes with it.

    A noise of one's own is a frozen dataclass below this one. Its fields are its parameters: made with
    ``nemo_bard.base.settings.setting``, they are keys of a recipe's ``noise`` section, checked by their ``Check``. It is
    registered in ``NOISES``, declared as an entry point of the group ``nemo_bard.noises``, or named by its dotted name.

    Raises:
        ValueError: If a parameter is not allowed.
    """

    path: ClassVar[str] = ""
    """Name of the probability path from clean to corrupted tokens, for losses whose formula holds on one path alone."""
    has_complement: ClassVar[bool] = False
    """Whether ``complement`` exists."""
    supervises_masks: ClassVar[bool] = False
    """Whether exactly the masked tokens are supervised, so that ``min_masked`` may mask further ones."""

    def __post_init__(self) -> None:
        check_settings(self, "noise")

    @abstractmethod
    def corrupt(
        self,
        clean_ids: Tensor,
        t: Tensor,
        *,
        mask_token_id: int,
        num_random_ids: int,
        generator: torch.Generator | None = None,
    ) -> NoiseOutput:
        """Corrupt one response.

        Args:
            clean_ids: Response tokens (padding included), ``[R]`` int64; not modified.
            t: Noise level of each token, ``[R]`` in (0, 1], constant within a block.
            mask_token_id: Id of ``[MASK]``.
            num_random_ids: Random replacements are drawn from ``[0, num_random_ids)``.
            generator: Source of randomness on CPU; the global one if None.

        Returns:
            Corrupted ids, and which tokens are corrupted and supervised.

        Raises:
            ValueError: If ``t`` leaves (0, 1] or has another shape.
        """

    def complement(self, clean_ids: Tensor, drawn: NoiseOutput, *, mask_token_id: int) -> NoiseOutput:
        """Corrupt exactly the tokens that a draw left clean: a draw at the levels ``1 - t``.

        Args:
            clean_ids: Response tokens, ``[R]`` int64; not modified.
            drawn: What ``corrupt`` made of them.
            mask_token_id: Id of ``[MASK]``.

        Raises:
            NotImplementedError: If the noise has none, see ``has_complement``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no complement")

    def misfit(self, loss: type) -> str | None:
        """Say why a loss class cannot be trained on this noise; None if it can."""
        wanted = getattr(loss, "path", None)
        return None if wanted in (None, self.path) else f"its formula holds on the path from {wanted} noise"


@dataclass(frozen=True, kw_only=True)
class MaskNoise(Noise):
    """Absorbing noise: a token becomes ``[MASK]`` with probability ``t`` (MDLM, arXiv 2406.07524)."""

    path = "mask"
    has_complement = True
    supervises_masks = True

    def corrupt(
        self,
        clean_ids: Tensor,
        t: Tensor,
        *,
        mask_token_id: int,
        num_random_ids: int,
        generator: torch.Generator | None = None,
    ) -> NoiseOutput:
        """Corrupt one response; see ``Noise.corrupt``. Supervised: masked tokens."""
        _check(clean_ids, t, num_random_ids, "num_random_ids")
        masked = torch.rand(clean_ids.shape, generator=generator) < t
        return NoiseOutput(clean_ids.masked_fill(masked, mask_token_id), masked, masked)

    def complement(self, clean_ids: Tensor, drawn: NoiseOutput, *, mask_token_id: int) -> NoiseOutput:
        """Mask exactly the tokens that a draw left clean.

        Under the draw a token is masked with probability ``t``, here with ``1 - t``: this is a draw of the same noise at
        the level ``1 - t``, and together they supervise every token once.
        """
        masked = ~drawn.noise_mask
        return NoiseOutput(clean_ids.masked_fill(masked, mask_token_id), masked, masked)


@dataclass(frozen=True, kw_only=True)
class UniformNoise(Noise):
    """Uniform noise: with probability ``t`` (at most ``max_t``) a token becomes a uniformly random vocabulary id."""

    path = "uniform"

    max_t: float = setting(0.999, fraction(), "largest probability of a replacement")
    """Largest probability of a replacement."""

    def corrupt(
        self,
        clean_ids: Tensor,
        t: Tensor,
        *,
        mask_token_id: int,
        num_random_ids: int,
        generator: torch.Generator | None = None,
    ) -> NoiseOutput:
        """Corrupt one response; see ``Noise.corrupt``. Supervised: every token of the response."""
        del mask_token_id
        _check(clean_ids, t, num_random_ids, "num_random_ids")
        drawn = torch.rand(clean_ids.shape, generator=generator) < t.clamp_max(self.max_t)
        random_ids = torch.randint(num_random_ids, clean_ids.shape, generator=generator)
        return NoiseOutput(torch.where(drawn, random_ids, clean_ids), drawn, torch.ones_like(drawn))


@dataclass(frozen=True, kw_only=True)
class MixedNoise(Noise):
    """The paper's mixed noise scheduler: mask, replace by a random id, or keep (``mixed_probabilities``)."""

    path = "mixed"

    def corrupt(
        self,
        clean_ids: Tensor,
        t: Tensor,
        *,
        mask_token_id: int,
        num_random_ids: int,
        generator: torch.Generator | None = None,
    ) -> NoiseOutput:
        """Corrupt one response; see ``Noise.corrupt``. Supervised: tokens that differ from the clean ones."""
        _check(clean_ids, t, num_random_ids, "num_random_ids")
        probabilities = mixed_probabilities(t)
        u = torch.rand(clean_ids.shape, generator=generator)
        random_ids = torch.randint(num_random_ids, clean_ids.shape, generator=generator)
        masked = u < probabilities[..., 0]
        replaced = ~masked & (u < probabilities[..., 0] + probabilities[..., 1])
        noisy = torch.where(replaced, random_ids, clean_ids.masked_fill(masked, mask_token_id))
        return NoiseOutput(noisy, masked | replaced, noisy != clean_ids)


def parameter_names(noise: type[Noise]) -> list[str]:
    """Names of a noise's own parameters."""
    return [field.name for field in fields(noise)]


def _check_class(name: str, noise: Any) -> None:
    """Raise ValueError unless something from outside is a noise."""
    if not (isinstance(noise, type) and issubclass(noise, Noise) and is_dataclass(noise)):
        raise ValueError(f"noise.name: {name} is {noise!r}, not a dataclass below nemo_bard.method.Noise")


NOISES: Registry[type[Noise]] = Registry(
    "noise.name",
    "nemo_bard.noises",
    {"mask": MaskNoise, "uniform": UniformNoise, "mixed": MixedNoise},
    check=_check_class,
)


def make_noise(name: str, **parameters: Any) -> Noise:
    """Return the noise called ``name`` (also a dotted name) with these parameters.

    Raises:
        ValueError: If there is none (the nearest one and all known ones are named), or a parameter is not allowed.
    """
    return NOISES.get(name)(**parameters)
