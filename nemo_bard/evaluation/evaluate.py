"""Generation on held-out samples: scores, tokens per forward, tokens per second."""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from nemo_bard.data.conversation import split_last_response
from nemo_bard.data.readers import own_scorer
from nemo_bard.evaluation.responder import make_responder
from nemo_bard.generation.settings import BardGenerationConfig

logger = logging.getLogger(__name__)

Scorer = Callable[[str, str], "float | Mapping[str, float]"]
"""``(prediction, reference) -> number`` or several numbers by name; higher is better."""


@dataclass(frozen=True, kw_only=True)
class SampleResult:
    """One evaluated sample."""

    sample_index: int
    prompt: str
    """The turns before the reference, as text; media as ``<image>`` and ``<video>``."""
    answer: str
    reference: str
    scores: dict[str, float]
    num_tokens: int
    """Response tokens, the end token included."""
    denoising_forwards: int
    commit_forwards: int
    tpf: float
    """Response tokens / denoising forwards of this sample."""


@dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What ``evaluate`` measured; every sample counts once in ``scores``."""

    samples: list[SampleResult]
    metric: str
    """Name of the first score: the one that a choice between settings is made by."""
    scores: dict[str, float]
    """Mean over the samples."""
    num_samples: int
    num_tokens: int
    """Response tokens of all samples."""
    forwards: int
    """Forwards of the language model, the prompts' included; a forward serves a whole batch."""
    denoising_forwards: int
    """Summed over samples: a batched forward counts once for every row that it denoises."""
    tpf: float
    """Response tokens / denoising forwards, both summed over samples; 1 for an autoregressive model."""
    tpf_with_commits: float
    """As ``tpf``, with the forwards that only commit a block counted."""
    seconds: float
    """Wall-clock seconds of generation: vision, prompts and decoding, without data loading and preprocessing."""
    tokens_per_second: float
    """``num_tokens / seconds``."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Batch size, model type and decoding settings."""

    @property
    def score(self) -> float:
        """The mean of ``metric``."""
        return self.scores[self.metric]

    def summary(self) -> dict[str, Any]:
        """Everything but the samples."""
        return {name: value for name, value in asdict(self).items() if name != "samples"}

    def save(self, path: str | Path) -> None:
        """Write everything as JSON."""
        text = json.dumps(
            {**self.summary(), "samples": [asdict(s) for s in self.samples]}, indent=2, ensure_ascii=False
        )
        Path(path).write_text(text + "\n", encoding="utf-8")


def exact_match(prediction: str, reference: str) -> dict[str, float]:
    """1 if the texts are equal up to white space at the ends, else 0."""
    return {"exact_match": float(prediction.strip() == reference.strip())}


def accuracy(prediction: str, reference: str) -> dict[str, float]:
    """Share of characters that are right: 1 - edit distance / length of the longer text, white space at the ends aside."""
    a, b = prediction.strip(), reference.strip()
    longer = max(len(a), len(b))
    return {"accuracy": 1.0 - edit_distance(a, b) / longer if longer else 1.0}


def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance of two texts."""
    codes = np.frombuffer(b.encode("utf-32-le"), dtype=np.uint32)
    offsets = np.arange(len(codes) + 1)
    row = offsets.copy()
    for index, char in enumerate(a):
        step = np.minimum(row[1:] + 1, row[:-1] + (codes != ord(char)))
        row = np.concatenate([[index + 1], step])
        row = np.minimum.accumulate(row - offsets) + offsets  # insertions: the least over everything to the left
    return int(row[-1])


SCORERS: dict[str, Scorer] = {"exact_match": exact_match, "accuracy": accuracy}


def resolve_scorer(scorer: str | Scorer | None, dataset: Any = None) -> Callable[[str, str], dict[str, float]]:
    """Find a scorer.

    Args:
        scorer: A function; a name of ``SCORERS``; a dotted path ``package.module.function``; several of these joined by
            commas; or None for the data set's own: its attribute ``score``, or the function ``score`` of the module that
            defines its class, or, where it has neither, exact match and accuracy.
        dataset: The data set.

    Returns:
        A scorer that returns finite numbers by name.

    Raises:
        ValueError: For a name that is not known or a path that leads to no function.
    """
    if scorer is None:
        own = own_scorer(dataset)
        functions = [own] if own is not None else [exact_match, accuracy]
    elif callable(scorer):
        functions = [scorer]
    else:
        functions = [_find_scorer(name.strip()) for name in scorer.split(",")]

    def combined(prediction: str, reference: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for function in functions:
            value = function(prediction, reference)
            named = value if isinstance(value, Mapping) else {getattr(function, "__name__", "score"): value}
            for name, number in named.items():
                if not isinstance(number, (bool, int, float, np.number)) or not math.isfinite(number):
                    raise ValueError(f"scorer {_name(function)} must return finite numbers, got {name}={number!r}")
                found[str(name)] = float(number)
        if not found:
            raise ValueError(f"scorer {_name(functions[0])} returned no score")
        return found

    return combined


def _name(function: Any) -> str:
    return f"{getattr(function, '__module__', '?')}.{getattr(function, '__qualname__', type(function).__name__)}"


def _find_scorer(name: str) -> Scorer:
    if name in SCORERS:
        return SCORERS[name]
    module_name, _, attribute = name.rpartition(".")
    allowed = f"{', '.join(SCORERS)} or a dotted path package.module.function"
    if not module_name:
        raise ValueError(f"scorer must be {allowed}, got {name!r}")
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"scorer {name!r} cannot be imported ({error}); allowed: {allowed}") from error
    if not callable(function):
        raise ValueError(f"scorer {name!r} is not a function")
    return cast("Scorer", function)


def evaluate(
    model: Any,
    processor: Any,
    dataset: Sequence[dict[str, Any]],
    *,
    generation_config: BardGenerationConfig | None = None,
    batch_size: int = 8,
    limit: int | None = None,
    scorer: str | Scorer | None = None,
    progress: bool = True,
    warm_up: bool = False,
) -> EvalResult:
    """Generate an answer to every sample and score it.

    The last assistant turn of a conversation is the reference, everything before it the prompt.

    Args:
        model: A BARD model, or transformers' ``Qwen3VLForConditionalGeneration``, which decodes greedily token by token.
        processor: Its processor.
        dataset: Map-style; items are ``{"conversation": [...], "sample_index": int}``.
        generation_config: Decoding settings, the model's own if None; of an autoregressive model only ``max_new_tokens``
            is used, and then it has to be given.
        batch_size: Prompts decoded together.
        limit: Use the first ``limit`` samples only.
        scorer: See ``resolve_scorer``.
        progress: Show a progress bar where stderr is a terminal.
        warm_up: Decode the first batch once before, untimed, so that compilation and first allocations are not measured.

    Returns:
        Scores and speed.

    Raises:
        ValueError: For a wrong argument, an empty data set or a sample without an assistant turn.
    """
    for name, value in (("batch_size", batch_size), ("limit", limit)):
        if (value is not None or name == "batch_size") and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise ValueError(f"{name} must be an integer >= 1, got {value!r}")
    total = len(dataset) if limit is None else min(limit, len(dataset))
    if total == 0:
        raise ValueError("the data set is empty")
    score = resolve_scorer(scorer, dataset)
    responder = make_responder(model, processor, generation_config)
    samples: list[SampleResult] = []
    forwards, seconds = 0, 0.0
    with tqdm(total=total, desc="evaluating", unit="sample", disable=None if progress else True) as bar:
        for start in range(0, total, batch_size):
            items = [dataset[i] for i in range(start, min(start + batch_size, total))]
            pairs = [split_last_response(item["conversation"]) for item in items]
            prompts = [prompt for prompt, _ in pairs]
            if warm_up and start == 0:
                responder.answer(prompts)
            batch = responder.answer(prompts)
            forwards, seconds = forwards + batch.forwards, seconds + batch.seconds
            for item, (prompt, reference), answer in zip(items, pairs, batch.answers, strict=True):
                samples.append(
                    SampleResult(
                        sample_index=int(item["sample_index"]),
                        prompt=describe(prompt),
                        answer=answer.text,
                        reference=reference,
                        scores=score(answer.text, reference),
                        num_tokens=answer.num_tokens,
                        denoising_forwards=answer.denoising_forwards,
                        commit_forwards=answer.commit_forwards,
                        tpf=answer.tpf,
                    )
                )
            _check_names(samples)
            bar.update(len(items))
            metric = next(iter(samples[0].scores))
            mean = sum(sample.scores[metric] for sample in samples) / len(samples)
            bar.set_postfix({metric: f"{mean:.3f}"}, refresh=False)
    return _aggregate(samples, forwards, seconds, {"batch_size": batch_size, **_settings(model, responder)})


def _check_names(samples: list[SampleResult]) -> None:
    names = list(samples[0].scores)
    for sample in samples:
        if list(sample.scores) != names:
            raise ValueError(
                f"the scorer must return the same names for every sample: {names} and, for sample"
                f" {sample.sample_index}, {list(sample.scores)}"
            )


def _settings(model: Any, responder: Any) -> dict[str, Any]:
    """What decoded: enough to repeat the run."""
    config = getattr(responder, "config", None)
    if config is None:
        own = {"max_new_tokens": responder.max_new_tokens}
    else:
        skipped = ("return_dict_in_generate", "return_step_stats", "output_history", "generation_config_class")
        own = {name: value for name, value in config.to_dict().items() if name not in skipped and value is not None}
        own["block_size"] = config.block_size if config.block_size is not None else model.config.block_size
        own["denoising_steps"] = min(config.denoising_steps or own["block_size"], own["block_size"])
    parameter = next(model.parameters())
    return {
        "model_type": model.config.model_type,
        "device": str(parameter.device),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "generation": own,
    }


def _aggregate(samples: list[SampleResult], forwards: int, seconds: float, settings: dict[str, Any]) -> EvalResult:
    names = list(samples[0].scores)
    tokens = sum(sample.num_tokens for sample in samples)
    denoising = sum(sample.denoising_forwards for sample in samples)
    commits = sum(sample.commit_forwards for sample in samples)
    return EvalResult(
        samples=samples,
        metric=names[0],
        scores={name: sum(sample.scores[name] for sample in samples) / len(samples) for name in names},
        num_samples=len(samples),
        num_tokens=tokens,
        forwards=forwards,
        denoising_forwards=denoising,
        tpf=tokens / denoising,
        tpf_with_commits=tokens / (denoising + commits),
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        settings=settings,
    )


def describe(conversation: Sequence[dict[str, Any]]) -> str:
    """Write turns as text, media as ``<image>`` and ``<video>``; a role is named unless there is only a user turn."""
    lines = []
    for message in conversation:
        content = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts)
        lines.append(text if len(conversation) == 1 else f"{message['role']}: {text}")
    return "\n".join(lines)
