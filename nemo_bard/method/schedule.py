"""Which noise holds when: the ``noise`` and ``validation_noise`` sections of a recipe, and the phases of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, ClassVar

from nemo_bard.base.settings import check_keys, check_settings, choice, flag, fraction, integer, setting
from nemo_bard.method.noise import NOISES, Noise, NoiseLevels, make_noise, parameter_names


@dataclass(frozen=True, kw_only=True)
class NoiseSettings:
    """The ``noise`` section of a recipe.

    Raises:
        ValueError: For an unknown name, or a value that is not allowed.
    """

    name: str = setting("mask", choice(NOISES.names, dotted=True), "kind of noise; also a dotted name")
    """``mask``, ``uniform``, ``mixed``, or any other of ``nemo_bard.method.noise.NOISES``."""
    low: float = setting(1e-3, fraction(), "smallest noise level t")
    """Smallest noise level ``t``, > 0."""
    high: float = setting(1.0, fraction(), "largest noise level")
    """Largest noise level."""
    per: str = setting(
        "block", choice(NoiseLevels.PER), "one level per block of a response, or one for all of a sample"
    )
    """``block``: one level per block, stratified over a response; ``sample``: one level for all of a sample."""
    num_random_ids: int | None = setting(
        None, integer(optional=True), "random ids are below this; null: the tokenizer's base vocabulary"
    )
    """Random replacements are drawn from ids below this; None means the tokenizer's base vocabulary, which ends
    where special and added tokens begin (151643 for Qwen3-VL, what the reference draws from)."""
    min_masked: int = setting(0, integer(0), "masked tokens that every sample has at least; needs per: sample")
    """Masked tokens that every sample has at least (all, if it has fewer); for noise that supervises what it masks, with
    ``per: sample``."""
    complementary: bool = setting(False, flag(), "every response twice, with the noise and with its complement")
    """Lay every response out twice, once with the noise and once with its complement; for noise that has one. Levels then
    come from the part of [low, high] whose complement lies in it too."""
    parameters: tuple[tuple[str, Any], ...] = ()
    """Parameters of the noise itself, as pairs of name and value."""

    def __post_init__(self) -> None:
        kind = NOISES.get(self.name)
        check_settings(self, "noise")
        NoiseLevels(low=float(self.low), high=float(self.high), per=self.per)
        self._check_min_masked(kind)
        self._check_complementary(kind)
        _ = self.noise  # checks its parameters

    def _check_min_masked(self, kind: type[Noise]) -> None:
        if not self.min_masked:
            return
        if not kind.supervises_masks or self.per != "sample":
            raise ValueError(
                f"noise.min_masked={self.min_masked} needs noise.name: {_names('supervises_masks')} and noise.per: sample,"
                f" got {self.name!r} and {self.per!r}"
            )

    def _check_complementary(self, kind: type[Noise]) -> None:
        if not self.complementary:
            return
        if not kind.has_complement:
            raise ValueError(f"noise.complementary needs noise.name: {_names('has_complement')}, got {self.name!r}")
        if self.min_masked:
            raise ValueError(
                f"noise.complementary supervises every token once and does not go with noise.min_masked="
                f"{self.min_masked}; set it to 0"
            )
        if not (self.low < 0.5 < self.high or self.low == self.high == 0.5):
            raise ValueError(
                f"noise.complementary needs low < 0.5 < high, because the complement of level t has level 1 - t, got"
                f" low={self.low}, high={self.high}"
            )

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any] | None, *, section: str = "noise", more: Sequence[str] = ()
    ) -> NoiseSettings:
        """Build from a recipe's section; ``section`` is its name in error messages, ``more`` further keys it knows.

        Raises:
            ValueError: For an unknown key (names the nearest one) or a value that is not allowed.
        """
        values = dict(values or {})
        with _named(section):
            own = _own_keys(values.get("name", "mask"))
            general = _general_keys()
            check_keys(section, values, [*general, *own, *more])
            parameters = tuple((name, values.pop(name)) for name in own if name in values)
            return cls(**values, parameters=parameters)

    @cached_property
    def noise(self) -> Noise:
        """The noise with its parameters."""
        return make_noise(self.name, **dict(self.parameters))

    def levels(self) -> NoiseLevels:
        """How the level of each block is drawn; with ``complementary`` from a range that ``t -> 1 - t`` maps to itself."""
        low, high = float(self.low), float(self.high)
        if self.complementary:
            low = max(low, 1.0 - high)
            high = 1.0 - low
        return NoiseLevels(low=low, high=high, per=self.per)


@dataclass(frozen=True, kw_only=True)
class NoisePhase:
    """One phase of a noise schedule."""

    until: float
    """Fraction of the run at which it ends, in (0, 1]."""
    settings: NoiseSettings
    """Its noise; with ``ramp`` that of its last step."""
    ramp: bool = False
    """Move ``low`` and ``high`` linearly, step by step, from those of the phase before to its own."""


@dataclass(frozen=True, kw_only=True)
class NoiseSchedule:
    """Which noise holds at which step of a run: a pure function of the step and the length of the run."""

    phases: tuple[NoisePhase, ...]
    """At least one, in order; the last ends at 1."""

    PHASE_KEYS: ClassVar[tuple[str, ...]] = ("until", "ramp", "name", "low", "high", "per", "min_masked")
    """What a phase of ``noise.schedule`` may say besides parameters of its noise; all but the first two replace keys of
    the ``noise`` section."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> NoiseSchedule:
        """Build from a recipe's ``noise`` section, in which ``schedule`` may be absent.

        Raises:
            ValueError: One line that names the phase, the key, its value and what is allowed.
        """
        values = dict(values or {})
        rows = values.pop("schedule", None)
        base = NoiseSettings.from_dict(values, more=("schedule",))
        if rows is None:
            return cls(phases=(NoisePhase(until=1.0, settings=base),))
        if not isinstance(rows, (list, tuple)) or not rows:
            raise ValueError(
                'noise.schedule must be a list of phases such as [{"until": 0.3, "high": 0.5}, {"low": 0.2}], got'
                f" {rows!r}"
            )
        phases: list[NoisePhase] = []
        for number, row in enumerate(rows):
            key = f"noise.schedule[{number}]"
            if not isinstance(row, Mapping):
                raise ValueError(f"{key} must be a section of keys, got {row!r}")
            before = phases[-1].until if phases else 0.0
            settings = cls._settings(key, base, row)
            until = cls._until(key, row.get("until"), before, number == len(rows) - 1)
            ramp = row.get("ramp", False)
            if not isinstance(ramp, bool):
                raise ValueError(f"{key}.ramp must be true or false, got {ramp!r}")
            if ramp and not phases:
                raise ValueError(f"{key}.ramp: the first phase has no levels before it to start from")
            phases.append(NoisePhase(until=until, settings=settings, ramp=ramp))
        return cls(phases=tuple(phases))

    @classmethod
    def _settings(cls, key: str, base: NoiseSettings, row: Mapping[str, Any]) -> NoiseSettings:
        """The noise of a phase; parameters of the section hold on as long as its kind of noise does."""
        changes = {name: value for name, value in row.items() if name not in ("until", "ramp")}
        name = changes.get("name", base.name)
        try:
            own = _own_keys(name)
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error
        check_keys(key, row, [*cls.PHASE_KEYS, *own])
        kept = dict(base.parameters) if name == base.name else {}
        kept |= {name: changes.pop(name) for name in own if name in changes}
        try:
            return replace(base, **changes, parameters=tuple(kept.items()))
        except ValueError as error:
            raise ValueError(f"{key}: {error}") from error

    @staticmethod
    def _until(key: str, value: object, before: float, is_last: bool) -> float:
        if is_last:
            if value not in (None, 1) or isinstance(value, bool):
                raise ValueError(f"{key}.until: the last phase is open; leave it out, got {value!r}")
            return 1.0
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1:
            raise ValueError(f"{key}.until must be a fraction of the run between 0 and 1, got {value!r}")
        if value <= before:
            raise ValueError(f"{key}.until must be greater than that of the phase before ({before}), got {value}")
        return float(value)

    def first_steps(self, total_steps: int) -> list[int]:
        """First step of each phase in a run of ``total_steps``, and the run's end; phases may come out empty."""
        return [0, *(round(phase.until * total_steps) for phase in self.phases)]

    def at(self, step: int, total_steps: int) -> tuple[int, NoiseSettings]:
        """Number of the phase that holds at a step (counted from 0), and the noise there."""
        edges = self.first_steps(total_steps)
        number = sum(step >= edge for edge in edges[1:-1])
        phase = self.phases[number]
        if not phase.ramp:
            return number, phase.settings
        before, after = self.phases[number - 1].settings, phase.settings
        part = (step - edges[number] + 1) / max(edges[number + 1] - edges[number], 1)
        low, high = (
            getattr(before, name) + (getattr(after, name) - getattr(before, name)) * min(part, 1.0)
            for name in ("low", "high")
        )
        return number, replace(after, low=low, high=min(max(low, high), 1.0))


@dataclass(frozen=True, kw_only=True)
class ValidationNoise:
    """The ``validation_noise`` section of a recipe."""

    settings: NoiseSettings
    """The noise of validation; with ``levels`` without a meaning for ``low`` and ``high``."""
    levels: tuple[NoiseSettings, ...] = ()
    """Noise of each pass, every one at a single level; none: one pass with ``settings``."""

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None, training: NoiseSettings) -> ValidationNoise:
        """Build from a recipe's section, which may be absent: then the kind of noise is that of training.

        Raises:
            ValueError: For levels outside (0, 1], or a section that is not as it must be.
        """
        if values is None:
            kind = {"name": training.name, "parameters": training.parameters}
            return cls(settings=NoiseSettings(**kind, num_random_ids=training.num_random_ids))
        section = "validation_noise"
        rest = {key: value for key, value in values.items() if key != "levels"}
        settings = NoiseSettings.from_dict(rest, section=section, more=("levels",))
        levels = values.get("levels")
        if levels is None:
            return cls(settings=settings)
        good = isinstance(levels, (list, tuple)) and levels and all(_is_level(t) for t in levels)
        if not good or len(set(levels)) != len(levels):
            raise ValueError(f"{section}.levels must be a list of different numbers in (0, 1], got {levels!r}")
        for key in ("low", "high"):
            if key in rest:
                raise ValueError(f"{section}.{key}={rest[key]!r} and {section}.levels exclude each other")
        passes = [NoiseSettings.from_dict({**rest, "low": t, "high": t}, section=section) for t in levels]
        return cls(settings=settings, levels=tuple(passes))

    def names(self) -> list[str]:
        """Names under which the losses of single levels are logged."""
        return [level_name(noise.low) for noise in self.levels]


def level_name(t: float) -> str:
    """Return the name of the validation loss at noise level ``t``."""
    return f"val_loss_t{t:g}"


def _is_level(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value <= 1


def _general_keys() -> list[str]:
    """Keys that every noise has."""
    return [field.name for field in fields(NoiseSettings) if field.name != "parameters"]


def _own_keys(name: str) -> list[str]:
    """Keys of one noise alone.

    Raises:
        ValueError: If there is no such noise, or one of its parameters is a key that every noise has.
    """
    own = parameter_names(NOISES.get(name))
    for key in (*_general_keys(), *NoiseSchedule.PHASE_KEYS, "schedule", "levels"):
        if key in own:
            raise ValueError(f"noise {name}: its parameter {key!r} is a key of the section itself; rename it")
    return own


def _names(ability: str) -> str:
    """Names of the noises that can do something."""
    return " or ".join(name for name in NOISES if getattr(NOISES.get(name), ability))


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Give errors the name of the section that is read; settings and noises call it ``noise``."""
    try:
        yield
    except ValueError as error:
        text = str(error)
        if section == "noise" or not text.startswith("noise."):
            raise
        raise ValueError(f"{section}.{text.removeprefix('noise.')}") from error
