"""How far the work is: a bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 60.0


class Progress:
    """Counts bytes and rows; use as a context.

    Args:
        doing: What is done.
        total: Of the unit.
        unit: ``B`` or ``sample``.
        say: Gets lines for the user.
    """

    def __init__(self, doing: str, total: int, unit: str, say: Callable[[str], None]) -> None:
        self.doing, self.total, self.unit, self._say = doing, total, unit, say
        self.done = self._new = self.rows = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar = tqdm(
            total=self.total,
            desc=self.doing,
            unit=self.unit,
            unit_scale=True,
            dynamic_ncols=True,
            disable=None,  # only on a terminal
            file=sys.stderr,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, amount: int, rows: int) -> None:
        """Count what an earlier run has done."""
        self.done += amount
        self.rows += rows
        if not self._bar.disable:
            self._bar.initial += amount
            self._bar.update(amount)

    def update(self, amount: int, rows: int) -> None:
        """Count what has been done now."""
        self.done += amount
        self._new += amount
        self.rows += rows
        self._bar.update(amount)

    def tell(self, counts: str) -> None:
        """Show counts, and say how far the work is if that was long ago and there is no bar."""
        self._bar.set_postfix_str(f"{self.rows:,} rows, {counts}", refresh=False)
        now = time.monotonic()
        if self._bar.disable and now - self._said >= LINE_SECONDS:
            self._said = now
            speed = self._new / (now - self._began)
            left = f", about {(self.total - self.done) / speed / 60:.0f} min left" if speed else ""
            rate = f"{speed / 1e6:.1f} MB/s" if self.unit == "B" else f"{speed:.0f} {self.unit}s/s"
            part = 100 * self.done / max(self.total, 1)
            self.say(f"{self.doing}: {part:.1f} %, {self.rows:,} rows, {counts}, {rate}{left}")

    def say(self, line: str) -> None:
        """Say a line above the bar."""
        if self._bar.disable:
            self._say(line)
        else:
            self._bar.write(line, file=sys.stderr)
