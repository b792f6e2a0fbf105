"""The stage kinds that make a start point without training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from nemo_bard.base.folders import read_model_type
from nemo_bard.base.settings import choice, flag, integer, setting
from nemo_bard.checkpoints.hub import check_hub_name, download
from nemo_bard.pipeline import manifest
from nemo_bard.pipeline.job import Job, Place, Stage
from nemo_bard.pipeline.schema import FollowingSettings, StageSettings
from nemo_bard.pipeline.world import World


@dataclass(frozen=True, kw_only=True)
class TinySettings(StageSettings):
    """A tiny Qwen3-VL with random weights."""

    evaluate: bool = setting(False, flag(), "whether its export is scored")
    seed: int = setting(0, integer(0), "of the weights")


@dataclass(frozen=True, kw_only=True)
class TinyStage(Stage):
    """Makes a tiny Qwen3-VL with random weights."""

    Settings: ClassVar[type[StageSettings]] = TinySettings

    def title(self) -> str:
        """What a run says when it comes to the stage."""
        return "a tiny Qwen3-VL with random weights"

    def write(self, folder: Path, job: Job) -> None:
        """Write the model."""
        del job
        from nemo_bard.checkpoints.tiny import make_tiny_qwen3_vl

        make_tiny_qwen3_vl(folder, seed=self.settings.seed)


@dataclass(frozen=True, kw_only=True)
class ConvertSettings(FollowingSettings):
    """A BARD folder made of a Qwen3-VL one, the weights unchanged."""

    evaluate: bool = setting(False, flag(), "whether its export is scored")
    block_size: int | None = setting(None, integer(optional=True), "null: of the first training stage after it")
    context_attention: str | None = setting(
        None,
        choice(("block", "causal"), optional=True),
        "attention among context blocks; null: model.context_attention",
    )


@dataclass(frozen=True, kw_only=True)
class ConvertStage(Stage):
    """Makes the start point: a BARD folder made of a Qwen3-VL one (``nemo-bard convert``), or a BARD folder as it is."""

    Settings: ClassVar[type[StageSettings]] = ConvertSettings
    mask_token_id: int | None
    context_attention: str
    is_model_source: bool
    """Whether ``model.source`` is what is converted."""

    @classmethod
    def make(cls, settings: Any, place: Place) -> Self:
        """Build the stage: it starts from ``init``, else ``model.source``, else the stage before."""
        source = settings.init or place.model.source
        return cls(
            **cls.common(settings, place),
            inputs={"init": source or place.previous()},
            block_size=settings.block_size or _first_block_size(place),
            mask_token_id=place.model.mask_token_id,
            context_attention=settings.context_attention or place.model.context_attention,
            is_model_source=source is not None and source == place.model.source,
        )

    def compared(self) -> dict[str, Any]:
        """Options of the conversion."""
        return {
            "mask_token_id": self.mask_token_id,
            "context_attention": self.context_attention,
            "block_size": self.block_size,
        }

    def title(self) -> str:
        """What a run says when it comes to the stage."""
        return "start point"

    def check_inputs(self, job: Job) -> None:
        """Check that the source is an earlier stage, a folder with weights, or a name on the Hub that can be had."""
        name = self.inputs["init"]
        if name in job.names:
            self.check_earlier("init", job)
        elif not Path(name).is_dir():
            check_hub_name(self._key, name)
        elif read_model_type(name) == "qwen3_vl":
            from nemo_bard.checkpoints.folder import weight_files

            weight_files(Path(name))

    @property
    def _key(self) -> str:
        return "model.source" if self.is_model_source else f"stage.{self.name}.init"

    def run(self, job: Job, world: World) -> bool:
        """Convert, or link a BARD folder."""
        world.on_main(lambda: self._convert(job))
        return True

    def _convert(self, job: Job) -> None:
        from nemo_bard.checkpoints.convert import convert

        name = self.inputs["init"]
        source = job.input_path(name)
        if not isinstance(source, Path):
            source = download(f"stage.{self.name}", name)
        if read_model_type(source) == "bard_vl":
            manifest.link_export(source, self.export)
            return
        convert(source, self.export, **self.compared(), overwrite=self.export.exists())


def _first_block_size(place: Place) -> int:
    for section in place.after:
        if (size := section.get("block_size")) is not None:
            return size
    raise ValueError(f"{place.where}.block_size must be set: no later stage has one")
