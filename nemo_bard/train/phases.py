"""The noise of every optimizer step of a run, and what the log says when it changes."""

from __future__ import annotations

import logging
from itertools import pairwise
from typing import Any

from nemo_bard.method.schedule import NoiseSchedule, NoiseSettings

logger = logging.getLogger(__name__)


class NoiseOfRun:
    """Follows a schedule through a run and says where a phase begins.

    Args:
        schedule: Of the recipe's ``noise`` section.
        is_main: Whether this rank writes the log.
    """

    def __init__(self, schedule: NoiseSchedule, *, is_main: bool) -> None:
        self.schedule, self.is_main = schedule, is_main
        self.phase: int | None = None
        """Number of the phase of the last step that was asked for."""

    def at(self, step: int, total_steps: int) -> NoiseSettings:
        """Noise of a step (counted from 0) of a run of ``total_steps``."""
        number, noise = self.schedule.at(step, total_steps)
        if number != self.phase and len(self.schedule.phases) > 1 and self.is_main:
            edges = self.schedule.first_steps(total_steps)
            empty = [i for i, (a, b) in enumerate(pairwise(edges)) if a == b]
            if self.phase is None and empty:
                logger.warning("noise.schedule: phases %s have no step in a run of %d steps", empty, total_steps)
            logger.info(
                "step %d: phase %d of noise.schedule, to step %d: %s",
                step,
                number,
                edges[number + 1] - 1,
                self.schedule.phases[number],
            )
        self.phase = number
        return noise

    def facts(self, noise: NoiseSettings) -> dict[str, Any]:
        """What is logged of a step; nothing if there is one phase."""
        if len(self.schedule.phases) == 1:
            return {}
        levels = noise.levels()
        return {"noise_phase": self.phase, "noise_low": levels.low, "noise_high": levels.high}
