"""NeMo AutoModel's VLM recipe and input pipeline, with public names for what ours override and call of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Container, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from nemo_automodel.components.datasets.vlm.loader import VlmDataloaderBuild, VlmDataloaderConfig
from nemo_automodel.components.distributed.config import DistributedSetup
from nemo_automodel.components.loggers.metric_logger import MetricsSample
from nemo_automodel.recipes.vlm.finetune import FinetuneRecipeForVLM
from torch import Tensor, nn
from torch.utils.data import Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from nemo_bard.base.memory import keep_freed_memory
from nemo_bard.upstream import cpu
from nemo_bard.upstream.automodel import load_config, to_device
from nemo_bard.upstream.torch import to_device_without_waiting


class VLMRecipe(FinetuneRecipeForVLM):
    """AutoModel's VLM recipe. What it calls by a private name calls the public one here, which a recipe may override."""

    model_parts: list[nn.Module]
    """The model, as there are no pipeline stages."""

    def distributed_setup_of_config(self) -> DistributedSetup:
        """Build what AutoModel knows about ranks, shards and precision; called by ``setup``."""
        return super()._create_distributed_setup()

    def train_step(self, batches: list[dict[str, Any]], max_grad_norm: float | None = None) -> MetricsSample:
        """Run one optimizer step.

        Args:
            batches: Its microbatches on this rank.
            max_grad_norm: Where gradients are clipped, nowhere if None.

        Returns:
            What is to be logged of it.
        """
        return super()._run_train_optim_step(batches, max_grad_norm)

    def microbatch(
        self, index: int, batch: dict[str, Any], *, losses: list[Tensor], num_batches: int, is_train: bool = True
    ) -> None:
        """Run forward and, in training, backward of one microbatch.

        Args:
            index: Its number in the step.
            batch: The microbatch, on any device.
            losses: Gets its loss.
            num_batches: Microbatches of the step.
            is_train: Whether gradients are wanted.
        """
        raise NotImplementedError

    def validate(self, loader: Any) -> MetricsSample:
        """Run over a validation set; returns what is to be logged of it."""
        return super()._run_validation_epoch(loader)

    def restore_state(self, folder: Path) -> Any:
        """Load what a checkpoint keeps besides weights and optimizer; called once the checkpoint is chosen.

        Args:
            folder: The checkpoint.

        Returns:
            What upstream needs to load the rest.
        """
        return super()._load_checkpoint_tracked_state(str(folder))

    def sum_over_ranks(self, tensor: Tensor, *, context_parallel: bool = False) -> Tensor:
        """Sum a tensor over the data-parallel ranks; it comes back on the CPU where there are several.

        Args:
            tensor: Any shape, the same on all ranks.
            context_parallel: Whether ranks that share a sequence count too.
        """
        return self._dp_allreduce(tensor, include_cp=context_parallel)

    def num_data_ranks(self, *, context_parallel: bool = False) -> int:
        """Number of data-parallel ranks."""
        return self._get_dp_group_size(include_cp=context_parallel)

    def autocast(self) -> AbstractContextManager[Any]:
        """The context in which the forward runs."""
        return self._autocast_context()

    def on_device(self, batch: Mapping[str, Any], *, stay: Container[str] = ()) -> dict[str, Any]:
        """A microbatch on this rank's device; the host goes on while its tensors are copied.

        Args:
            batch: The microbatch; nested tensors are moved, too.
            stay: Keys of what stays where it is.
        """
        device = self.dist_env.device

        def move(value: Any) -> Any:
            if isinstance(value, Tensor):
                return to_device_without_waiting(value, device)
            return to_device(value, device)

        return {key: value if key in stay else move(value) for key, value in batch.items()}

    def _create_distributed_setup(self) -> DistributedSetup:
        cpu.normalise_device(self.dist_env)
        return self.distributed_setup_of_config()

    def _run_train_optim_step(self, batches: list[dict[str, Any]], max_grad_norm: float | None = None) -> MetricsSample:
        return self.train_step(batches, max_grad_norm)

    def _forward_backward_step(
        self,
        idx: int,
        batch: dict[str, Any],
        *,
        loss_buffer: list[Tensor],
        num_label_tokens: int | None,
        num_batches: int,
        is_train: bool = True,
    ) -> None:
        del num_label_tokens
        self.microbatch(idx, batch, losses=loss_buffer, num_batches=num_batches, is_train=is_train)

    def _load_checkpoint_tracked_state(self, ckpt_dir: str) -> Any:
        return self.restore_state(Path(ckpt_dir))

    def _run_validation_epoch(self, val_dataloader: Any) -> MetricsSample:
        return self.validate(val_dataloader)


Source = tuple[Any, Any]
"""A data set and its processor."""


@dataclass
class OpenedDataloaderConfig(VlmDataloaderConfig):
    """AutoModel's input pipeline whose data set a function of ours opens, on all ranks at once.

    AutoModel opens it on the first rank first, and its other ranks wait for that at most as long as gloo does by default.
    Its sampler knows no place to begin at, which its loader's state has to stand in for.
    """

    open: Callable[[Callable[[], Source]], Source] | None = None
    """From what opens data set and processor to what samplers and collators see of them."""
    sampler: Callable[[Any, int, int], Sampler] | None = None
    """From data set, data-parallel rank and number of ranks to a sampler, which drops what is to be dropped; None is
    upstream's."""

    @classmethod
    def from_config(
        cls,
        config: VlmDataloaderConfig,
        opened: Callable[[Callable[[], Source]], Source],
        sampler: Callable[[Any, int, int], Sampler] | None = None,
    ) -> OpenedDataloaderConfig:
        """The same pipeline, opened by ``opened`` and in the order of ``sampler``."""
        settings = {field.name: getattr(config, field.name) for field in fields(config)}
        return cls(**settings, open=opened, sampler=sampler)

    def build(self, *, dp_rank: int, dp_world_size: int, **kwargs: Any) -> VlmDataloaderBuild:
        """Build as upstream does, with our sampler if there is one."""
        built = super().build(dp_rank=dp_rank, dp_world_size=dp_world_size, **kwargs)
        if self.sampler is None:
            return built
        loader = built.dataloader
        dealt = StatefulDataLoader(
            loader.dataset,
            batch_size=loader.batch_size,
            sampler=self.sampler(loader.dataset, dp_rank, dp_world_size),
            collate_fn=loader.collate_fn,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            persistent_workers=self.persistent_workers,
            prefetch_factor=self.prefetch_factor,
            worker_init_fn=keep_freed_memory,
        )
        return replace(built, dataloader=dealt)

    def _build_source(
        self,
        *,
        pretrained_model_name_or_path: str,
        dp_rank: int,
        dp_world_size: int,
        dataset_build_context: AbstractContextManager[object] | None,
    ) -> Source:
        assert self.open is not None
        del dataset_build_context
        build = partial(
            super()._build_source,
            pretrained_model_name_or_path=pretrained_model_name_or_path,
            dp_rank=dp_rank,
            dp_world_size=dp_world_size,
            dataset_build_context=None,
        )
        return self.open(build)


def run_main(recipe_class: type[FinetuneRecipeForVLM], config_path: str | os.PathLike[str] | None) -> None:
    """Run a recipe from ``-c CONFIG`` and overrides, as NeMo AutoModel's launchers do."""
    recipe = recipe_class(load_config(None if config_path is None else os.fspath(config_path)))
    recipe.setup()
    recipe.run_train_validation_loop()
