"""Validation in a recipe: fixed noise, a pass for each level, and losses that reach the checkpoint."""

from __future__ import annotations

import logging
import statistics
from typing import Any

import torch
from nemo_automodel.components.loggers.metric_logger import MetricsSample
from torch import Tensor
from torch.utils.data import DataLoader

from nemo_bard.method.corruption import corrupt_batch
from nemo_bard.method.objectives import UNIT_TOTALS, StepTotals, add_up, count
from nemo_bard.method.schedule import NoiseSettings, ValidationNoise
from nemo_bard.train import trackers
from nemo_bard.train.step import TrainingStep

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0
VALIDATION_STREAM = 1


class ValidatedTraining(TrainingStep):
    """The part of a recipe that validates."""

    validation_noise: ValidationNoise
    """Noise of its passes."""
    validation_losses: dict[str, float]
    """Losses of the last validation, for the next checkpoint."""

    def validate(self, loader: DataLoader) -> MetricsSample:
        """Validate; with ``validation_noise.levels`` once at each of them, and ``val_loss`` is their mean."""
        levels = self.validation_noise.levels
        if not levels:
            return self._validate(loader, self.validation_noise.settings)
        samples = [self._validate(loader, noise) for noise in levels]
        metrics = dict(samples[0].metrics)
        for key in metrics:
            if key.startswith("val_"):
                metrics[key] = statistics.fmean(sample.metrics[key] for sample in samples)
        metrics["num_label_tokens"] = sum(sample.metrics["num_label_tokens"] for sample in samples)
        for name, sample in zip(self.validation_noise.names(), samples, strict=True):
            metrics[name] = sample.metrics["val_loss"]
        return MetricsSample(step=samples[0].step, epoch=samples[0].epoch, metrics=metrics)

    def log_val_metrics(self, log_data: MetricsSample) -> None:
        """Log, and keep the losses for the next checkpoint.

        Trackers get the counts as ``val_num_samples`` and so on: upstream sends them by the names that those of training
        have, and in W&B what comes last at a step counts.
        """
        self.validation_losses = {key: value for key, value in log_data.metrics.items() if key.startswith("val_")}
        if not self.dist_env.is_main:
            return
        trackers.send(log_data.metrics, log_data.step, prefix="val_")
        self.metric_logger_valid.log(log_data)
        shown = {name: f"{value:.4f}" for name, value in self.validation_losses.items()}
        counts = f"{log_data.metrics['num_samples']} samples, {log_data.metrics['num_label_tokens']} tokens"
        logger.info("[val] step %d: %s; %s", log_data.step, ", ".join(map(" ".join, shown.items())), counts)

    def save_checkpoint(
        self,
        epoch: int,
        step: int,
        train_loss: float,
        val_loss: dict[str, float] | None = None,
        best_metric_key: str = "default",
    ) -> None:
        """Save as upstream does, which knows ``val_loss`` alone, with all losses of this step's validation."""
        if val_loss:
            val_loss = self.validation_losses
            best_metric_key = "val_loss" if best_metric_key == "default" else best_metric_key
        super().save_checkpoint(epoch, step, train_loss, val_loss, best_metric_key)

    @torch.no_grad()
    def _validate(self, loader: DataLoader, noise: NoiseSettings) -> MetricsSample:
        """Loss over the validation set, with noise that depends on the sample alone.

        It is drawn with a fixed seed and epoch and from ``validation_noise`` (by default the whole range of levels,
        whatever training uses), so that runs with the same block size compare.
        """
        for part in self.model_parts:
            part.eval()
        context = self._noise_context(VALIDATION_SEED, 0, VALIDATION_STREAM)
        losses: list[Tensor] = []
        seen: list[StepTotals] = []
        rejected: list[dict[str, Any]] = []
        self.part_sums.clear()
        for index, collated in enumerate(loader):
            batch = self._without_repeats(collated, loader, index)
            batch = corrupt_batch(batch, noise, context)
            rejected.append({"rejects": batch["rejects"]})
            seen.append(count([batch]))
            weighed = self.objective.weigh(batch, UNIT_TOTALS)
            self.microbatch(0, weighed, losses=losses, num_batches=1, is_train=False)
        totals = self._reduce(add_up(seen))
        self._settle_bad("validation", rejected, totals)
        total = self.sum_over_ranks(torch.stack(losses).double().sum(), context_parallel=True).item()
        found = self.objective.reduce(total, self._reduced_parts(), totals)
        metrics: dict[str, Any] = {f"val_{name}": value for name, value in found.items()}
        return MetricsSample(
            step=self.step_scheduler.step,
            epoch=self.step_scheduler.epoch,
            metrics={
                **metrics,
                "lr": self.optimizer[0].param_groups[0]["lr"],
                "num_label_tokens": totals.num_loss_tokens,
                "num_samples": totals.num_samples,
                "num_bad": totals.num_bad,
                "mem": torch.cuda.max_memory_allocated() / 1024**3 if torch.cuda.is_available() else 0.0,
            },
        )
