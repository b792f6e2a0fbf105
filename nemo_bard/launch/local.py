"""Starting a pipeline on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nemo_bard.launch.launchers import Launcher
from nemo_bard.launch.torchrun import count_processes, run_torchrun


class LocalLauncher(Launcher):
    """In this process, under one torchrun, or under one torchrun per stage."""

    def world_size(self, settings: Any, processes: int | None) -> int:
        """Return how many processes ``start`` starts."""
        return count_processes(processes if processes is not None else settings.processes)

    def start(
        self, settings: Any, stages: Sequence[str], config_path: Path, words: Sequence[str], processes: int | None
    ) -> int | None:
        """Run here and wait; None if one process is enough, the caller's."""
        processes = self.world_size(settings, processes)
        grace = settings.grace_seconds
        if settings.mode == "one_job":
            if processes == 1:
                return None
            return run_torchrun(processes, config_path, words, grace_seconds=grace, resumable=True)
        for stage in stages:
            part = [*words, f"--stage={stage}"]
            code = run_torchrun(processes, config_path, part, grace_seconds=grace, resumable=True)
            if code:
                return code
        return 0
