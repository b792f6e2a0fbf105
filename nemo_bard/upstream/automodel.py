"""What we touch of NeMo AutoModel. Nothing is imported here before it is used.

``upstream.recipe`` has the classes that derive from AutoModel's, ``upstream.cpu`` what it lacks where there is no CUDA,
``cli.startup`` the wrapper around its command line; their names are in the table here too.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from nemo_bard.upstream.touched import Touched

if TYPE_CHECKING:
    import torch
    from nemo_automodel.components.config.loader import ConfigNode

logger = logging.getLogger(__name__)

_FINETUNE = "nemo_automodel.recipes.vlm.finetune"
_RECIPE = f"{_FINETUNE}.FinetuneRecipeForVLM"
_INIT = "nemo_automodel.components.distributed.init_utils"
_PARSER = "nemo_automodel.components.config._arg_parser"

_read = partial(Touched, version="nemo-automodel 0.7.0")
_hook = partial(_read, until="AutoModel's recipe has public methods for the parts of a step")
_watched = partial(
    _read,
    reason="wrapped, so that a chain can follow a recipe of any class: files on the disk before they count, and progress",
    until="AutoModel's recipes take callbacks",
)
_cpu = partial(_read, until="AutoModel's recipes run without CUDA")
TOUCHED = (
    _read(
        f"{_PARSER}.parse_args_and_load_config",
        reason="the only function that reads a recipe as the command `automodel` does",
        until="AutoModel exposes it",
        parameters="default_cfg_path, argv",
        source="set_by_dotted",
    ),
    *(
        _read(
            module,
            reason="its print is replaced: it writes the whole recipe between our lines",
            until="it logs instead",
            source="print(",
        )
        for module in (_PARSER, _INIT, "nemo_automodel.recipes.base_recipe")
    ),
    _read(
        "nemo_automodel.components.config.loader",
        reason="its print is replaced: a traceback for wrong input, which ends as one line",
        until="it raises without printing",
        source="print(",
    ),
    _read(
        "nemo_automodel._transformers.registry.ModelRegistry.get_model_cls_from_model_arch",
        reason="`doctor` asks which class an architecture leads to",
        until="AutoModel exposes its registry",
        parameters="model_arch",
    ),
    *(
        _read(
            f"nemo_automodel.{name}",
            reason="its source is read by `upstream.sections`: which keys a recipe's sections have",
            until="AutoModel can list the keys of a recipe",
        )
        for name in (
            "_transformers.auto_model",
            "recipes._dist_utils.create_distributed_setup_from_config",
            "recipes._typed_config.RecipeConfig._raw",
        )
    ),
    _read(
        f"{_FINETUNE}._move_to_device",
        reason="moves a batch, nested parts included",
        until="AutoModel exposes it",
        parameters="value, device",
    ),
    _hook(
        f"{_RECIPE}._run_train_optim_step",
        reason="overridden: noise and totals of a whole step come before it",
        parameters="self, batches, max_grad_norm",
    ),
    _hook(
        f"{_RECIPE}._forward_backward_step",
        reason="overridden: the loss runs at chosen positions, with weights of the whole step",
        parameters="self, idx, batch, *, loss_buffer, num_label_tokens, num_batches, is_train",
    ),
    _hook(
        f"{_RECIPE}._run_validation_epoch",
        reason="overridden: validation has noise too, at one or several levels",
        parameters="self, val_dataloader",
    ),
    _hook(
        f"{_RECIPE}._create_distributed_setup",
        reason="overridden: batch sizes and compute dtype fit the number of ranks",
        parameters="self",
    ),
    _hook(
        f"{_RECIPE}._load_checkpoint_tracked_state",
        reason="overridden: what the samples depend on is compared first, and random states may be those of other ranks",
        until="AutoModel goes on on another number of ranks",
        parameters="self, ckpt_dir",
    ),
    _hook(
        f"{_RECIPE}._dp_allreduce",
        reason="sums counts and losses over the ranks",
        parameters="self, tensor, op, include_cp",
    ),
    _hook(f"{_RECIPE}._get_dp_group_size", reason="gradients are means over the ranks", parameters="self, include_cp"),
    _hook(f"{_RECIPE}._autocast_context", reason="the forward runs in the compute dtype", parameters="self"),
    _read(
        "nemo_automodel.components.datasets.vlm.loader.VlmDataloaderConfig._build_source",
        reason="overridden: ranks open data sets together, not one after the other; rows are packed right after",
        until="a data set can be opened by all ranks, and planned after it is built",
        parameters="self, *, pretrained_model_name_or_path, dp_rank, dp_world_size, dataset_build_context",
        source="with dataset_build_context",
    ),
    *(
        _read(
            f"{_FINETUNE}.FinetuneRecipeForVLM{of}",
            reason=f"builds a loader from cfg.{name}, which is put there in place of the YAML's",
            until="a recipe can be given its loaders",
            source=f" = self.cfg.{name}\n",
        )
        for of, name in ((".setup", "vlm_dataloader"), ("", "vlm_validation_dataloader"))
    ),
    _watched(f"{_RECIPE}._make_progress_bar", parameters="self, total, initial"),
    _watched(f"{_RECIPE}.log_train_metrics", parameters="self, log_data"),
    _watched(f"{_RECIPE}.save_checkpoint", parameters="self, epoch, step, train_loss, val_loss, best_metric_key"),
    _watched("nemo_automodel.components.checkpoint.checkpointing.Checkpointer.lifecycle"),
    _watched(
        "nemo_automodel.components.checkpoint.lifecycle.CheckpointLifecycle.publish",
        parameters="self, path, *, best_val_metric, metric_key",
    ),
    _read(
        "nemo_automodel.components.training.step_scheduler.StepScheduler.sig_handler",
        reason="released after a stage: it would catch the signals of the next one",
        until="AutoModel's recipes have a public end",
    ),
    _read(
        "nemo_automodel.components.training.step_scheduler.StepScheduler.sigterm_received",
        reason="asked after every checkpoint: otherwise signals are looked for at other steps only",
        until="AutoModel looks for signals at every step",
        source="signals_received",
    ),
    _read(
        "nemo_automodel.cli.app.main",
        reason="wrapped by `cli.startup`: the command `finetune` whoever owns the script `automodel`",
        until="AutoModel's command line takes commands of other packages",
        parameters="",
    ),
    _read(
        "nemo_automodel.components.launcher.interactive.InteractiveLauncher.launch",
        reason="wrapped by `cli.launcher`: it needs a GPU, and looks for recipes beside its own package",
        until="AutoModel's launcher runs without CUDA and starts workers by the name of a module",
        parameters="self, config, config_path, recipe_target, launcher_config, extra_args",
        source="script_path",
    ),
    _cpu(
        "nemo_automodel._transformers.auto_model.apply_model_infrastructure",
        reason="places the model on cuda:0",
        source="device",
    ),
    _cpu(f"{_INIT}.initialize_distributed", reason="gives None or a number as the device", source="DistInfo("),
    _cpu(f"{_FINETUNE}.initialize_distributed", reason="the recipe's own name of it"),
    _cpu(
        f"{_FINETUNE}.calculate_loss",
        reason="refuses label views that a copy to a GPU would make contiguous",
        parameters="loss_fn, **kwargs",
    ),
)
"""What this room touches of NeMo AutoModel; ``docs/decisions.md`` says why there is a room for it."""

PRINTING = (_PARSER, _INIT, "nemo_automodel.recipes.base_recipe")
"""Modules that print an account of what they do, the whole recipe included."""


def load_config(path: str | None, words: Sequence[str] | None = None) -> ConfigNode:
    """Read a recipe file with overrides ``--a.b=c``, as the command ``automodel`` does; ``sys.argv`` where one is None."""
    from nemo_automodel.components.config._arg_parser import parse_args_and_load_config

    return parse_args_and_load_config(path, None if words is None else list(words))


def model_class_of(architecture: str) -> type:
    """The class that AutoModel builds for an architecture.

    Raises:
        KeyError: If it knows none.
    """
    from nemo_automodel._transformers.registry import ModelRegistry

    return ModelRegistry.get_model_cls_from_model_arch(architecture)


def to_device(value: Any, device: torch.device) -> Any:
    """``value`` with its tensors, nested ones included, on a device."""
    from nemo_automodel.recipes.vlm.finetune import _move_to_device

    return _move_to_device(value, device)


# ------------------ what it prints ------------------
def stop_printing() -> None:
    """Send what ``PRINTING`` modules print to the log."""
    for name in PRINTING:
        importlib.import_module(name).__dict__["print"] = _to_log


def resume_printing() -> None:
    """Undo ``stop_printing``."""
    for name in PRINTING:
        importlib.import_module(name).__dict__.pop("print", None)


def _to_log(*values: object, **_: object) -> None:
    logger.info(" ".join(map(str, values)))


@contextlib.contextmanager
def hold_back_instantiation_reports() -> Iterator[list[str]]:
    """Collect what ``ConfigNode.instantiate`` prints about a target that failed: signature, arguments, traceback."""
    from nemo_automodel.components.config import loader

    held: list[str] = []

    def hold(*values: object, **_: object) -> None:
        held.append(" ".join(map(str, values)))

    names = loader.__dict__
    names["print"] = hold
    try:
        yield held
    finally:
        del names["print"]


# ------------------ following a recipe ------------------
def replace_loaders(config: Any, replace: Callable[[str, Any], Any]) -> None:
    """Let a recipe that is not set up yet build its loaders from something else than what its YAML says.

    Args:
        config: The recipe's configuration.
        replace: From ``train`` or ``validation`` and the loader's configuration to the one to take.
    """
    for split, name in (("train", "vlm_dataloader"), ("validation", "vlm_validation_dataloader")):
        if (loader := getattr(config, name)) is not None:
            vars(config)[name] = replace(split, loader)


def before_publication(recipe: Any, call: Callable[[str], object]) -> None:
    """Call ``call(path)`` after a checkpoint is written and before it counts as whole, on all ranks."""
    lifecycle = recipe.checkpointer.lifecycle
    publish = lifecycle.publish

    def called_first(path: str, **kwargs: Any) -> Any:
        call(path)
        return publish(path, **kwargs)

    lifecycle.publish = called_first


def around_saving(recipe: Any, before: Callable[[], object], after: Callable[[], object]) -> None:
    """Call ``before()`` and ``after()`` around every checkpoint."""
    save = recipe.save_checkpoint

    def between(*args: Any, **kwargs: Any) -> Any:
        before()
        result = save(*args, **kwargs)
        after()
        return result

    recipe.save_checkpoint = between


def after_step(recipe: Any, call: Callable[[Any], object]) -> None:
    """Call ``call(sample)`` with what is logged of an optimizer step, after it is logged."""
    log = recipe.log_train_metrics

    def and_call(sample: Any) -> Any:
        result = log(sample)
        call(sample)
        return result

    recipe.log_train_metrics = and_call


def around_steps(recipe: Any, call: Callable[[list[Any], Callable[[], Any]], Any]) -> None:
    """Let ``call(batches, run)`` run every optimizer step: ``run()`` does, and what it returns has to be returned.

    A recipe without such a method is left alone.
    """
    if (step := getattr(recipe, "_run_train_optim_step", None)) is not None:
        recipe._run_train_optim_step = lambda batches, *args: call(batches, partial(step, batches, *args))


def around_microbatches(recipe: Any, call: Callable[[Callable[[], Any]], Any]) -> None:
    """Let ``call(run)`` run forward and backward of every microbatch, as in ``around_steps``."""
    if (run := getattr(recipe, "_forward_backward_step", None)) is not None:
        recipe._forward_backward_step = lambda *args, **kwargs: call(partial(run, *args, **kwargs))


def set_progress_bar(recipe: Any, title: str | None) -> None:
    """Give the progress bar a title; None draws no bar."""
    make = recipe._make_progress_bar

    def titled(*args: Any, **kwargs: Any) -> Any:
        bar = None if title is None else make(*args, **kwargs)
        if bar is not None:
            bar.set_description(title)
        return bar

    recipe._make_progress_bar = titled


def look_for_signal(recipe: Any) -> bool:
    """Ask all ranks whether a signal came; upstream does so only at steps that are no checkpoint steps otherwise."""
    return bool(recipe.step_scheduler.sigterm_received)


def end_with_this_step(recipe: Any) -> None:
    """Let a recipe end when the step is done, as if a signal had come; to be called on all ranks."""
    recipe.step_scheduler.sigterm_flag = True


def release_signals(recipe: Any) -> None:
    """Give the signals back that a recipe catches, if it got as far as that."""
    if handler := getattr(getattr(recipe, "step_scheduler", None), "sig_handler", None):
        handler.release()
