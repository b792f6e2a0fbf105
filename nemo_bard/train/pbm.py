"""The PBM recipe: supervised block-diffusion fine-tuning at one block size (BARD, arXiv 2604.16514).

A stage of progressive block merging is this recipe with its own ``model.block_size``, started from the stage before.
``train.step`` holds an optimizer step, ``train.validation`` the validation, ``train.resume`` how it goes on; here everything
is built.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Mapping, Sized
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from nemo_automodel.components.distributed.config import DistributedSetup, FSDP2Config
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from tqdm.contrib.logging import logging_redirect_tqdm

from nemo_bard.data.checks import check_once, checks_put_off
from nemo_bard.data.collate import DEFAULT_MAX_LENGTH, BlockDiffusionCollator
from nemo_bard.data.lengths import last_line_of_worker_error
from nemo_bard.data.numbered import numbered
from nemo_bard.data.packing import PackedDataset, pack_dataset
from nemo_bard.data.ranks import Ranks
from nemo_bard.data.rejects import check_on_bad_sample
from nemo_bard.generation.settings import check_mask_token_id
from nemo_bard.method.layout import RowOptions
from nemo_bard.method.losses import BlockDiffusionLoss
from nemo_bard.method.objectives import JointObjective, Objective, PBMObjective, make_objective
from nemo_bard.method.schedule import NoiseSchedule, NoiseSettings, ValidationNoise
from nemo_bard.model.modeling import BardVLForConditionalGeneration
from nemo_bard.train import trackers
from nemo_bard.train.adapters import draw_adapters, export_merged
from nemo_bard.train.bad_samples import BadSamples, without_checks
from nemo_bard.train.config import REPLICAS_KEY, check_ar_loss, check_batch_sizes, replicas_of, validate_recipe
from nemo_bard.train.masks import FLEX_SHORTEST_ROW, FLEX_TILE, uses_flex
from nemo_bard.train.phases import NoiseOfRun
from nemo_bard.train.resume import ResumedTraining
from nemo_bard.train.settings import PackingSettings, RecipeSettings
from nemo_bard.upstream import automodel, cpu
from nemo_bard.upstream.recipe import OpenedDataloaderConfig, Source, run_main
from nemo_bard.upstream.transformers import text_section

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_MINUTES = 30


class PBMRecipe(ResumedTraining):
    """AutoModel's VLM recipe for block diffusion; see ``recipes/pbm.yaml`` for its settings."""

    loss_class: ClassVar[type[nn.Module]] = BlockDiffusionLoss
    """What ``loss_fn`` has to be."""
    settings_class: ClassVar[type[RecipeSettings]] = RecipeSettings
    """Our values at the top level of the recipe."""
    settings: RecipeSettings
    """Those of this run."""
    pixel_dtype: torch.dtype
    """Of the pixels that the collator gives: what the vision tower casts them to."""
    data_cache: Path | None = None
    """Where the notes of checked data sets are kept if ``packing.cache_dir`` is null; ``checkpoint.checkpoint_dir`` if
    this is None too."""

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
        raw = self.cfg.to_yaml_dict(use_orig_values=True)
        self.validate_config(raw)
        self.settings = self.settings_class.from_recipe(raw)
        cpu.apply()
        noise = _section(self.cfg, "noise") or {}
        self.noise = NoiseSettings.from_dict({key: value for key, value in noise.items() if key != "schedule"})
        self.part_sums = []
        self.validation_losses = {}
        self.validation_noise = ValidationNoise.from_dict(_section(self.cfg, "validation_noise"), self.noise)
        self.seed, self.loss_chunk_tokens = self.settings.seed, self.settings.loss_chunk_tokens
        self._fill_defaults()
        self.on_bad_sample = check_on_bad_sample(_section(self.cfg, "on_bad_sample"))
        if self.on_bad_sample.drops:
            without_checks(self.cfg)
        self.packing = PackingSettings.from_dict(_section(self.cfg, "packing"))
        automodel.replace_loaders(self.cfg, self._opened_together)
        folder = Path(self.cfg.get("checkpoint.checkpoint_dir", None) or "checkpoints")
        trackers.prepare(self.cfg, folder)
        with trackers.failures_told():
            self._build(raw, folder)

    def _build(self, raw: Mapping[str, Any], folder: Path) -> None:
        """Let upstream build everything, and complete it."""
        super().setup()
        if self.dist_env.is_main:
            trackers.note_run(folder)
        self._check_built()
        self.dataloader.collate_fn = self._complete(self.dataloader.collate_fn, self.noise, packed=True)
        if self.val_dataloader is not None:
            self.val_dataloader.collate_fn = self._complete(
                self.val_dataloader.collate_fn, self.validation_noise.settings
            )
        self.bad_samples = BadSamples(
            self.on_bad_sample, Path(self.checkpointer.config.checkpoint_dir), is_main=self.dist_env.is_main
        )
        for split, loader, section in (
            ("train", self.dataloader, "dataloader"),
            ("validation", self.val_dataloader, "validation_dataloader"),
        ):
            if loader is not None:
                self.bad_samples.guard(split, loader)
                loader.pin_memory = _pins(raw.get(section) or {}, self.dist_env.device)
        self.num_random_ids = self._random_ids()
        self.num_dropped = 0
        schedule = NoiseSchedule.from_dict(_section(self.cfg, "noise") or {})
        self.noise_of_run = NoiseOfRun(schedule, is_main=self.dist_env.is_main)
        self.objective = self._make_objective()
        if self.peft_config is not None:
            base = Path(self.cfg.get("model.pretrained_model_name_or_path"))
            export_merged(self, self._model_config, base)

    def _complete(
        self, collate: Callable[..., Any], noise: NoiseSettings, *, packed: bool = False
    ) -> BlockDiffusionCollator:
        """Give a collator what only the recipe knows; ``packed`` says that the section ``packing`` is for it."""
        assert isinstance(collate, partial)
        settings: dict[str, Any] = {"options": self._row_options(noise)}
        with_flex = uses_flex(self._model_config, self.dist_env.device)
        if with_flex:
            settings["pad_to_multiple_of"] = math.lcm(collate.keywords.get("pad_to_multiple_of", 1), FLEX_TILE)
        if packed and self.packing.max_length is not None:
            longest = collate.keywords.get("max_length", DEFAULT_MAX_LENGTH)
            settings["max_length"] = min(longest, self.packing.max_length)
            settings["max_row_length"] = self.packing.max_length
        collator: BlockDiffusionCollator = collate(config=self._model_config, **settings)
        collator.keep_bad = True
        collator.pixel_dtype = self.pixel_dtype
        if with_flex:
            collator.shortest_row = FLEX_SHORTEST_ROW
        return collator

    def _opened_together(self, split: str, loader: Any) -> OpenedDataloaderConfig:
        """A loader whose data set all ranks open, check and measure together; ``split`` is ``train`` or ``validation``."""

        def opened(build: Callable[[], Source]) -> Source:
            minutes = self.cfg.get("dist_env.timeout_minutes")
            with Ranks.together(timedelta(minutes=minutes)) as ranks:
                with checks_put_off() as unchecked:
                    source, processor = ranks.on_all(build, f"opening the data set ({split})")
                dataset = numbered(source)
                _check_equal_sizes(ranks, dataset, split)
                made = dataset
                if split == "train" and self.packing.max_length is not None:
                    made = self._pack(dataset, processor, loader, ranks)
                    unchecked = [one for one in unchecked if one is not source]  # measuring checks as much
                for one in unchecked:
                    check_once(one, self._cache_dir(), ranks=ranks, num_workers=loader.num_workers)
            return made, processor

        sampler = partial(self.stream_sampler, loader) if split == "train" else None
        return OpenedDataloaderConfig.from_config(loader, opened, sampler)

    def _cache_dir(self) -> Path:
        """Folder for what is known of data sets."""
        own = self.packing.cache_dir or self.data_cache
        return Path(own or self.cfg.get("checkpoint.checkpoint_dir", "checkpoints"))

    def _pack(self, dataset: Any, processor: Any, loader: Any, ranks: Ranks) -> PackedDataset:
        """Plan the rows of the training set; called by upstream's setup, when the model is there."""
        _check_processor(processor)
        return pack_dataset(
            dataset,
            self._complete(loader.collator.build(processor=processor), self.noise, packed=True),
            cache_dir=self._cache_dir(),
            seed=self.seed,
            shuffle=loader.shuffle,
            num_workers=loader.num_workers,
            drop_bad=self.on_bad_sample.drops,
            ranks=ranks,
        )

    def _make_objective(self) -> Objective:
        """What is minimised: the loss's own objective, with the joint loss if there is one."""
        return self._with_joint_loss(make_objective(self.loss_fn, PBMObjective))

    def _with_joint_loss(self, objective: Objective) -> Objective:
        weight = self.settings.ar_loss_weight
        return JointObjective(objective, weight) if weight else objective

    def _row_options(self, noise: NoiseSettings) -> RowOptions:
        """What training rows hold; ``noise`` is that of their batches."""
        return RowOptions(noisy_copies=2 if noise.complementary else 1, next_token=self.settings.ar_loss_weight > 0)

    def _fill_defaults(self) -> None:
        """Write values that depend on the machine, or that must not be upstream's default, into the configuration."""
        has_cuda = torch.cuda.is_available()
        if (self.cfg.get("dist_env.backend", None) or "auto") == "auto":
            self.cfg.set_by_dotted("dist_env.backend", "nccl" if has_cuda else "gloo")
        if self.cfg.get("dist_env.timeout_minutes", None) is None:
            self.cfg.set_by_dotted("dist_env.timeout_minutes", DEFAULT_TIMEOUT_MINUTES)
        if (self.cfg.get("model.attn_implementation", None) or "auto") == "auto":
            self.cfg.set_by_dotted("model.attn_implementation", "bard")
        compute = self.settings.compute_dtype
        if compute == "auto":
            compute = "bfloat16" if has_cuda and torch.cuda.is_bf16_supported() else "float32"
        self.compute_dtype = getattr(torch, compute)
        # What a policy of the user's makes of the weights is not known here.
        plain = self.cfg.get("distributed.mp_policy", None) is None
        self.pixel_dtype = self.compute_dtype if plain else torch.float32

    def distributed_setup_of_config(self) -> DistributedSetup:
        """Check the batch sizes, and set what depends on the ranks.

        That is the number of replicas, and the compute dtype: FSDP's policy if there are shards, autocast on one rank.
        """
        ranks = self.dist_env.world_size
        check_batch_sizes(
            self.cfg.get("step_scheduler.global_batch_size"), self.cfg.get("step_scheduler.local_batch_size"), ranks
        )
        replicas = replicas_of(
            _section(self.cfg, "distributed") or {}, ranks, int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        )
        self.cfg.set_by_dotted(REPLICAS_KEY, replicas)
        setup = super().distributed_setup_of_config()
        strategy = setup.strategy_config
        assert isinstance(strategy, FSDP2Config)
        if self.cfg.get("distributed.mp_policy", None) is None:
            strategy.mp_policy = MixedPrecisionPolicy(
                param_dtype=self.compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
            )
        if ranks == 1 and self.compute_dtype != torch.float32:
            strategy.autocast_dtype = self.compute_dtype
        return setup

    def _check_built(self) -> None:
        model = self.model_parts[0]
        if not isinstance(model, BardVLForConditionalGeneration):
            raise ValueError(f"the checkpoint gave a {type(model).__name__}, not a BardVLForConditionalGeneration")
        if not isinstance(self.loss_fn, self.loss_class) and not hasattr(self.loss_fn, "objective_class"):
            raise ValueError(
                f"loss_fn of this recipe must be a nemo_bard.method.{self.loss_class.__name__} or have an"
                f" objective_class, got {type(self.loss_fn).__name__}"
            )
        if hasattr(model.lm_head, "lora_A"):
            raise ValueError("peft puts an adapter on lm_head, which this recipe does not support; exclude lm_head")
        _check_processor(self.processor)
        check_ar_loss(self.settings.ar_loss_weight, self._model_config.context_attention)
        # The exported generation_config.json must not keep the block size of the stage before.
        model.generation_config.block_size = None
        samples, batch = len(cast("Sized", self.dataloader.dataset)), self.cfg.get("step_scheduler.global_batch_size")
        if samples < batch and self.dist_env.is_main:
            logger.warning(
                "the data set has %d %s, fewer than step_scheduler.global_batch_size=%d: every step takes all of"
                " them; set a smaller global_batch_size for more steps per epoch",
                samples,
                "packed rows" if isinstance(self.dataloader.dataset, PackedDataset) else "samples",
                batch,
            )

    def load_checkpoint(self, restore_from: str | None = None) -> None:
        """Load, after adapters were drawn alike on all ranks; see ``ResumedTraining``."""
        if self.peft_config is not None:
            draw_adapters(self.model_parts[0], self.peft_config.lora_A_init, self.seed)
        super().load_checkpoint(restore_from)

    def _random_ids(self) -> int:
        """How many ids random replacements are drawn from."""
        vocabulary, mask = text_section(self._model_config).vocab_size, self._model_config.mask_token_id
        if mask is None:
            raise ValueError("model.mask_token_id must be set, the checkpoint's config.json has none")
        assert self.processor is not None
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
            with logging_redirect_tqdm(), trackers.failures_told():
                super().run_train_validation_loop()
        except ValueError as error:
            raise last_line_of_worker_error(error) from error


def _pins(section: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a loader puts its batches where they are copied to the device from while the host goes on."""
    asked = section.get("pin_memory")
    return device.type == "cuda" if asked is None else asked


def _check_processor(processor: Any) -> None:
    if processor is None:
        raise ValueError("the checkpoint folder has no processor; make a start point with `nemo-bard convert`")


def _check_equal_sizes(ranks: Ranks, dataset: Sized, split: str) -> None:
    sizes = ranks.exchange(len(dataset), f"opening the data set ({split})")
    for rank, size in enumerate(sizes):
        if size != sizes[0]:
            raise ValueError(
                f"the data set ({split}) has {sizes[0]} samples on rank 0 and {size} on rank {rank}; all ranks must read"
                " the same"
            )


def _section(cfg: Any, key: str) -> dict[str, Any] | None:
    node = cfg.get(key, None)
    return node.to_dict() if hasattr(node, "to_dict") else node


def main(config_path: str | None = None) -> None:
    """Run this recipe; see ``run_main``."""
    run_main(PBMRecipe, config_path)


if __name__ == "__main__":
    main()
