"""The stage kind that trains: a recipe file with what the model, the data, the user and the chain say on top."""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import yaml

from nemo_bard.base.files import write_text
from nemo_bard.base.folders import CONFIG, read_model_type, read_object
from nemo_bard.base.names import MODEL_TYPE
from nemo_bard.base.paths import find_recipe
from nemo_bard.base.settings import flag, integer, number, setting, text
from nemo_bard.data.readers import input_files
from nemo_bard.launch.exits import PREEMPTION_SIGNALS
from nemo_bard.method.layout import check_anchor_block_size
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.job import Job, Place, Stage
from nemo_bard.pipeline.schema import SECTION, FollowingSettings, StageSettings
from nemo_bard.pipeline.start_stages import ConvertStage
from nemo_bard.pipeline.training import final_export, train
from nemo_bard.pipeline.world import World
from nemo_bard.train.config import check_batch_sizes, replicas_of, validate_recipe
from nemo_bard.train.recipe_file import load_recipe_class, read_yaml, translate

DATA_CACHE = "lengths"
"""Folder of a run directory for what is known of data sets: lengths of samples, and that they were checked."""
SHORT_KEYS = {
    "block_size": "model.block_size",
    "max_steps": "step_scheduler.max_steps",
    "global_batch_size": "step_scheduler.global_batch_size",
    "local_batch_size": "step_scheduler.local_batch_size",
    "ckpt_every_steps": "step_scheduler.ckpt_every_steps",
    "learning_rate": "optimizer.lr",
    "warmup_steps": "lr_scheduler.lr_warmup_steps",
}
"""Settings of a stage -> keys of its recipe."""
INIT_KEY = "model.pretrained_model_name_or_path"
ANCHOR_KEY = "anchor.pretrained_model_name_or_path"
OWN_KEYS = (
    INIT_KEY, ANCHOR_KEY, "checkpoint.checkpoint_dir", "checkpoint.enabled", "checkpoint.restore_from",
    "checkpoint.save_consolidated", "checkpoint.max_recent_checkpoints", "checkpoint.is_async",
    "step_scheduler.preemption_signal",
)  # fmt: skip
"""Keys of a recipe that the chain itself sets; ``overrides`` must not."""
NOT_COMPARED = (
    *(key for key in OWN_KEYS if not key.endswith("pretrained_model_name_or_path")),
    "checkpoint.max_recent_checkpoints", "dist_env", "wandb", "mlflow", "dataloader.num_workers",
    "dataloader.pin_memory", "dataloader.persistent_workers", "dataloader.prefetch_factor",
    "validation_dataloader.num_workers", "step_scheduler.local_batch_size", "step_scheduler.ckpt_every_steps",
    "step_scheduler.log_remote_every_steps", "step_scheduler.gc_every_steps", "step_scheduler.loss_average_window_steps",
    "distributed.dp_replicate_size", "distributed.defer_fsdp_grad_sync", "on_bad_sample",
)  # fmt: skip
"""Keys of a recipe that change how a stage runs but not what comes out; they may differ when a run goes on."""


@dataclass(frozen=True, kw_only=True)
class RecipeSettings(FollowingSettings):
    """A training stage; null means: as the recipe says."""

    recipe: str = setting(check=text(), help="shipped name or YAML file")
    data: bool = setting(True, flag(), "takes the keys of data.recipe")
    block_size: int | None = setting(None, integer(optional=True), "tokens denoised together; null: no blocks")
    max_steps: int | None = setting(None, integer(optional=True), "optimizer steps")
    global_batch_size: int | None = setting(None, integer(optional=True), "samples per step over all ranks")
    local_batch_size: int | None = setting(None, integer(optional=True), "samples per forward and rank")
    learning_rate: float | None = setting(None, number(optional=True), "of the optimizer")
    warmup_steps: int | None = setting(None, integer(0, optional=True), "in which the learning rate rises")
    ckpt_every_steps: int | None = setting(None, integer(optional=True), "steps between training checkpoints")
    overrides: dict[str, Any] = setting(factory=dict, check=SECTION, help="any other key of the recipe")


@dataclass(frozen=True, kw_only=True)
class DistillationSettings(RecipeSettings):
    """A training stage with a frozen anchor."""

    anchor: str | None = setting(
        None, text(optional=True), "earlier stage or BARD folder; null means the stage with the smallest blocks"
    )


@dataclass(frozen=True, kw_only=True)
class RecipeStage(Stage):
    """Trains with a recipe class of NeMo AutoModel's kind; a section with the key ``anchor`` distils."""

    Settings: ClassVar[type[StageSettings]] = RecipeSettings
    trains: ClassVar[bool] = True
    recipe: dict[str, Any]
    """Its final recipe as it stands in ``stage.yaml``: environment variables not filled in."""
    recipe_path: Path

    @classmethod
    def settings_for(cls, section: Mapping[str, Any]) -> type[StageSettings]:
        """With an anchor, where the section has that key."""
        return DistillationSettings if "anchor" in section else cls.Settings

    @classmethod
    def make(cls, settings: Any, place: Place) -> Self:
        """Build the stage and its final recipe."""
        inputs = {"init": settings.init or place.previous()}
        if isinstance(settings, DistillationSettings):
            inputs["anchor"] = settings.anchor or _smallest_blocks(place)
        common = cls.common(settings, place)
        path = find_recipe(settings.recipe)
        stage = cls(**common, inputs=inputs, block_size=settings.block_size, recipe=read_yaml(path), recipe_path=path)
        stage._fill_recipe(place)
        return stage

    def _fill_recipe(self, place: Place) -> None:
        """What the model, the data, the user and the chain say, in this order."""
        recipe, settings = self.recipe, self.settings
        merge(recipe, place.model.recipe or {})
        if settings.data:
            merge(recipe, place.chain.data.get("recipe") or {})
            validation = recipe.get("validation_dataset")
            if isinstance(validation, Mapping) and any(validation.get(key, "") is None for key in ("path", "spec")):
                recipe.pop("validation_dataset")
                recipe.pop("validation_dataloader", None)
        for key, dotted in SHORT_KEYS.items():
            if (value := getattr(settings, key)) is not None:
                merge(recipe, nested(dotted, value))
        for origin, extra in (("overrides", place.chain.overrides), (f"{place.where}.overrides", settings.overrides)):
            for dotted in leaves(extra):
                if dotted in OWN_KEYS or dotted == "recipe":
                    raise ValueError(f"{origin}.{dotted}: the chain sets this key itself; remove it")
            merge(recipe, extra)
        exports = {earlier.name: str(earlier.export) for earlier in place.before}
        own: dict[str, Any] = {
            INIT_KEY: exports.get(self.inputs["init"], self.inputs["init"]),
            "checkpoint.enabled": True,
            "checkpoint.checkpoint_dir": str(self.checkpoints),
            "checkpoint.save_consolidated": "final",
            "checkpoint.is_async": False,
            "checkpoint.max_recent_checkpoints": place.chain.keep_last,
            "step_scheduler.preemption_signal": list(PREEMPTION_SIGNALS),
        }
        packing = recipe.get("packing") or {}
        if packing.get("max_length") is not None and packing.get("cache_dir") is None:
            own["packing.cache_dir"] = str(place.run_dir / DATA_CACHE)  # one file serves all stages
        if "anchor" in self.inputs:
            own[ANCHOR_KEY] = exports.get(self.inputs["anchor"], self.inputs["anchor"])
        for dotted, value in own.items():
            merge(recipe, nested(dotted, value))

    # ------------------ what it is made from ------------------
    def reads(self) -> dict[str, Path]:
        """Files and folders of its data sets."""
        found = {}
        for section in ("dataset", "validation_dataset"):
            for name, path in input_files(self.recipe.get(section) or {}).items():
                found[section if name == "path" else f"{section}.{name}"] = path
        return found

    def compared(self) -> dict[str, Any]:
        """The recipe without what only changes how it runs."""
        return self.comparable({"recipe": translate(self.recipe)})

    def comparable(self, compared: Mapping[str, Any]) -> dict[str, Any]:
        """Leave out what only changes how a recipe runs, which earlier versions may have compared."""
        recipe = copy.deepcopy(compared["recipe"])
        for dotted in NOT_COMPARED:
            *parents, leaf = dotted.split(".")
            node: Any = recipe
            for name in parents:
                node = node.get(name) or {}
            if isinstance(node, dict):
                node.pop(leaf, None)
        return {**compared, "recipe": recipe}

    def shown(self) -> dict[str, Any]:
        """The final recipe."""
        return self.recipe

    def heading(self) -> str:
        """Which recipe file it is."""
        return f"# {self.recipe_path.name} with the overrides of this job\n"

    def title(self) -> str:
        """Block size, steps, batch and inputs."""
        steps = self.recipe["step_scheduler"]
        unit = "packed rows" if (self.recipe.get("packing") or {}).get("max_length") else "samples"
        text = f"{steps.get('max_steps') or '?'} steps of {steps['global_batch_size']} {unit}"
        if self.block_size:
            text = f"B = {self.block_size}, {text}"
        if "anchor" in self.inputs:
            text += f", anchor {self.inputs['anchor']}"
        return f"{text}, from {self.inputs['init']}"

    # ------------------ checks ------------------
    def check_inputs(self, job: Job) -> None:
        """Check that start and anchor are there, or come before, and are what is needed."""
        super().check_inputs(job)
        start = self.inputs["init"]
        if self.block_size is not None and start in job.names and job.stage(start).block_size is None:
            raise ValueError(
                f"stage.{self.name}.init: stage {self.name} needs a block-diffusion start, stage {start} is"
                " autoregressive; put a stage of kind convert between them"
            )
        if "anchor" in self.inputs and self.block_size is not None:
            self._check_anchor(self.inputs["anchor"], self.block_size, job)

    def _check_anchor(self, name: str, block_size: int, job: Job) -> None:
        where = f"stage.{self.name}.anchor={name}"
        if name in job.names:
            self.check_earlier("anchor", job)
            size = job.stage(name).block_size
            if size is None:
                raise ValueError(f"{where}: stage {name} is no block-diffusion stage")
        else:
            folder = Path(name)
            if not folder.is_dir():
                raise ValueError(f"{where} is neither an earlier stage nor a folder")
            if read_model_type(folder) != "bard_vl":
                raise ValueError(f"{where}: an anchor must be a BARD folder; make one with `nemo-bard convert` and PBM")
            size = int(json.loads((folder / "config.json").read_text())["block_size"])
        try:
            check_anchor_block_size(block_size, size)
            source = job.model.source
            if source and Path(source).is_dir() and Path(name).is_dir():
                from nemo_bard.train.swd import check_tokenizers

                check_tokenizers(source, name)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def check(self, job: Job) -> None:
        """Let the recipe class check the final recipe; inputs that are still to be made are stood in for."""
        raw = translate(self.recipe)
        try:
            recipe_class = load_recipe_class(self.recipe_path, raw)
            if not hasattr(recipe_class, "validate_config"):
                return
            paths = [job.input_path(name) for name in self.inputs.values()]
            if all(isinstance(path, Path) and path.is_dir() for path in paths):
                recipe_class.validate_config(raw)
                return
            with tempfile.TemporaryDirectory() as folder:
                stand_in = {"model_type": "bard_vl", "context_attention": _context_attention(self, job)}
                (Path(folder) / "config.json").write_text(json.dumps(stand_in))
                for use, dotted in (("init", INIT_KEY), ("anchor", ANCHOR_KEY)):
                    section, _, key = dotted.partition(".")
                    if use in self.inputs and not Path(str(job.input_path(self.inputs[use]))).is_dir():
                        raw[section] = {**raw[section], key: folder}
                # What needs the checkpoints themselves is checked when the stage starts.
                if isinstance(recipe_class, type) and issubclass(recipe_class, _pbm_recipe()):
                    validate_recipe(raw, with_anchor="anchor" in self.inputs)
                else:
                    recipe_class.validate_config(raw)
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from error

    def check_goes_on(self, begun: Mapping[str, Any], processes: int) -> None:
        """Check that processes and local batch are the same, for a recipe whose loader keeps a count per process.

        Raises:
            ValueError: Names both numbers.
        """
        if getattr(load_recipe_class(self.recipe_path, translate(self.recipe)), "any_ranks", False):
            return
        now = self.split(processes)
        for what, before in begun.items():
            if what in now and before != now[what]:
                raise ValueError(
                    f"stage {self.name} was begun with {what}={before}, now it is {now[what]}; its recipe,"
                    f" {self.recipe['recipe']}, would go on at another place of its data: set it back, or delete {self.folder}"
                )

    def split(self, processes: int) -> dict[str, int]:
        """How a global batch is split."""
        return {**super().split(processes), "local_batch_size": self.recipe["step_scheduler"]["local_batch_size"]}

    def check_processes(self, processes: int) -> None:
        """Check that local batches on all processes make up the global one, and that the processes can have replicas."""
        recipe = translate(self.recipe)
        steps = recipe["step_scheduler"]
        try:
            check_batch_sizes(steps["global_batch_size"], steps["local_batch_size"], processes)
            replicas_of(recipe.get("distributed") or {}, processes, processes)
        except ValueError as error:
            raise ValueError(f"stage {self.name}: {error}") from error

    # ------------------ work ------------------
    def begin(self) -> None:
        """Write ``stage.yaml``."""
        write_text(self.folder / manifest.STAGE_YAML, dump(self.recipe))

    def run(self, job: Job, world: World) -> bool:
        """Train from the newest whole checkpoint on, and link the final one's export."""
        if not train(self, self.recipe, world, job.run_dir / DATA_CACHE):
            return False
        world.on_main(self._link_export)
        return True

    def _link_export(self) -> None:
        source = final_export(self)
        assert source is not None
        manifest.link_export(source, self.export)


def _pbm_recipe() -> type:
    from nemo_bard.train.pbm import PBMRecipe

    return PBMRecipe


def _smallest_blocks(place: Place) -> str:
    trained = [(stage.block_size, stage.name) for stage in place.before if stage.trains and stage.block_size]
    if not trained:
        raise ValueError(f"{place.where}.anchor must be set: no earlier stage can be the anchor")
    return min(trained, key=lambda pair: pair[0])[1]


def _context_attention(stage: Stage, job: Job) -> str | None:
    """That of the start point that a stage comes from; None where that cannot be known yet."""
    while (name := stage.inputs.get("init", "")) in job.names:
        stage = job.stage(name)
        start = stage.inputs.get("init", "")
        if isinstance(stage, ConvertStage) and (start in job.names or not _is_bard_folder(start)):
            return stage.context_attention
    return read_object(Path(name) / CONFIG).get("context_attention", "block") if _is_bard_folder(name) else None


def _is_bard_folder(name: str) -> bool:
    return Path(name).is_dir() and read_model_type(name) == MODEL_TYPE


def dump(value: Mapping[str, Any]) -> str:
    """YAML in the order of keys."""
    return yaml.safe_dump(dict(value), sort_keys=False, default_flow_style=None, width=120)


def merge(recipe: dict[str, Any], extra: Mapping[str, Any]) -> None:
    """Merge ``extra`` into ``recipe``, in place: a section with ``_target_`` replaces, null removes a section."""
    for key, value in extra.items():
        old = recipe.get(key)
        if isinstance(value, Mapping) and isinstance(old, dict) and "_target_" not in value:
            merge(old, value)
        elif value is None and isinstance(old, Mapping):
            recipe.pop(key)
        else:
            recipe[key] = copy.deepcopy(dict(value) if isinstance(value, Mapping) else value)


def nested(dotted: str, value: object) -> dict[str, Any]:
    """Sections around a value, by its dotted key."""
    *parents, leaf = dotted.split(".")
    section: dict[str, Any] = {leaf: value}
    for name in reversed(parents):
        section = {name: section}
    return section


def leaves(node: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys of all values that are no sections."""
    names = []
    for name, value in node.items():
        names += leaves(value, f"{prefix}{name}.") if isinstance(value, Mapping) and value else [f"{prefix}{name}"]
    return names
