"""The SWD recipe: stage-wise distillation from a frozen small-block anchor (BARD, arXiv 2604.16514).

The anchor reads the row that the student reads, noise included, under the mask of its own block size. Cross-entropy and
distillation are unweighted means over the supervised tokens of the whole optimizer step. Everything else is the PBM
recipe.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from nemo_automodel.components.training.utils import ScopedModuleOffloading
from nemo_automodel.recipes.vlm.finetune import build_model
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import AutoTokenizer

from nemo_bard.method.chunked import chunked_top_k
from nemo_bard.method.layout import RowOptions, check_anchor_block_size
from nemo_bard.method.losses import DistillationLoss
from nemo_bard.method.objectives import Objective, SWDObjective, make_objective
from nemo_bard.method.schedule import NoiseSettings
from nemo_bard.model.configuration import BardVLConfig
from nemo_bard.model.modeling import BardVLForConditionalGeneration
from nemo_bard.train.config import validate_recipe
from nemo_bard.train.flops import batch_flops
from nemo_bard.train.forward import model_inputs
from nemo_bard.train.pbm import PBMRecipe
from nemo_bard.train.settings import DistillationSettings
from nemo_bard.upstream.recipe import run_main
from nemo_bard.upstream.transformers import text_section

OVERRIDES = ("block_size", "mask_token_id")
"""Fields of a model's configuration that a recipe may override and that must fit between student and anchor."""
SHARED_VISION_FIELDS = ("patch_size", "temporal_patch_size", "spatial_merge_size", "in_channels")


def read_config(section: Mapping[str, Any]) -> BardVLConfig:
    """Configuration of the checkpoint that a recipe's ``model`` or ``anchor`` section names, overrides included."""
    overrides = {key: section[key] for key in OVERRIDES if section.get(key) is not None}
    return BardVLConfig.from_pretrained(section["pretrained_model_name_or_path"], **overrides)


def check_anchor(student: BardVLConfig, anchor: BardVLConfig, loss: DistillationLoss) -> None:
    """Check that the anchor can teach the student.

    Raises:
        ValueError: One line that names what does not fit.
    """
    try:
        check_anchor_block_size(student.block_size, anchor.block_size)
    except ValueError as error:
        raise ValueError(f"anchor.block_size: {error}") from error
    pairs = [
        ("vocab_size", text_section(student).vocab_size, text_section(anchor).vocab_size),
        *((key, getattr(student, key), getattr(anchor, key)) for key in ("mask_token_id", "image_token_id")),
        *(
            (key, getattr(student.vision_config, key), getattr(anchor.vision_config, key))
            for key in SHARED_VISION_FIELDS
        ),
    ]
    for key, ours, theirs in pairs:
        if ours != theirs:
            raise ValueError(f"anchor: its {key} is {theirs}, the student's is {ours}; they must be equal")
    vocabulary = text_section(student).vocab_size
    if loss.kd_top_k > vocabulary:
        raise ValueError(f"loss_fn.kd_top_k must be at most the vocabulary's {vocabulary}, got {loss.kd_top_k}")


def check_tokenizers(student: str, anchor: str) -> None:
    """Raise ValueError unless both folders' tokenizers give every token the same id."""
    vocabularies = []
    for key, folder in (("model", student), ("anchor", anchor)):
        try:
            vocabularies.append(AutoTokenizer.from_pretrained(folder).get_vocab())
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{key}.pretrained_model_name_or_path: {folder} has no tokenizer ({reason})") from error
    ours, theirs = vocabularies
    different = sorted(token for token in ours.keys() | theirs.keys() if ours.get(token) != theirs.get(token))
    if different:
        token = different[0]
        raise ValueError(
            f"anchor: its tokenizer differs from the student's in {len(different)} tokens, such as {token!r} with id"
            f" {theirs.get(token)} instead of {ours.get(token)}; they must be equal"
        )


@torch.no_grad()
def anchor_top_k(
    anchor: nn.Module, config: BardVLConfig, batch: Mapping[str, Any], *, k: int, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """Run the anchor on a student's row, under the mask of its own blocks.

    Args:
        anchor: The model that teaches.
        config: Its configuration.
        batch: A weighed microbatch on its device, with ``anchor_block_ids``.
        k: How many logits.
        chunk_tokens: See ``chunked_top_k``.

    Returns:
        Its largest logits at ``output_positions`` and their ids, each ``[K, k]``.
    """
    inputs = model_inputs({**batch, "block_ids": batch["anchor_block_ids"]}, config)
    return anchor(**inputs, output_fn=partial(chunked_top_k, k=k, chunk_tokens=chunk_tokens))


class SWDRecipe(PBMRecipe):
    """PBM with a frozen anchor; see ``recipes/swd.yaml`` for its settings."""

    loss_class = DistillationLoss
    settings_class = DistillationSettings

    @classmethod
    def validate_config(cls, raw: Mapping[str, Any]) -> None:
        """Check a recipe before anything is built; configuration and tokenizer of both checkpoints are read.

        Args:
            raw: The recipe as plain dictionaries.

        Raises:
            ValueError: One line that names the key, its value and what is allowed.
        """
        validate_recipe(raw, with_anchor=True)
        check_anchor(read_config(raw["model"]), read_config(raw["anchor"]), _read_loss(raw["loss_fn"]))
        check_tokenizers(*(raw[key]["pretrained_model_name_or_path"] for key in ("model", "anchor")))

    def setup(self) -> None:
        """Build everything, then the anchor: sharded like the student, frozen, and in no checkpoint.

        Raises:
            ValueError: If the recipe or a checkpoint is not as it must be.
        """
        super().setup()
        anchor = build_model(
            self.cfg.anchor,
            cfg_freeze=None,
            cfg_peft=None,
            seed=self.seed,
            distributed_setup=self.distributed_setup,
        )
        anchor = cast("nn.Module", anchor)  # upstream's annotation says a tuple
        if not isinstance(anchor, BardVLForConditionalGeneration):
            raise ValueError(
                f"anchor: the checkpoint gave a {type(anchor).__name__}, not a BardVLForConditionalGeneration"
            )
        assert anchor.config.block_size == self.anchor_block_size
        assert isinstance(self.settings, DistillationSettings)
        # Without CUDA there is nowhere to offload from.
        self.offload_anchor = self.settings.offload_anchor and self.dist_env.device.type == "cuda"
        cast("nn.Module", anchor).to("cpu" if self.offload_anchor else self.dist_env.device)
        self.anchor = anchor.eval().requires_grad_(False)
        self.untrack_state("anchor")

    def _fill_defaults(self) -> None:
        super()._fill_defaults()
        raw = self.cfg.to_yaml_dict(use_orig_values=True)
        for section in ("model", "anchor"):
            # a null would be taken as an override of the folder's value
            self.cfg.set_by_dotted(f"{section}.block_size", read_config(raw[section]).block_size)
        self.anchor_block_size = self.cfg.get("anchor.block_size")
        if (self.cfg.get("anchor.attn_implementation", None) or "auto") == "auto":
            self.cfg.set_by_dotted("anchor.attn_implementation", self.cfg.get("model.attn_implementation"))
        if self.cfg.get("anchor.torch_dtype", None) is None:
            self.cfg.set_by_dotted("anchor.torch_dtype", str(self.compute_dtype).removeprefix("torch."))

    def _make_objective(self) -> Objective:
        return self._with_joint_loss(make_objective(self.loss_fn, SWDObjective, teach=self._teach))

    def _row_options(self, noise: NoiseSettings) -> RowOptions:
        return replace(super()._row_options(noise), anchor_block_size=self.anchor_block_size)

    def _teach(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """The anchor's largest logits at the supervised tokens and their ids, each ``[K, kd_top_k]``."""
        assert isinstance(self.loss_fn, DistillationLoss)
        with ScopedModuleOffloading(self.anchor, enabled=self.offload_anchor):
            top = anchor_top_k(
                self.anchor, self.anchor.config, batch, k=self.loss_fn.kd_top_k, chunk_tokens=self.loss_chunk_tokens
            )
            for module in self.anchor.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()  # FSDP keeps some parameters whole for a backward that never comes
        return top

    def _batch_flops(self, batch: dict[str, Any]) -> float:
        """The student's FLOPs, and one forward of the anchor."""
        return super()._batch_flops(batch) + batch_flops(self.anchor.config, [batch]).forward


def _read_loss(section: Mapping[str, Any]) -> DistillationLoss:
    """Build the recipe's loss.

    Raises:
        ValueError: If it is another loss or a value is not allowed.
    """
    settings = {key: value for key, value in section.items() if key != "_target_"}
    target = section["_target_"]
    if isinstance(target, str):
        module, _, name = target.rpartition(".")
        target = getattr(importlib.import_module(module), name, None)
    if not (isinstance(target, type) and issubclass(target, DistillationLoss)):
        raise ValueError(f"loss_fn._target_ must be nemo_bard.method.DistillationLoss, got {section['_target_']}")
    try:
        return target(**settings)
    except ValueError as error:
        raise ValueError(f"loss_fn.{error}") from error


def main(config_path: str | None = None) -> None:
    """Run the recipe from ``-c CONFIG`` and overrides, as NeMo AutoModel's launchers do."""
    run_main(SWDRecipe, config_path)


if __name__ == "__main__":
    main()
