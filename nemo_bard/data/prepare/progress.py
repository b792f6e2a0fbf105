"""How far the work is: a bar on a terminal, a line from time to time elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

LINE_SECONDS = 60.0


class Progress:
    """Counts samples, and bytes that were written; use as a context.

    Args:
        doing: What is done.
        total: Rows or samples.
        unit: ``row`` or ``sample``.
        say: Gets lines for the user.
    """

    def __init__(self, doing: str, total: int, unit: str, say: Callable[[str], None]) -> None:
        self.doing, self.total, self.unit, self._say = doing, total, unit, say
        self.done = self._new = self._bytes = 0
        self._began = self._said = time.monotonic()

    def __enter__(self) -> Progress:
        self._bar = tqdm(
            total=self.total,
            desc=self.doing,
            unit=self.unit,
            dynamic_ncols=True,
            disable=None,  # only on a terminal
            file=sys.stderr,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def skip(self, number: int) -> None:
        """Count what needs not be done, or was done by an earlier run."""
        self.done += number
        if not self._bar.disable:
            self._bar.initial += number
            self._bar.update(number)

    def update(self, number: int, size: int = 0) -> None:
        """Count what has been done now."""
        self.done += number
        self._new += number
        self._bytes += size
        self._bar.update(number)

    def tell(self, counts: str) -> None:
        """Show counts, and say how far the work is if that was long ago and there is no bar."""
        now = time.monotonic()
        spent = max(now - self._began, 1e-9)
        if self._bytes:
            counts += f", {self._bytes / spent / 1e6:.1f} MB/s written"
        self._bar.set_postfix_str(counts, refresh=False)
        if self._bar.disable and now - self._said >= LINE_SECONDS:
            self._said = now
            speed = self._new / spent
            left = f", about {(self.total - self.done) / speed / 60:.0f} min left" if speed else ""
            part = 100 * self.done / max(self.total, 1)
            self.say(
                f"{self.doing}: {self.done:,} of {self.total:,} {self.unit}s ({part:.1f} %){counts and f', {counts}'},"
                f" {speed:.0f} {self.unit}s/s{left}"
            )

    def say(self, line: str) -> None:
        """Say a line above the bar."""
        if self._bar.disable:
            self._say(line)
        else:
            self._bar.write(line, file=sys.stderr)
