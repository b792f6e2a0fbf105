"""A composed configuration as a chain of stages, and what a stage is.

Everything that can be wrong with a chain before it runs is found here, in the stage kinds or in ``checks``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from nemo_bard.base.errors import nearest, not_one_of
from nemo_bard.base.files import sync_folder, sync_tree, write_whole
from nemo_bard.base.registry import Registry
from nemo_bard.launch.launchers import LAUNCHERS, LaunchSettings
from nemo_bard.pipeline.schema import (
    ChainSettings,
    DataSettings,
    EvaluationSettings,
    FollowingSettings,
    ModelSettings,
    StageSettings,
    read_section,
)
from nemo_bard.pipeline.world import World

RUN_DIR = "<run_dir>"
"""Stands for the run directory in what is compared between runs, so that a run directory can be moved."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a stage stands in its chain, for ``Stage.make``."""

    name: str
    run_dir: Path
    chain: ChainSettings
    model: ModelSettings
    before: Sequence[Stage]
    """Stages before it."""
    after: Sequence[Mapping[str, Any]]
    """Sections of the stages after it."""

    @property
    def where(self) -> str:
        """Its section."""
        return f"stage.{self.name}"

    def previous(self) -> str:
        """Name of the stage before.

        Raises:
            ValueError: If there is none.
        """
        if not self.before:
            raise ValueError(
                f"{self.where} is the first stage and needs a start: set model.source or {self.where}.init"
            )
        return self.before[-1].name

    def block_size_of(self, name: str) -> int | None:
        """Block size of an earlier stage; None for anything else."""
        return next((stage.block_size for stage in self.before if stage.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a chain; every kind is a subclass.

    A kind of a package's own overrides ``write`` (or ``run``, if all processes have work to do), and what else differs. It
    becomes known by an entry point of the group ``nemo_bard.stages``, or by its dotted name as ``kind``.
    """

    Settings: ClassVar[type[StageSettings]] = FollowingSettings
    """Its section; with the kind ``k``, ``conf/stage/k.yaml`` may be just ``kind: k``."""
    trains: ClassVar[bool] = False
    """Whether it trains with blocks, which grow along a chain."""

    name: str
    kind: str
    folder: Path
    settings: Any
    """An instance of ``Settings``."""
    inputs: dict[str, str] = field(default_factory=dict)
    """What it reads, by use (``init``, ``anchor``): the name of an earlier stage, a folder, or a Hugging Face name."""
    block_size: int | None = None
    """Of the model that it hands on; None: it reads token by token."""

    # ------------------ from the configuration ------------------
    @classmethod
    def settings_for(cls, section: Mapping[str, Any]) -> type[StageSettings]:
        """The class of the stage's settings, which may depend on what its section says."""
        del section
        return cls.Settings

    @classmethod
    def make(cls, settings: Any, place: Place) -> Self:
        """Build the stage; one that starts from another stage has its block size.

        Raises:
            ValueError: If it has no start.
        """
        inputs = {}
        if isinstance(settings, FollowingSettings):
            inputs["init"] = settings.init or place.previous()
        return cls(**cls.common(settings, place), inputs=inputs, block_size=place.block_size_of(inputs.get("init", "")))

    @staticmethod
    def common(settings: Any, place: Place) -> dict[str, Any]:
        """The fields that are the same for all kinds."""
        folder = place.run_dir / (settings.output or place.name)
        return {"name": place.name, "kind": settings.kind, "folder": folder, "settings": settings}

    # ------------------ files ------------------
    @property
    def evaluate(self) -> bool:
        """Whether its export is scored."""
        return self.settings.evaluate

    @property
    def export(self) -> Path:
        """The Hugging Face folder that the stage hands on."""
        return self.folder / "export"

    @property
    def checkpoints(self) -> Path:
        """Folder of training checkpoints and metrics."""
        return self.folder / "checkpoints"

    def reads(self) -> dict[str, Path]:
        """Files and folders that it reads besides its inputs, by use."""
        return {}

    # ------------------ what it is made from ------------------
    def compared(self) -> dict[str, Any]:
        """What its result depends on besides its inputs: all settings that are its kind's own."""
        common = {one.name for one in dataclasses.fields(FollowingSettings)}
        return {name: value for name, value in dataclasses.asdict(self.settings).items() if name not in common}

    def split(self, processes: int) -> dict[str, int]:
        """What ``started.json`` says of how the work is split; may change when a stage goes on, see ``check_goes_on``."""
        return {"processes": processes}

    def comparable(self, compared: Mapping[str, Any]) -> dict[str, Any]:
        """What ``compared`` of an earlier version said, without what no longer counts."""
        return dict(compared)

    def shown(self) -> dict[str, Any]:
        """What ``--cfg`` prints of it."""
        return {"kind": self.kind, "inputs": self.inputs, **self.compared()}

    def heading(self) -> str:
        """A line that ``--cfg`` prints before it, if any."""
        return ""

    def title(self) -> str:
        """What a run says when it comes to the stage."""
        return ", ".join([self.kind, *(f"from {value}" for use, value in self.inputs.items() if use == "init")])

    # ------------------ checks ------------------
    def check_goes_on(self, begun: Mapping[str, Any], processes: int) -> None:
        """Check that the stage can go on in so many processes; ``begun`` is its ``started.json``.

        Raises:
            ValueError: Names what must not change.
        """

    def check_inputs(self, job: Job) -> None:
        """Check, quickly, that what it reads is there.

        Raises:
            ValueError: If its start is neither an earlier stage nor a folder.
        """
        name = self.inputs.get("init")
        if name is None:
            return
        if name in job.names:
            self.check_earlier("init", job)
        elif not Path(name).is_dir():
            raise ValueError(f"stage.{self.name}.init={name} is neither an earlier stage nor a folder")

    def check_earlier(self, use: str, job: Job) -> None:
        """Check that an input that is a stage comes before this one.

        Raises:
            ValueError: If it does not.
        """
        name = self.inputs[use]
        if job.names.index(name) >= job.names.index(self.name):
            raise ValueError(f"stage.{self.name}.{use}={name} must be an earlier stage of order={job.names}")

    def check(self, job: Job) -> None:
        """Check everything that can be known before it runs; inputs that other stages make need not be there.

        Raises:
            ValueError: One line that names the stage, the key, its value and what is allowed.
        """

    def check_processes(self, processes: int) -> None:
        """Check that it can run in so many processes.

        Raises:
            ValueError: If it cannot.
        """

    # ------------------ work ------------------
    def begin(self) -> None:
        """Write, on rank 0, what its folder holds from the start."""

    def run(self, job: Job, world: World) -> bool:
        """Bring it to its end, from wherever it was left; all processes call this.

        Returns:
            Whether the export is there; False if a signal came first and everything is saved.
        """
        world.on_main(lambda: self._write_whole(job))
        return True

    def _write_whole(self, job: Job) -> None:
        with write_whole(self.export) as folder:
            self.write(folder, job)
            sync_tree(folder)
        sync_folder(self.export.parent)

    def write(self, folder: Path, job: Job) -> None:
        """Write the export; only rank 0 calls this.

        Args:
            folder: An empty folder, which becomes ``export`` if nothing goes wrong.
            job: The chain; ``job.input_path(self.inputs["init"])`` is the folder to start from.
        """
        raise NotImplementedError(f"{type(self).__name__} has neither write nor run")


def _check_kind(name: str, thing: Any) -> None:
    if not (isinstance(thing, type) and issubclass(thing, Stage)):
        raise ValueError(f"stage kind: {name} must be a class derived from nemo_bard.pipeline.Stage")


STAGE_KINDS: Registry[type[Stage]] = Registry(
    "stage kind",
    "nemo_bard.stages",
    {
        "recipe": "nemo_bard.pipeline.recipe_stage.RecipeStage",
        "convert": "nemo_bard.pipeline.start_stages.ConvertStage",
        "tiny": "nemo_bard.pipeline.start_stages.TinyStage",
    },
    check=_check_kind,
)
"""``kind`` -> class."""


def find_kind(name: str, section: Mapping[str, Any]) -> type[Stage]:
    """The class of a stage's kind.

    Raises:
        ValueError: If there is no such kind (the nearest one is named), or it cannot be imported.
    """
    kind = section.get("kind")
    if kind not in STAGE_KINDS and not (isinstance(kind, str) and "." in kind):
        raise not_one_of(f"stage.{name}.kind", kind, STAGE_KINDS)
    return STAGE_KINDS.get(kind)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A chain, ready to be checked and run."""

    name: str
    run_dir: Path
    stages: tuple[Stage, ...]
    allow_version_change: bool
    evaluation: EvaluationSettings
    model: ModelSettings
    launch: LaunchSettings
    config: dict[str, Any]
    """The composed configuration."""

    @property
    def names(self) -> list[str]:
        """Names of the stages, in order."""
        return [stage.name for stage in self.stages]

    def stage(self, name: str) -> Stage:
        """Return the stage ``name``; ValueError if there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"no stage {name!r} in this chain; stages: {', '.join(self.names)}")

    def input_path(self, value: str) -> Path | str:
        """Turn an input of a stage into a folder: an earlier stage's export, else what it is."""
        if value in self.names:
            return self.stage(value).export
        return Path(value) if Path(value).is_dir() else value


def make_job(config: Mapping[str, Any]) -> Job:
    """Read a composed configuration.

    Raises:
        ValueError: One line naming the key, its value and what is allowed.
    """
    chain = read_section(ChainSettings, config, "")
    for name in chain.order:
        if name not in chain.stage:
            near = nearest(name, chain.stage)
            hint = f", did you mean {near}?" if near else ""
            raise ValueError(f"order: no stage {name!r}{hint}; stages: {', '.join(chain.stage)}")
        if not isinstance(chain.stage[name], Mapping):
            raise ValueError(f"stage.{name} must be a section, got {chain.stage[name]!r}")
        if chain.order.count(name) > 1:
            raise ValueError(f"order: stage {name} is there twice, and would write one directory twice")
    model = read_section(ModelSettings, chain.model, "model")
    known = [one.name for one in dataclasses.fields(DataSettings)]
    read_section(DataSettings, {key: value for key, value in chain.data.items() if key in known}, "data")
    launcher = LAUNCHERS.get(chain.launch.get("name"))
    launch = read_section(launcher.Settings, chain.launch, "launch")
    launcher().check(launch)
    run_dir = Path(chain.run_dir).absolute()
    built: list[Stage] = []
    for index, name in enumerate(chain.order):
        section = chain.stage[name]
        kind = find_kind(name, section)
        settings = read_section(kind.settings_for(section), section, f"stage.{name}")
        after = [chain.stage[later] for later in chain.order[index + 1 :]]
        place = Place(name=name, run_dir=run_dir, chain=chain, model=model, before=tuple(built), after=after)
        built.append(kind.make(settings, place))
    _check_outputs(built, run_dir)
    return Job(
        name=chain.name,
        run_dir=run_dir,
        stages=tuple(built),
        allow_version_change=chain.allow_version_change,
        evaluation=read_section(EvaluationSettings, chain.evaluation, "evaluation"),
        model=model,
        launch=launch,
        config=dict(config),
    )


def _check_outputs(stages: list[Stage], run_dir: Path) -> None:
    for index, stage in enumerate(stages):
        if run_dir not in stage.folder.resolve().parents and run_dir.resolve() not in stage.folder.resolve().parents:
            raise ValueError(f"stage.{stage.name}.output: {stage.folder} is not below run_dir {run_dir}")
        for other in stages[:index]:
            a, b = stage.folder.resolve(), other.folder.resolve()
            if a == b or a in b.parents or b in a.parents:
                raise ValueError(f"stages {other.name} and {stage.name} would write one directory: {a}")
