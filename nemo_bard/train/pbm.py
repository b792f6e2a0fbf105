"""The PBM recipe: supervised block-diffusion fine-tuning at one block size (BARD, arXiv 2604.16514).

A stage of progressive block merging is this recipe with its own ``model.block_size``, started from the stage before.
What differs from AutoModel's VLM recipe: the collator gets the model's configuration, noise is drawn per optimizer
step, and the loss runs at supervised positions and is normalised by totals of the whole step.
"""

from __future__ import annotations

import logging
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from nemo_automodel.components.distributed.config import DistributedSetup
from nemo_automodel.components.distributed.utils import FirstRankPerNode, get_sync_ctx
from nemo_automodel.components.loggers.metric_logger import MetricsSample
from nemo_automodel.recipes.vlm.finetune import FinetuneRecipeForVLM, _move_to_device
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from tqdm.contrib.logging import logging_redirect_tqdm

from nemo_bard.checkpoints.merge import CONFIG_OVERRIDES, merge
from nemo_bard.cost.estimate import peak_flops
from nemo_bard.data.collate import DEFAULT_MAX_LENGTH
from nemo_bard.data.lengths import last_line_of_worker_error
from nemo_bard.data.packing import PackedDataset, pack_dataset
from nemo_bard.data.rejects import check_on_bad_sample
from nemo_bard.generation.settings import check_mask_token_id
from nemo_bard.method.chunked import ChunkLoss, chunked_loss
from nemo_bard.method.layout import PADDING
from nemo_bard.method.losses import BlockDiffusionLoss, token_scale
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.model.modeling import BardVLForConditionalGeneration
from nemo_bard.train import cpu_compat
from nemo_bard.train.bad_samples import BadSamples, without_checks
from nemo_bard.train.config import (
    NoiseSchedule,
    NoiseSettings,
    check_ar_loss,
    check_batch_sizes,
    level_name,
    split_levels,
    validate_recipe,
)
from nemo_bard.train.corruption import NoiseContext, corrupt_batch, without_samples
from nemo_bard.train.flops import batch_flops
from nemo_bard.train.joint import JointLoss, next_tokens, weigh_next_tokens
from nemo_bard.train.masks import FLEX_TILE, make_mask, uses_flex
from nemo_bard.train.packed_loader import PackedDataloaderConfig

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_MINUTES = 30
VALIDATION_SEED = 0
VALIDATION_STREAM = 1


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


def count(batches: Iterable[Mapping[str, Any]]) -> StepTotals:
    """Count what corrupted microbatches hold on this rank."""
    rows = [
        (
            b["num_samples"],
            int(b["loss_mask"].sum()),
            int((b["sample_ids"] != PADDING).sum()),
            b["num_dropped"],
            int((b["ar_response_ids"] >= 0).sum()) if "ar_response_ids" in b else 0,
            b["sample_ids"].numel(),
            len(b["rejects"]),
        )
        for b in batches
    ]
    return StepTotals(*(sum(column) for column in zip(*rows, strict=True)))


def weigh(batch: dict[str, Any], reduction: str, totals: StepTotals) -> dict[str, Any]:
    """Add what the step needs at the ``K`` supervised tokens of a corrupted microbatch.

    Args:
        batch: A microbatch from ``corrupt_batch``; not modified.
        reduction: ``mean`` or ``sum``, see ``losses.token_scale``.
        totals: Totals of the whole optimizer step, over all ranks.

    Returns:
        The batch with ``output_positions`` ``[K]`` int64 (flat indices into ``[N * L]``) and ``output_weight`` ``[K]``.
    """
    scale = token_scale(
        reduction,
        batch["response_ids"],
        num_samples=totals.num_samples,
        num_loss_tokens=totals.num_loss_tokens,
    )
    positions = batch["loss_mask"].flatten().nonzero().flatten()
    weight = (scale * batch["loss_weight"]).flatten()[positions]
    return {**batch, "output_positions": positions, "output_weight": weight}


class PBMRecipe(FinetuneRecipeForVLM):
    """AutoModel's VLM recipe for block diffusion; see ``recipes/pbm.yaml`` for its settings."""

    loss_class: ClassVar[type[nn.Module]] = BlockDiffusionLoss
    """What ``loss_fn`` has to be."""
    ar_loss_weight: float = 0.0
    """Weight of the joint autoregressive loss, see ``train.joint``."""

    @classmethod
    def validate_config(cls, raw: Mapping[str, Any]) -> None:
        """Check a recipe before anything is built.

        Args:
            raw: The recipe as plain dictionaries.

        Raises:
            ValueError: One line that names the key, its value and what is allowed.
        """
        validate_recipe(raw)

    def setup(self) -> None:
        """Build everything, and give the collators the model's configuration.

        Raises:
            ValueError: If the recipe or the checkpoint is not as it must be.
        """
        self.validate_config(self.cfg.to_yaml_dict(use_orig_values=True))
        cpu_compat.apply()
        noise = _section(self.cfg, "noise") or {}
        self.noise_schedule = NoiseSchedule.from_dict(noise)
        self.noise_phase: int | None = None
        self.noise = NoiseSettings.from_dict({key: value for key, value in noise.items() if key != "schedule"})
        self.ar_loss_weight = float(self.cfg.get("ar_loss_weight", 0.0))
        self.joint_parts: list[Tensor] = []
        self.validation_levels, validation = split_levels(_section(self.cfg, "validation_noise"))
        self.validation_losses: dict[str, float] = {}
        self.validation_noise = NoiseSettings.from_dict(
            {"name": self.noise.name, "num_random_ids": self.noise.num_random_ids} if validation is None else validation
        )
        self.seed = int(self.cfg.get("seed", 42))
        self.loss_chunk_tokens = self.cfg.get("loss_chunk_tokens", None)
        self._fill_defaults()
        self.on_bad_sample = check_on_bad_sample(_section(self.cfg, "on_bad_sample"))
        if self.on_bad_sample.drops:
            without_checks(self.cfg)
        self.packing = _section(self.cfg, "packing") or {}
        if self.packing.get("max_length") is not None:
            loader = PackedDataloaderConfig.from_config(self.cfg.vlm_dataloader, self._pack)
            self.cfg.__dict__["vlm_dataloader"] = loader  # what upstream's setup builds the training loader from
        upstream, told = logging.getLogger(FirstRankPerNode.__module__), _UserErrors()
        upstream.addFilter(told)
        try:
            super().setup()
        except SystemExit as stop:
            # Upstream ends the process, with a traceback, when a data set cannot be built (FirstRankPerNode).
            if isinstance(stop.__cause__, ValueError):
                raise stop.__cause__ from None
            raise
        finally:
            upstream.removeFilter(told)
        self._check_built()
        self.dataloader.collate_fn = self._complete(self.dataloader.collate_fn, self.noise, packed=True)
        if self.val_dataloader is not None:
            self.val_dataloader.collate_fn = self._complete(self.val_dataloader.collate_fn, self.validation_noise)
        self.bad_samples = BadSamples(
            self.on_bad_sample, Path(self.checkpointer.config.checkpoint_dir), is_main=self.dist_env.is_main
        )
        for split, loader in (("train", self.dataloader), ("validation", self.val_dataloader)):
            if loader is not None:
                self.bad_samples.guard(split, loader)
        self._num_random_ids = self._random_ids()
        self.num_dropped = 0
        if self.peft_config is not None:
            self._export_merged()

    def _complete(
        self, collate: partial, noise: NoiseSettings, *, packed: bool = False
    ) -> Callable[[list[Any]], dict[str, Any]]:
        """Give a collator what only the recipe knows; ``packed`` says that the section ``packing`` is for it."""
        settings = self._collator_settings(noise)
        if uses_flex(self._model_config, self.dist_env.device):
            settings["pad_to_multiple_of"] = math.lcm(collate.keywords.get("pad_to_multiple_of", 1), FLEX_TILE)
        if packed and self.packing.get("max_length") is not None:
            longest = collate.keywords.get("max_length", DEFAULT_MAX_LENGTH)
            settings["max_length"] = min(longest, self.packing["max_length"])
            settings["max_row_length"] = self.packing["max_length"]
        collator = collate(config=self._model_config, **settings)
        collator.keep_bad = True
        return collator

    def _pack(self, dataset: Any, processor: Any) -> PackedDataset:
        """Plan the rows of the training set; called by upstream's setup, when the model is there."""
        _check_processor(processor)
        loader = self.cfg.vlm_dataloader
        return pack_dataset(
            dataset,
            self._complete(loader.collator.build(processor=processor), self.noise, packed=True),
            cache_dir=Path(self.packing.get("cache_dir") or self.cfg.get("checkpoint.checkpoint_dir", "checkpoints")),
            seed=self.seed,
            shuffle=loader.shuffle,
            num_workers=loader.num_workers,
            drop_bad=self.on_bad_sample.drops,
        )

    def _collator_settings(self, noise: NoiseSettings) -> dict[str, Any]:
        """What a collator gets from the recipe besides the model's configuration; ``noise`` is that of its batches."""
        return {"noisy_copies": 2 if noise.complementary else 1, "next_token": self.ar_loss_weight > 0}

    def _fill_defaults(self) -> None:
        """Write values that depend on the machine, or that must not be upstream's default, into the configuration."""
        has_cuda = torch.cuda.is_available()
        if (self.cfg.get("dist_env.backend", None) or "auto") == "auto":
            self.cfg.set_by_dotted("dist_env.backend", "nccl" if has_cuda else "gloo")
        if self.cfg.get("dist_env.timeout_minutes", None) is None:
            self.cfg.set_by_dotted("dist_env.timeout_minutes", DEFAULT_TIMEOUT_MINUTES)
        if (self.cfg.get("model.attn_implementation", None) or "auto") == "auto":
            self.cfg.set_by_dotted("model.attn_implementation", "bard")
        compute = self.cfg.get("compute_dtype", "auto")
        if compute == "auto":
            compute = "bfloat16" if has_cuda and torch.cuda.is_bf16_supported() else "float32"
        self.compute_dtype = getattr(torch, compute)

    def _create_distributed_setup(self) -> DistributedSetup:
        """Check the batch sizes and set the compute dtype: FSDP's policy if there are shards, autocast on one rank."""
        cpu_compat.normalise_device(self.dist_env)
        check_batch_sizes(
            self.cfg.get("step_scheduler.global_batch_size"),
            self.cfg.get("step_scheduler.local_batch_size"),
            self.dist_env.world_size,
        )
        setup = super()._create_distributed_setup()
        if self.cfg.get("distributed.mp_policy", None) is None:
            setup.strategy_config.mp_policy = MixedPrecisionPolicy(
                param_dtype=self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if self.dist_env.world_size == 1 and self.compute_dtype != torch.float32:
            setup.strategy_config.autocast_dtype = self.compute_dtype
        return setup

    def _check_built(self) -> None:
        model = self.model_parts[0]
        if not isinstance(model, BardVLForConditionalGeneration):
            raise ValueError(f"the checkpoint gave a {type(model).__name__}, not a BardVLForConditionalGeneration")
        if not isinstance(self.loss_fn, self.loss_class):
            raise ValueError(
                f"loss_fn of this recipe must be a nemo_bard.method.{self.loss_class.__name__}, got"
                f" {type(self.loss_fn).__name__}"
            )
        if hasattr(model.lm_head, "lora_A"):
            raise ValueError("peft puts an adapter on lm_head, which this recipe does not support; exclude lm_head")
        _check_processor(self.processor)
        check_ar_loss(self.ar_loss_weight, self._model_config.context_attention)
        # The exported generation_config.json must not keep the block size of the stage before.
        model.generation_config.block_size = None
        samples, batch = len(self.dataloader.dataset), self.cfg.get("step_scheduler.global_batch_size")
        if samples < batch and self.dist_env.is_main:
            logger.warning(
                "the data set has %d %s, fewer than step_scheduler.global_batch_size=%d: every step takes all of"
                " them; set a smaller global_batch_size for more steps per epoch",
                samples,
                "packed rows" if isinstance(self.dataloader.dataset, PackedDataset) else "samples",
                batch,
            )

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Load as upstream does; a checkpoint of the last step of an epoch goes on with the next epoch.

        Upstream (0.7.0) stores the epoch that has ended, and where its last step had fewer microbatches than the others,
        the epoch would be run again.
        """
        super().load_checkpoint(restore_from)
        scheduler = self.step_scheduler
        if scheduler.epoch_len is not None and scheduler.step // scheduler.epoch_len > scheduler.epoch:
            scheduler.epoch = scheduler.step // scheduler.epoch_len
            self.dataloader.next_iter_state = None  # of the epoch that has ended

    def _export_merged(self) -> None:
        """Write LoRA checkpoints merged into their base, where and when other runs write their Hugging Face folder."""
        lifecycle, publish = self.checkpointer.lifecycle, self.checkpointer.lifecycle.publish
        mode, config = str(self.checkpointer.config.save_consolidated.value), self._model_config
        overrides = {key: getattr(config, key) for key in CONFIG_OVERRIDES}
        base = Path(self.cfg.get("model.pretrained_model_name_or_path"))

        def merge_and_publish(path: str, **kwargs: Any) -> None:
            folder = Path(path) / "model"
            if mode == "every" or (mode == "final" and self.step_scheduler.is_last_step):
                lifecycle.run_coordinator_step(
                    lambda: merge(folder, folder / "consolidated", base=base, overrides=overrides),
                    description=f"merge the adapters in {folder}",
                )
            publish(path, **kwargs)

        lifecycle.publish = merge_and_publish

    @property
    def _model_config(self) -> BardVLConfig:
        return self.model_parts[0].config

    def _random_ids(self) -> int:
        """How many ids random replacements are drawn from."""
        vocabulary, mask = self._model_config.text_config.vocab_size, self._model_config.mask_token_id
        tokenizer = self.processor.tokenizer
        check_mask_token_id(mask, vocabulary)
        if mask in tokenizer.get_vocab().values() and mask not in tokenizer.all_special_ids:
            raise ValueError(
                f"mask_token_id {mask} is the text token {tokenizer.convert_ids_to_tokens(mask)!r}; choose a row of the"
                " embedding that no text uses"
            )
        number = self.noise.num_random_ids or tokenizer.vocab_size
        if not number <= vocabulary or mask < number:
            raise ValueError(
                f"noise.num_random_ids={number} must be at most {min(vocabulary, mask)}: the embedding has {vocabulary}"
                f" rows and mask_token_id is {mask}"
            )
        return number

    def run_train_validation_loop(self) -> None:
        """Train; log lines pass above the progress bar."""
        try:
            with logging_redirect_tqdm():
                super().run_train_validation_loop()
        except ValueError as error:
            raise last_line_of_worker_error(error) from error

    # ------------------ one optimizer step ------------------
    def _run_train_optim_step(self, batches: list[dict[str, Any]], max_grad_norm: float | None = None) -> MetricsSample:
        """Draw the noise of all microbatches, normalise over the whole step, and let upstream do the rest."""
        position = self.step_scheduler.step % self.step_scheduler.epoch_len * self.step_scheduler.grad_acc_steps
        context = self._noise_context(self.seed, self.step_scheduler.epoch)
        noise = self._noise_of_step()
        batches = [
            corrupt_batch(self._without_repeats(batch, self.dataloader, position + i), noise, context)
            for i, batch in enumerate(batches)
        ]
        totals = self._reduce(count(batches))
        self._settle_bad("train", batches, totals)
        self._report_dropped(totals)
        started = self.timestamp
        self.joint_parts.clear()
        log_data = super()._run_train_optim_step([self._weigh(batch, totals) for batch in batches], max_grad_norm)
        tps = totals.num_tokens / max(self.timestamp - started, 1e-9)
        log_data.metrics.update(
            num_samples=totals.num_samples,
            num_loss_tokens=totals.num_loss_tokens,
            num_dropped=totals.num_dropped,
            num_bad=totals.num_bad,
            num_tokens_per_step=totals.num_tokens,
            fill=totals.num_tokens / max(totals.num_positions, 1),
            tps=tps,
            tps_per_gpu=tps / max(self._get_dp_group_size(), 1),
            **self._utilisation(batches, max(self.timestamp - started, 1e-9)),
        )
        if len(self.noise_schedule.phases) > 1:
            levels = noise.levels()
            log_data.metrics.update(noise_phase=self.noise_phase, noise_low=levels.low, noise_high=levels.high)
        if self.ar_loss_weight:
            diffusion, ar = self._reduce_joint_parts()
            log_data.metrics.update(diffusion_loss=diffusion, ar_loss=ar, num_ar_tokens=totals.num_ar_tokens)
        return log_data

    def _noise_of_step(self) -> NoiseSettings:
        """Noise of this optimizer step; says so in the log where a phase of the schedule begins.

        The run ends with ``max_steps`` or with its epochs, whatever comes first.
        """
        scheduler = self.step_scheduler
        total = scheduler.max_steps
        if scheduler.epoch_len is not None:
            total = min(total, scheduler.num_epochs * scheduler.epoch_len)
        number, noise = self.noise_schedule.at(scheduler.step, total)
        if number != self.noise_phase and len(self.noise_schedule.phases) > 1 and self.dist_env.is_main:
            edges = self.noise_schedule.first_steps(total)
            empty = [i for i, (a, b) in enumerate(pairwise(edges)) if a == b]
            if self.noise_phase is None and empty:
                logger.warning("noise.schedule: phases %s have no step in a run of %d steps", empty, total)
            logger.info(
                "step %d: phase %d of noise.schedule, to step %d: %s",
                scheduler.step,
                number,
                edges[number + 1] - 1,
                self.noise_schedule.phases[number],
            )
        self.noise_phase = number
        return noise

    def _utilisation(self, batches: list[dict[str, Any]], seconds: float) -> dict[str, float]:
        """TFLOP/s of each GPU, recomputation and row padding not counted, and their part of its peak where that is known."""
        flops = torch.tensor(self._step_flops(batches), dtype=torch.float64)
        per_gpu = self._dp_allreduce(flops).item() / self.dist_env.world_size / seconds
        on_gpu = self.dist_env.device.type == "cuda"
        dtype = str(self.compute_dtype).removeprefix("torch.")
        peak = peak_flops(torch.cuda.get_device_name(self.dist_env.device), dtype) if on_gpu else None
        return {"tflops_per_gpu": per_gpu / 1e12, **({"mfu": per_gpu / peak} if peak else {})}

    def _step_flops(self, batches: list[dict[str, Any]]) -> float:
        """FLOPs of this rank's microbatches; adapters need no gradient of the weights."""
        forward = batch_flops(self._model_config, batches).forward
        return (3 if self.peft_config is None else 2) * forward

    def _weigh(self, batch: dict[str, Any], totals: StepTotals) -> dict[str, Any]:
        """Add ``output_positions`` and ``output_weight`` to a corrupted microbatch, and what its context predicts."""
        return {**weigh(batch, self.loss_fn.reduction, totals), **self._weigh_next_tokens(batch, totals)}

    def _weigh_next_tokens(self, batch: dict[str, Any], totals: StepTotals) -> dict[str, Any]:
        """Add ``ar_positions`` and ``ar_weight`` if there is an autoregressive loss."""
        if not self.ar_loss_weight:
            return {}
        numbers = {"num_samples": totals.num_samples, "num_tokens": totals.num_ar_tokens}
        return weigh_next_tokens(batch, self.loss_fn.reduction, **numbers)

    def _noise_context(self, seed: int, epoch: int, stream: int = 0) -> NoiseContext:
        return NoiseContext(
            block_size=self._model_config.block_size,
            mask_token_id=self._model_config.mask_token_id,
            num_random_ids=self._num_random_ids,
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
        sampler, size = loader.sampler, len(loader.dataset)
        first = position * loader.batch_size
        slots = {*batch["slots"], *(bad.slot for bad in batch["rejects"])}
        repeated = {slot for slot in slots if (first + slot) * sampler.num_replicas + sampler.rank >= size}
        return without_samples(batch, repeated)

    def _reduce(self, totals: StepTotals) -> StepTotals:
        return StepTotals(*self._dp_allreduce(torch.tensor(totals, dtype=torch.long)).tolist())

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

    def _forward_backward_step(
        self,
        idx: int,
        batch: dict[str, Any],
        *,
        loss_buffer: list[Tensor],
        num_label_tokens: int,
        num_batches: int,
        is_train: bool = True,
    ) -> None:
        """Run one weighed microbatch; upstream's arguments. ``num_label_tokens`` is in the weights already."""
        del num_label_tokens
        batch = {key: _move_to_device(value, self.dist_env.device) for key, value in batch.items()}
        model = self.model_parts[0]
        sync = nullcontext()
        if is_train:
            defer = getattr(self.distributed_config, "defer_fsdp_grad_sync", True)
            sync = get_sync_ctx(model, idx == num_batches - 1, defer_fsdp_grad_sync=defer)
        with sync:
            with self._autocast_context():
                loss = self._compute_loss(model, batch)
            loss_buffer.append(loss.detach().clone())
            if is_train:
                (loss * self._get_dp_group_size(include_cp=True)).backward()

    def _compute_loss(self, model: nn.Module, batch: dict[str, Any]) -> Tensor:
        """Loss of a weighed microbatch: a scalar that sums to the step's loss over microbatches and ranks.

        With ``ar_loss_weight`` the context tokens follow the noisy ones at the LM head, which runs once for both.
        """
        loss, positions = self._diffusion_loss(batch), batch["output_positions"]
        if self.ar_loss_weight:
            following = next_tokens(batch)
            loss = JointLoss(loss, len(positions), following, ar_weight=self.ar_loss_weight)
            self.joint_parts.append(loss.parts)
            positions = torch.cat([positions, following.positions])
        output_fn = partial(chunked_loss, loss=loss, chunk_tokens=self.loss_chunk_tokens)
        inputs = self._model_inputs({**batch, "output_positions": positions}, self._model_config)
        return model(**inputs, output_fn=output_fn)

    def _diffusion_loss(self, batch: dict[str, Any]) -> ChunkLoss:
        """Loss of a weighed microbatch's noisy tokens, in their order in ``output_positions``."""
        positions, weight = batch["output_positions"], batch["output_weight"]
        labels, noisy_ids = batch["labels"].flatten()[positions], batch["input_ids"].flatten()[positions]

        def loss(logits: Tensor, part: slice) -> Tensor:
            return self.loss_fn(logits, labels[part], weight=weight[part], noisy_ids=noisy_ids[part], overwrite=True)

        return loss

    def _reduce_joint_parts(self) -> list[float]:
        """Diffusion and autoregressive loss, summed over microbatches and ranks."""
        return self._dp_allreduce(torch.stack(self.joint_parts).sum(0), include_cp=True).tolist()

    def _model_inputs(self, batch: dict[str, Any], config: BardVLConfig) -> dict[str, Any]:
        """Arguments of the forward of a model with this configuration."""
        return {
            "input_ids": batch["input_ids"],
            "attention_mask": make_mask(batch, config),
            "position_ids": batch["position_ids"],
            "pixel_values": batch["pixel_values"],
            "image_grid_thw": batch["image_grid_thw"],
            "output_positions": batch["output_positions"],
            "use_cache": False,
        }

    # ------------------ validation ------------------
    def _run_validation_epoch(self, val_dataloader: DataLoader) -> MetricsSample:
        """Validate; with ``validation_noise.levels`` once at each of them, and ``val_loss`` is their mean."""
        if not self.validation_levels:
            return self._validate(val_dataloader, self.validation_noise)
        samples = [self._validate(val_dataloader, noise) for noise in self.validation_levels]
        metrics = dict(samples[0].metrics)
        for key in metrics:
            if key.startswith("val_"):
                metrics[key] = statistics.fmean(sample.metrics[key] for sample in samples)
        metrics["num_label_tokens"] = sum(sample.metrics["num_label_tokens"] for sample in samples)
        for noise, sample in zip(self.validation_levels, samples, strict=True):
            metrics[level_name(noise.low)] = sample.metrics["val_loss"]
        return MetricsSample(step=samples[0].step, epoch=samples[0].epoch, metrics=metrics)

    def log_val_metrics(self, log_data: MetricsSample) -> None:
        """Log as upstream does, and keep the losses for the next checkpoint."""
        self.validation_losses = {key: value for key, value in log_data.metrics.items() if key.startswith("val_")}
        super().log_val_metrics(log_data)

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
    def _validate(self, val_dataloader: DataLoader, noise: NoiseSettings) -> MetricsSample:
        """Loss over the validation set, with noise that depends on the sample alone.

        It is drawn with a fixed seed and epoch and from ``validation_noise`` (by default the whole range of levels,
        whatever training uses), so that runs with the same block size compare.
        """
        for part in self.model_parts:
            part.eval()
        context = self._noise_context(VALIDATION_SEED, 0, VALIDATION_STREAM)
        losses, rejected, seen = [], [], StepTotals(0, 0, 0, 0)
        one = StepTotals(1, 1, 0, 0, num_ar_tokens=1)
        self.joint_parts.clear()
        for index, collated in enumerate(val_dataloader):
            batch = self._without_repeats(collated, val_dataloader, index)
            batch = corrupt_batch(batch, noise, context)
            rejected.append({"rejects": batch["rejects"]})
            seen = StepTotals(*(a + b for a, b in zip(seen, count([batch]), strict=True)))
            self._forward_backward_step(
                0,
                self._weigh(batch, one),
                loss_buffer=losses,
                num_label_tokens=0,
                num_batches=1,
                is_train=False,
            )
        totals = self._reduce(seen)
        self._settle_bad("validation", rejected, totals)
        divisor = totals.num_samples if self.loss_fn.reduction == "mean" else totals.num_loss_tokens
        total = self._dp_allreduce(torch.stack(losses).double().sum(), include_cp=True).item()
        val_loss, joint = total / max(divisor, 1), {}
        if self.ar_loss_weight:
            ar_divisor = totals.num_samples if self.loss_fn.reduction == "mean" else totals.num_ar_tokens
            diffusion, ar = self._reduce_joint_parts()
            joint = {"val_diffusion_loss": diffusion / max(divisor, 1), "val_ar_loss": ar / max(ar_divisor, 1)}
            val_loss = joint["val_diffusion_loss"] + self.ar_loss_weight * joint["val_ar_loss"]
        return MetricsSample(
            step=self.step_scheduler.step,
            epoch=self.step_scheduler.epoch,
            metrics={
                "val_loss": val_loss,
                **joint,
                "lr": self.optimizer[0].param_groups[0]["lr"],
                "num_label_tokens": totals.num_loss_tokens,
                "num_samples": totals.num_samples,
                "num_bad": totals.num_bad,
                "mem": torch.cuda.max_memory_allocated() / 1024**3 if torch.cuda.is_available() else 0.0,
            },
        )


def _check_processor(processor: Any) -> None:
    if processor is None:
        raise ValueError("the checkpoint folder has no processor; make a start point with `nemo-bard convert`")


class _UserErrors(logging.Filter):
    """Drops log records about a ValueError, which is raised and told as one line."""

    def filter(self, record: logging.LogRecord) -> bool:
        return not (record.exc_info and isinstance(record.exc_info[1], ValueError))


def _section(cfg: Any, key: str) -> dict[str, Any] | None:
    node = cfg.get(key, None)
    return node.to_dict() if hasattr(node, "to_dict") else node


def run_main(recipe_class: type[PBMRecipe], config_path: str | os.PathLike | None) -> None:
    """Run a recipe from ``-c CONFIG`` and overrides, as NeMo AutoModel's launchers do."""
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    recipe = recipe_class(parse_args_and_load_config(config_path))
    recipe.setup()
    recipe.run_train_validation_loop()


def main(config_path: str | os.PathLike | None = None) -> None:
    """Run this recipe; see ``run_main``."""
    run_main(PBMRecipe, config_path)


if __name__ == "__main__":
    main()
