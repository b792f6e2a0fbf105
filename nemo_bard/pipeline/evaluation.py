"""Reading held-out samples with the export of a stage, shared out over the processes."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from nemo_bard.base.files import read_json, write_json
from nemo_bard.base.folders import read_model_type
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.job import Job, Stage
from nemo_bard.pipeline.schema import EvaluationSettings
from nemo_bard.pipeline.world import Preempted, World

logger = logging.getLogger(__name__)


class Share(Sequence[Any]):
    """Every ``count``-th sample of a data set, by its number; raises ``Preempted`` once a signal has come."""

    def __init__(self, dataset: Any, first: int, count: int, total: int, world: World) -> None:
        self._dataset, self._world = dataset, world
        self._indices = range(first, total, count)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        if self._world.stop.received:
            raise Preempted
        return self._dataset[self._indices[index]]


def sharing(total: int, processes: int, least: int) -> int:
    """How many of the processes answer: all, or as many as have at least ``least`` of ``total`` samples, but one."""
    return max(min(processes, total // least), 1)


def open_samples(job: Job, *, validate: bool = True) -> Any:
    """Open the samples that stages are scored on, or return None if there are none.

    Args:
        job: The chain.
        validate: Check them all.

    Raises:
        ValueError: If they cannot be read, or the scorer or a decoding setting is wrong.
    """
    settings = job.evaluation
    if settings.data is None:
        return None
    from nemo_bard.data.readers import open_dataset
    from nemo_bard.evaluation.evaluate import resolve_scorer

    dataset = open_dataset(settings.data, limit=settings.limit, validate=validate)
    resolve_scorer(settings.scorer, dataset)
    decoding(None, settings)
    for stage in job.stages:
        decoding(None, settings, stage)
    return dataset


def decoding(folder: Path | None, settings: EvaluationSettings, stage: Stage | None = None) -> Any:
    """Decoding settings: a folder's own, with those of the pipeline, then those of the stage, on top.

    Raises:
        ValueError: For a wrong one; names the stage if it is the stage's own.
    """
    from nemo_bard.generation.settings import BardGenerationConfig

    base: Any = BardGenerationConfig()
    if folder is not None and read_model_type(folder) == "bard_vl":
        base = BardGenerationConfig.from_pretrained(folder)
    config = base.updated(**(settings.generation or {}))
    if stage is None or not stage.settings.generation:
        return config
    try:
        return config.updated(**stage.settings.generation)
    except ValueError as error:
        raise ValueError(f"stage.{stage.name}.generation: {error}") from error


def request(stage: Stage, job: Job, content: str) -> str:
    """Digest of what a score depends on, the export's content among it."""
    left_out = ("pictures", "samples_per_process")
    settings = {key: value for key, value in asdict(job.evaluation).items() if key not in left_out}
    own = {"generation": stage.settings.generation} if stage.settings.generation else {}
    return manifest.digest({"settings": settings, "content": content, **own})


def evaluate_stage(stage: Stage, job: Job, world: World, export: Path, content: str, *, last: bool) -> dict[str, Any]:
    """Score the export of a stage, or return the score that is there already.

    Args:
        stage: A finished stage.
        job: Its chain; ``job.evaluation.data`` is not None.
        world: The processes; all of them call this.
        export: Folder to load.
        content: Digest of its content.
        last: Whether answers are to be drawn (``answers.png`` in the run directory).

    Returns:
        What ``eval.json`` holds: aggregates as in ``EvalResult``, and the samples.

    Raises:
        Preempted: On every rank, if a signal came on any.
    """
    wanted = request(stage, job, content)
    old = world.on_main(lambda: read_json(stage.folder / manifest.EVAL))
    if old is not None and old["request"] == wanted:
        return old
    results = world.gather(_evaluate_share(stage, job, world, export, last and world.is_main))
    if world.should_stop():
        raise Preempted
    scored = {"request": wanted, "stage": stage.name, **merge([part for part in results if part is not None])}
    if world.is_main:
        write_json(stage.folder / manifest.EVAL, scored)
    world.barrier()
    return scored


def _evaluate_share(stage: Stage, job: Job, world: World, export: Path, draw: bool) -> dict[str, Any] | None:
    """Load the export here and score this rank's samples; None if it has none (see ``sharing``), or after a signal."""
    from nemo_bard.evaluation.evaluate import evaluate, resolve_scorer
    from nemo_bard.evaluation.responder import load_checkpoint

    settings, dataset = job.evaluation, open_samples(job, validate=False)  # checked when the run began
    total = len(dataset) if settings.limit is None else min(settings.limit, len(dataset))
    answering = sharing(total, world.size, settings.samples_per_process)
    if world.rank >= answering:
        return None
    share = Share(dataset, world.rank, answering, total, world)
    model, processor = load_checkpoint(export, device=_device())
    config = decoding(export, settings, stage)
    if read_model_type(export) == "qwen3_vl" and model.generation_config.eos_token_id is None:
        model.generation_config.eos_token_id = processor.tokenizer.convert_tokens_to_ids("<|im_end|>")
    try:
        result = evaluate(
            model,
            processor,
            share,
            generation_config=config,
            batch_size=settings.batch_size,
            scorer=resolve_scorer(settings.scorer, dataset),
            warm_up=settings.warm_up,
            progress=world.is_main,
        )
        if draw:
            draw_pictures(job, model, processor, dataset, config)
        return asdict(result)
    except Preempted:
        return None
    finally:
        del model
        gc.collect()


def _device() -> str | None:
    import torch

    return f"cuda:{torch.cuda.current_device()}" if torch.cuda.is_available() else None


def merge(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Put the results of several ranks together: means over samples, sums over ranks, speed per process.

    Args:
        parts: ``EvalResult`` as dictionaries.

    Returns:
        The same keys; ``seconds`` is the sum over ranks.
    """
    if not parts:
        return {}
    samples = sorted((sample for part in parts for sample in part["samples"]), key=lambda s: s["sample_index"])
    tokens = sum(part["num_tokens"] for part in parts)
    denoising = sum(part["denoising_forwards"] for part in parts)
    commits = sum(sample["commit_forwards"] for sample in samples)
    seconds = sum(part["seconds"] for part in parts)
    return {
        **parts[0],
        "samples": samples,
        "scores": {
            name: sum(sample["scores"][name] for sample in samples) / len(samples) for name in parts[0]["scores"]
        },
        "num_samples": len(samples),
        "num_tokens": tokens,
        "forwards": sum(part["forwards"] for part in parts),
        "denoising_forwards": denoising,
        "tpf": tokens / denoising,
        "tpf_with_commits": tokens / (denoising + commits),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def draw_pictures(job: Job, model: Any, processor: Any, dataset: Any, config: Any) -> None:
    """Draw the first answers to samples with an image, coloured by denoising step, as ``answers.png``."""
    count = job.evaluation.pictures
    shown = [dataset[i] for i in range(min(4 * count, len(dataset)))] if count else []
    shown = [sample for sample in shown if has_image(sample)][:count]
    if not shown or model.config.model_type != "bard_vl":
        return
    try:
        from nemo_bard.report.picture import draw_answers

        draw_answers(model, processor, shown, generation_config=config, path=job.run_dir / "answers.png")
    except ImportError as error:
        logger.warning("no picture of answers: %s; pip install nemo-bard[demo]", error)


def has_image(sample: dict[str, Any]) -> bool:
    """Whether a prompt of a sample has an image."""
    turns = [turn["content"] for turn in sample["conversation"] if isinstance(turn["content"], list)]
    return any(part["type"] == "image" for content in turns for part in content)
