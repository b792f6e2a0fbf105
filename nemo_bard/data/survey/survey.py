"""A survey of a data set: what of it a run draws, what a limit of tokens leaves out, what padding costs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from nemo_bard.data.lengths import UNKNOWN_LENGTH, SampleSizes
from nemo_bard.data.survey.draws import Draws
from nemo_bard.data.survey.margins import Estimate, ratio, share_of_rows
from nemo_bard.data.survey.measure import Measured
from nemo_bard.data.survey.sources import Source

LIMITS = (1024, 2048, 4096, 8192, 16384, 32768)
"""Values of ``max_length`` that are told of."""
BLOCK_SIZES = (4, 8, 16, 32)
"""Block sizes whose padding is told."""
QUANTILES = (0.05, 0.5, 0.95, 1.0)


@dataclass(frozen=True, kw_only=True)
class SourceSurvey:
    """What is known of a source."""

    source: Source
    measured: Measured
    draws: Draws

    @property
    def known_sizes(self) -> SampleSizes | None:
        """Tokens of samples that could be measured; None without a processor, or if there is none."""
        sizes = self.measured.sizes
        if sizes is None or not len(sizes):
            return None
        last = sizes.responses[sizes.response_edges[1:] - 1, 1]
        known = np.flatnonzero(last < UNKNOWN_LENGTH)
        if len(known) == len(sizes):
            return sizes
        return choose_sizes(sizes, known) if len(known) else None

    @property
    def unmeasured(self) -> int:
        """Rows that were looked at and cannot be used."""
        return len(self.measured.unusable)

    def known_rows(self, sizes: SampleSizes) -> int:
        """How many usable samples ``sizes`` stands for: its own number if it is of every sample."""
        return len(sizes) if self.measured.sizes_of_all else max(self.source.rows, len(sizes))


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What is known of a data set."""

    sources: list[SourceSurvey]
    block_size: int | None
    """Of the token counts; None where none were made."""
    turns: str
    max_length: int | None
    """The configured one, beside ``LIMITS``."""
    run_samples: int

    @property
    def limits(self) -> list[int]:
        """Values of ``max_length`` that are told of."""
        return sorted({*LIMITS, *([] if self.max_length is None else [self.max_length])})

    def row_lengths(self, one: SourceSurvey) -> np.ndarray | None:
        """Tokens of training rows, noisy copies included, ``[n]``; None if they are not known."""
        sizes = one.known_sizes
        if sizes is None or self.block_size is None:
            return None
        return sizes.row_lengths(self.block_size, turns=self.turns)

    def kept(self, one: SourceSurvey) -> dict[int, Estimate] | None:
        """Share of the samples of a source that are not longer than each limit; None if lengths are not known."""
        lengths, sizes = self.row_lengths(one), one.known_sizes
        if lengths is None or sizes is None:
            return None
        return {limit: share_of_rows(lengths <= limit, one.known_rows(sizes)) for limit in self.limits}

    def padding(self, one: SourceSurvey) -> dict[int, Estimate] | None:
        """Share of the tokens of training rows that fill up blocks, by block size; None if lengths are not known."""
        sizes = one.known_sizes
        if sizes is None:
            return None
        owner = np.repeat(np.arange(len(sizes)), np.diff(sizes.response_edges))
        lengths = (sizes.responses[:, 1] - sizes.responses[:, 0]).astype(np.int64)
        counted = np.ones(len(lengths), dtype=bool)
        if self.turns == "last":
            counted[:] = False
            counted[sizes.response_edges[1:] - 1] = True
        found = {}
        blocks: list[int] = sorted({*BLOCK_SIZES, *([] if self.block_size is None else [self.block_size])})
        for block in blocks:
            filled = np.bincount(owner, weights=(-lengths % block) * counted, minlength=len(sizes))
            found[block] = ratio(filled, sizes.row_lengths(block, turns=self.turns), one.known_rows(sizes))
        return found

    def kept_of_draws(self) -> dict[int, float] | None:
        """Share of the run's samples that are not longer than each limit; None if that is not known of a source."""
        shares = [(one.draws.weight, self.kept(one)) for one in self.sources if one.draws.samples]
        if not shares or any(kept is None for _, kept in shares):
            return None
        total = sum(weight for weight, _ in shares)
        return {n: sum(w * kept[n].value for w, kept in shares if kept) / total for n in self.limits}


def choose_sizes(sizes: SampleSizes, chosen: np.ndarray) -> SampleSizes:
    """The sizes of some samples.

    Args:
        sizes: Of ``n`` samples.
        chosen: Numbers of samples in order, ``[m]``.
    """

    def pick(edges: np.ndarray, pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        counts = np.diff(edges)
        wanted = np.zeros(len(counts), dtype=bool)
        wanted[chosen] = True
        new = np.concatenate([[0], np.cumsum(counts[chosen])]).astype(np.int64)
        return new, pairs[np.repeat(wanted, counts)]

    response_edges, responses = pick(sizes.response_edges, sizes.responses)
    media_edges, media = pick(sizes.media_edges, sizes.media)
    return SampleSizes(response_edges=response_edges, responses=responses, media_edges=media_edges, media=media)


def quantiles(values: np.ndarray) -> dict[str, float]:
    """``5 %``, ``median``, ``95 %``, ``max`` and ``mean`` of numbers; empty for none."""
    if not len(values):
        return {}
    found = np.quantile(values, QUANTILES)
    return {**dict(zip(("5 %", "median", "95 %", "max"), map(float, found), strict=True)), "mean": float(values.mean())}


def distributions(survey: Survey, one: SourceSurvey) -> dict[str, np.ndarray]:
    """What histograms are drawn of, by title."""
    measured, found = one.measured, {}
    lengths, sizes = survey.row_lengths(one), one.known_sizes
    if lengths is None or sizes is None:
        found["words of a sample"] = measured.column("words")
        found["words of its responses"] = measured.column("response_words")
    else:
        found["tokens of a training row"] = lengths
        found["tokens of a response"] = (sizes.responses[:, 1] - sizes.responses[:, 0]).astype(np.int64)
    found["pixels of an image"] = measured.pixels
    found["images of a sample"] = measured.column("images")
    found["turns of a sample"] = measured.column("turns")
    return found


def as_dict(survey: Survey) -> dict[str, Any]:
    """Everything as plain values."""
    return {
        "run_samples": survey.run_samples,
        "block_size": survey.block_size,
        "turns": survey.turns,
        "max_length": survey.max_length,
        "kept_of_draws": survey.kept_of_draws(),
        "sources": [_source_dict(survey, one) for one in survey.sources],
    }


def _source_dict(survey: Survey, one: SourceSurvey) -> dict[str, Any]:
    entry, measured = one.source.entry, one.measured

    def plain(estimates: Mapping[int, Estimate] | None) -> dict[int, dict[str, float]] | None:
        return None if estimates is None else {key: value._asdict() for key, value in estimates.items()}

    left_out = None
    if entry is not None:
        left_out = {"layout": entry.layout, "read": entry.read, "filtered": entry.filtered, "rejected": entry.rejected}
    return {
        "name": one.source.name,
        "rows": one.source.rows,
        "prepared": left_out,
        "draws": asdict(one.draws),
        "looked_at": measured.looked,
        "unusable": [row._asdict() for row in measured.unusable],
        "lengths_of_all": measured.sizes_of_all,
        "distributions": {name: quantiles(values) for name, values in distributions(survey, one).items()},
        "characters": quantiles(measured.column("characters")),
        "kept": plain(survey.kept(one)),
        "padding": plain(survey.padding(one)),
    }
