"""The ``digits`` data set: real handwritten images, a question and an answer of several blocks, without a download.

Each sample shows a grid of handwritten digits from scikit-learn's ``load_digits`` (1,797 scans of 8 x 8 pixels, 16 grey
levels), asks to read them, and answers row by row. No scan is used by two splits.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from PIL import Image

SPLITS: dict[str, tuple[float, float]] = {"train": (0.0, 0.8), "validation": (0.8, 0.85), "test": (0.85, 1.0)}
"""Share of the shuffled scans that a split draws from, as a half-open interval."""

QUESTIONS: tuple[str, ...] = (
    "Read the digits.",
    "Which digits are shown?",
    "Read all digits in the image, row by row.",
)

_SPLIT_SEED = 20260
_SCAN_LEVELS = 16


@dataclass(frozen=True, kw_only=True)
class DigitsConfig:
    """What a ``digits`` sample looks like."""

    rows: int = 4
    """Rows of the grid."""
    columns: int = 4
    """Digits in a row."""
    cell_size: int = 32
    """Side of a cell in pixels."""
    margin: int = 3
    """White border of a cell in pixels."""
    jitter: int = 0
    """Largest shift of a digit inside its cell, in pixels, in both directions; at most ``margin``."""
    curriculum: int = 0
    """Over the first ``curriculum`` samples the grids grow: sizes are drawn from 1 x 1 up to a bound that rises to
    ``rows`` x ``columns``. A model that has to find 16 digits before it knows one learns slowly. Needs an unshuffled
    data loader."""
    column_separator: str = ""
    """Text between two digits of a row of the answer. With none, a digit's position runs along the image's columns."""
    row_separator: str = "\n"
    """Text between two rows of the answer."""
    questions: tuple[str, ...] = QUESTIONS
    """Wordings of the question, drawn per sample."""

    def __post_init__(self) -> None:
        lows = {"rows": 1, "columns": 1, "cell_size": 8, "margin": 0, "jitter": 0, "curriculum": 0}
        for name, low in lows.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < low:
                raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")
        if 2 * self.margin > self.cell_size - 8:
            raise ValueError(
                f"margin must be at most (cell_size - 8) / 2 = {(self.cell_size - 8) / 2:g}, got {self.margin}"
            )
        if self.jitter > self.margin:
            raise ValueError(f"jitter must be at most margin = {self.margin}, got {self.jitter}")
        for name in ("column_separator", "row_separator"):
            if re.search(r"\d", getattr(self, name)):
                raise ValueError(f"{name} must not hold a digit, got {getattr(self, name)!r}")
        if not self.questions or not all(isinstance(q, str) and q.strip() for q in self.questions):
            raise ValueError(f"questions must be one or more non-empty strings, got {self.questions!r}")


@functools.cache
def split_indices(split: str) -> tuple[int, ...]:
    """Indices into ``load_digits`` that a split draws from; the splits are disjoint and cover all scans.

    Raises:
        ValueError: If ``split`` is unknown.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {sorted(SPLITS)}, got {split!r}")
    count = len(_scans()[1])
    # RandomState's stream is frozen by NumPy's policy, Generator's is not: the split must not move with NumPy.
    order = np.random.RandomState(_SPLIT_SEED).permutation(count)
    low, high = SPLITS[split]
    return tuple(int(i) for i in order[round(low * count) : round(high * count)])


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans ``[1797, 8, 8]`` float64 in 0..16, and their digits ``[1797]`` int64."""
    from sklearn.datasets import load_digits

    data = cast("Any", load_digits())
    return data.images, data.target


@functools.cache
def _cells(side: int) -> np.ndarray:
    """All scans as black ink on white, enlarged to ``side``: ``[1797, side, side]`` uint8."""
    ink = np.round(255.0 * (1.0 - _scans()[0] / _SCAN_LEVELS)).astype(np.uint8)
    return np.stack([np.asarray(Image.fromarray(scan).resize((side, side), Image.Resampling.BILINEAR)) for scan in ink])


class DigitsDataset:
    """Grids of handwritten digits; a sample is a pure function of ``(seed, split, index)``.

    Args:
        split: One of ``SPLITS``.
        num_samples: Samples in an epoch.
        seed: Seed of the grids; the split of the scans does not depend on it.
        config: Shape of the grid and of the answer.

    Raises:
        ValueError: If the split is unknown or ``num_samples`` is not a positive integer.
    """

    def __init__(self, split: str, num_samples: int, *, seed: int = 0, config: DigitsConfig | None = None) -> None:
        if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 1:
            raise ValueError(f"num_samples must be an integer >= 1, got {num_samples!r}")
        if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
            raise ValueError(f"seed must be an integer in [0, 2**32), got {seed!r}")
        self.config = config if config is not None else DigitsConfig()
        self.split = split
        self.num_samples = num_samples
        self.seed = seed
        self._indices = np.asarray(split_indices(split))
        self._stream = list(SPLITS).index(split)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return ``conversation`` (user turn with image and question, assistant turn), ``sample_index`` and ``answer``.

        Raises:
            IndexError: If ``index`` is outside the data set.
        """
        if not 0 <= index < self.num_samples:
            raise IndexError(f"index {index} is outside a data set of {self.num_samples} samples")
        config = self.config
        rng = np.random.RandomState([self.seed, self._stream, index])
        chosen = self._indices[rng.randint(len(self._indices), size=self._grid(index, rng))]
        question = config.questions[rng.randint(len(config.questions))]
        answer = self._answer(_scans()[1][chosen])
        user = [{"type": "image", "image": self._draw(chosen, rng)}, {"type": "text", "text": question}]
        conversation = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return {"conversation": conversation, "sample_index": int(index), "answer": answer}

    def fingerprint(self) -> str:
        """A text that changes with the samples."""
        return f"digits {self.split} {self.num_samples} {self.seed} {self.config}"

    def _answer(self, digits: np.ndarray) -> str:
        config = self.config
        return config.row_separator.join(config.column_separator.join(str(d) for d in row) for row in digits)

    def _grid(self, index: int, rng: np.random.RandomState) -> tuple[int, int]:
        """Rows and columns of a sample; only a sample of the curriculum draws them."""
        full = (self.config.rows, self.config.columns)
        if index >= self.config.curriculum:
            return full
        share = (index + 1) / self.config.curriculum
        rows, columns = (rng.randint(1, math.ceil(share * size) + 1) for size in full)
        return int(rows), int(columns)

    def _draw(self, chosen: np.ndarray, rng: np.random.RandomState) -> Image.Image:
        config = self.config
        side = config.cell_size - 2 * config.margin
        shifts = config.margin + rng.randint(-config.jitter, config.jitter + 1, size=(*chosen.shape, 2))
        cells = _cells(side)
        rows, columns = chosen.shape
        canvas = np.full((rows * config.cell_size, columns * config.cell_size), 255, dtype=np.uint8)
        for row, column in np.ndindex(rows, columns):
            top = row * config.cell_size + shifts[row, column, 0]
            left = column * config.cell_size + shifts[row, column, 1]
            canvas[top : top + side, left : left + side] = cells[chosen[row, column]]
        return Image.fromarray(canvas).convert("RGB")


def make_digits(
    split: str = "train",
    num_samples: int = 2048,
    *,
    seed: int = 0,
    questions: Sequence[str] | None = None,
    **shape: Any,
) -> DigitsDataset:
    """Build the ``digits`` data set; what an AutoModel recipe names as ``dataset: {_target_: ...}``.

    Args:
        split: ``train``, ``validation`` or ``test``; no scan is in two of them.
        num_samples: Samples in an epoch.
        seed: Seed of the grids.
        questions: Wordings of the question; ``QUESTIONS`` if None.
        shape: Further fields of ``DigitsConfig``: ``rows``, ``columns``, ``cell_size``, ``margin``, ``jitter``,
            ``curriculum``, ``column_separator``, ``row_separator``.

    Returns:
        A sized, map-style data set.

    Raises:
        ValueError: If a value is out of range or a key is unknown.
    """
    allowed = {name for name in DigitsConfig.__dataclass_fields__ if name != "questions"}
    if unknown := sorted(set(shape) - allowed):
        raise ValueError(f"unknown key {unknown[0]!r} for the digits data set, allowed: {sorted(allowed)}")
    if questions is not None:
        shape["questions"] = (questions,) if isinstance(questions, str) else tuple(questions)
    return DigitsDataset(split, num_samples, seed=seed, config=DigitsConfig(**shape))


def read_digits(split: str = "test", *, limit: int | None = None, **fields: Any) -> DigitsDataset:
    """The reader ``digits``: ``make_digits`` for held-out samples, ``limit`` of them, 256 if nothing is said."""
    count = limit if limit is not None else fields.pop("num_samples", 256)
    return make_digits(split, count, **{key: value for key, value in fields.items() if key != "num_samples"})


def score(prediction: str, reference: str) -> dict[str, float]:
    """Compare a decoded answer with the reference.

    Args:
        prediction: Decoded text; anything but digits is ignored for ``digit_accuracy``.
        reference: The right answer.

    Returns:
        ``exact_match``: 1.0 if the texts are equal up to white space at the ends, else 0.0. ``digit_accuracy``: share of
        digits that are right at their place, counted over the longer of both, so that missing and surplus digits count
        as wrong.

    Raises:
        ValueError: If the reference holds no digit.
    """
    right, found = re.findall(r"[0-9]", reference), re.findall(r"[0-9]", prediction)
    if not right:
        raise ValueError(f"reference must hold a digit, got {reference!r}")
    hits = sum(a == b for a, b in zip(right, found, strict=False))
    return {
        "exact_match": float(prediction.strip() == reference.strip()),
        "digit_accuracy": hits / max(len(right), len(found)),
    }
