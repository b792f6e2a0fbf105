"""The ways to start a pipeline: ``launch.name`` picks one, and each has its own settings.

A launcher from outside is a class like ``Launcher`` in the entry point group ``nemo_bard.launchers``, or a dotted name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from nemo_bard.base.registry import Registry
from nemo_bard.base.settings import check_settings, choice, flag, integer, setting

MODES = ("one_job", "per_stage")
REHEARSAL_GRACE = 30
"""Seconds that the workers of a rehearsal have after a signal: nothing of theirs is kept."""


@dataclass(frozen=True, kw_only=True)
class LaunchSettings:
    """The ``launch`` section, as far as it is the same for all launchers."""

    name: str = setting(check=choice(lambda: LAUNCHERS.names(), dotted=True), help="how the processes are started")
    mode: str = setting(
        "one_job", choice(MODES), "all stages in one process group, or a torchrun per stage with the same results"
    )
    processes: int | None = setting(
        None, integer(optional=True), "per machine; null: one per GPU, 1 without GPUs (Slurm: gpus_per_node)"
    )
    timeout_minutes: int = setting(60, integer(), "of a collective operation, waiting for other ranks included")
    grace_seconds: int = setting(600, integer(), "time to save after a signal, before workers are killed")
    rehearse: bool = setting(
        False, flag(), "run the chain in a few minutes instead: two steps per stage, measured, in a scratch folder"
    )


class Launcher:
    """One way to start a pipeline."""

    Settings: ClassVar[type[LaunchSettings]] = LaunchSettings
    """The ``launch`` section."""
    elsewhere: ClassVar[bool] = False
    """Whether the workers start later, and on other machines."""

    def check(self, settings: Any) -> None:
        """Check what one setting alone cannot tell.

        Raises:
            ValueError: One line naming the key, its value and what is allowed.
        """
        check_settings(settings, "launch")

    def world_size(self, settings: Any, processes: int | None) -> int:
        """Return how many processes there will be, of all nodes; checks what it reads.

        Args:
            settings: An instance of ``Settings``.
            processes: ``--nproc-per-node``; the section's if None.

        Raises:
            ValueError: If there cannot be as many.
        """
        raise NotImplementedError

    def start(
        self, settings: Any, stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
    ) -> int | None:
        """Start everything and wait, or submit it.

        Args:
            settings: An instance of ``Settings``.
            stages: Names to pass as ``--stage`` with ``mode: per_stage``, in order.
            config_path: The pipeline's recipe YAML.
            words: The command line after it.
            processes: ``--nproc-per-node``; the section's if None.

        Returns:
            The exit code, or None if the caller is to go on in its own process.

        Raises:
            ValueError: For wrong values; nothing is started then.
        """
        raise NotImplementedError

    def rehearsal(self, settings: Any, scratch: Path) -> Any:
        """Return the settings that a rehearsal is started with.

        Args:
            settings: Those of the real run, an instance of ``Settings``.
            scratch: The folder that the rehearsal works in, to be removed at its end, whatever that is.
        """
        del scratch
        return replace(settings, mode="one_job", grace_seconds=min(settings.grace_seconds, REHEARSAL_GRACE))

    def state_folders(self, settings: Any) -> list[Path]:
        """Folders of its own that may lie in a run directory before the run begins."""
        del settings
        return []


def _check_launcher(name: str, thing: Any) -> None:
    if not (isinstance(thing, type) and issubclass(thing, Launcher)):
        raise ValueError(f"launch.name: {name} must be a class derived from nemo_bard.launch.launchers.Launcher")


LAUNCHERS: Registry[type[Launcher]] = Registry(
    "launch.name",
    "nemo_bard.launchers",
    {"local": "nemo_bard.launch.local.LocalLauncher", "slurm": "nemo_bard.launch.slurm.SlurmLauncher"},
    check=_check_launcher,
)
"""``launch.name`` -> class."""
