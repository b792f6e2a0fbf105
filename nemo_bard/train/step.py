"""One optimizer step of block-diffusion training: noise, weights, forward and backward, and what is logged of it.

What differs from AutoModel's VLM recipe: noise is drawn per optimizer step, and the loss runs at supervised positions and
is normalised by totals of the whole step.
"""

from __future__ import annotations

import logging
from collections.abc import Sized
from contextlib import nullcontext
from typing import Any, cast

import torch
from nemo_automodel.components.distributed.utils import get_sync_ctx
from nemo_automodel.components.loggers.metric_logger import MetricsSample
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler

from nemo_bard.method.corruption import NoiseContext, corrupt_batch, without_samples
from nemo_bard.method.objectives import UNIT_TOTALS, Objective, StepTotals, count
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.train.bad_samples import BadSamples
from nemo_bard.train.flops import batch_flops, utilisation
from nemo_bard.train.forward import ON_HOST, batch_loss
from nemo_bard.train.phases import NoiseOfRun
from nemo_bard.upstream.recipe import VLMRecipe

logger = logging.getLogger(__name__)


class TrainingStep(VLMRecipe):
    """The part of a recipe that trains a step; a subclass sets the attributes up."""

    objective: Objective
    """What is minimised."""
    step_flops: float
    """Of the step's microbatches on this rank so far."""
    part_sums: list[Tensor]
    """Parts of the losses of the step's microbatches so far, each ``[P]``."""
    noise_of_run: NoiseOfRun
    """The noise of every step."""
    num_random_ids: int
    """How many ids random replacements are drawn from."""
    num_dropped: int
    """Samples dropped in this run so far because they are too long."""
    bad_samples: BadSamples
    """What becomes of samples that cannot be used."""
    seed: int
    """Of weights and noise."""
    compute_dtype: torch.dtype
    """What matrix products are computed in."""
    loss_chunk_tokens: int | None
    """Tokens whose logits exist at once; None means what suits the device."""

    @property
    def _model_config(self) -> BardVLConfig:
        return cast("BardVLConfig", self.model_parts[0].config)

    def train_step(self, batches: list[dict[str, Any]], max_grad_norm: float | None = None) -> MetricsSample:
        """Draw the noise of all microbatches, normalise over the whole step, and let upstream do the rest."""
        scheduler = self.step_scheduler
        assert scheduler.epoch_len is not None
        position = scheduler.step % scheduler.epoch_len * scheduler.grad_acc_steps
        context = self._noise_context(self.seed, scheduler.epoch)
        noise = self.noise_of_run.at(scheduler.step, self._total_steps())
        batches = [
            corrupt_batch(self._without_repeats(batch, self.dataloader, position + i), noise, context)
            for i, batch in enumerate(batches)
        ]
        totals = self._reduce(count(batches))
        self._settle_bad("train", batches, totals)
        self._report_dropped(totals)
        started = self.timestamp
        self.part_sums.clear()
        self.step_flops = 0.0
        weighed = [self.objective.weigh(batch, totals) for batch in batches]
        log_data = super().train_step(weighed, max_grad_norm)
        seconds = max(self.timestamp - started, 1e-9)
        tps = totals.num_tokens / seconds
        flops = self.sum_over_ranks(torch.tensor(self.step_flops, dtype=torch.float64)).item()
        log_data.metrics.update(
            num_samples=totals.num_samples,
            num_loss_tokens=totals.num_loss_tokens,
            num_dropped=totals.num_dropped,
            num_bad=totals.num_bad,
            num_tokens_per_step=totals.num_tokens,
            fill=totals.num_tokens / max(totals.num_positions, 1),
            tps=tps,
            tps_per_gpu=tps / max(self.num_data_ranks(), 1),
            **utilisation(flops / self.dist_env.world_size, seconds, self.dist_env.device, self.compute_dtype),
            **self.noise_of_run.facts(noise),
            **({"num_ar_tokens": totals.num_ar_tokens} if totals.num_ar_tokens else {}),
        )
        parts = self.objective.reduce(log_data.metrics["loss"], self._reduced_parts(), UNIT_TOTALS)
        log_data.metrics.update({name: value for name, value in parts.items() if name != "loss"})
        return log_data

    def _total_steps(self) -> int:
        """Steps of the run, which ends with ``max_steps`` or with its epochs, whatever comes first."""
        scheduler = self.step_scheduler
        if scheduler.epoch_len is None:
            return scheduler.max_steps
        return min(scheduler.max_steps, scheduler.num_epochs * scheduler.epoch_len)

    def _batch_flops(self, batch: dict[str, Any]) -> float:
        """FLOPs of training on a microbatch, which is on the CPU; adapters need no gradient of the weights."""
        return (3 if self.peft_config is None else 2) * batch_flops(self._model_config, [batch]).forward

    def _noise_context(self, seed: int, epoch: int, stream: int = 0) -> NoiseContext:
        config = self._model_config
        assert config.block_size is not None
        assert config.mask_token_id is not None
        return NoiseContext(
            block_size=config.block_size,
            mask_token_id=config.mask_token_id,
            num_random_ids=self.num_random_ids,
            seed=seed,
            epoch=epoch,
            stream=stream,
        )

    @staticmethod
    def _without_repeats(batch: dict[str, Any], loader: DataLoader, position: int) -> dict[str, Any]:
        """Take out the samples that the sampler repeats to give all ranks equally many.

        Args:
            batch: A collated microbatch.
            loader: Where it comes from; its sampler deals the data set out in turns to the ranks.
            position: Which microbatch of the epoch it is on this rank.
        """
        sampler, size = loader.sampler, len(cast("Sized", loader.dataset))
        assert isinstance(sampler, DistributedSampler)
        assert loader.batch_size is not None
        first = position * loader.batch_size
        slots = {*batch["slots"], *(bad.slot for bad in batch["rejects"])}
        repeated = {slot for slot in slots if (first + slot) * sampler.num_replicas + sampler.rank >= size}
        return without_samples(batch, repeated)

    def _reduce(self, totals: StepTotals) -> StepTotals:
        return StepTotals(*self.sum_over_ranks(torch.tensor(totals, dtype=torch.long)).tolist())

    def _settle_bad(self, split: str, batches: list[dict[str, Any]], totals: StepTotals) -> None:
        """Drop the bad samples of a step, or end the run."""
        if totals.num_bad:
            scheduler = self.step_scheduler
            self.bad_samples.settle(split, batches, step=scheduler.step, epoch=scheduler.epoch)

    def _report_dropped(self, totals: StepTotals) -> None:
        self.num_dropped += totals.num_dropped
        if totals.num_dropped and self.dist_env.is_main:
            logger.warning(
                "step %d: %d too long samples dropped, %d so far in this run; %d samples count",
                self.step_scheduler.step,
                totals.num_dropped,
                self.num_dropped,
                totals.num_samples,
            )

    def microbatch(
        self, index: int, batch: dict[str, Any], *, losses: list[Tensor], num_batches: int, is_train: bool = True
    ) -> None:
        """Run one weighed microbatch."""
        moved = self.on_device(batch, stay=ON_HOST)
        model = self.model_parts[0]
        sync = nullcontext()
        if is_train:
            defer = getattr(self.distributed_config, "defer_fsdp_grad_sync", True)
            sync = get_sync_ctx(model, index == num_batches - 1, defer_fsdp_grad_sync=defer)
        with sync:
            with self.autocast():
                loss, kept = batch_loss(
                    model, self._model_config, self.objective, moved, chunk_tokens=self.loss_chunk_tokens
                )
            self.part_sums.append(kept.parts())
            losses.append(loss.detach().clone())
            if is_train:
                (loss * self.num_data_ranks(context_parallel=True)).backward()
        if is_train:
            self.step_flops += self._batch_flops(batch)  # while the device works

    def _reduced_parts(self) -> list[float]:
        """Parts of the loss, summed over microbatches and ranks."""
        if not self.objective.part_names():
            return []
        return self.sum_over_ranks(torch.stack(self.part_sums).sum(0), context_parallel=True).tolist()
