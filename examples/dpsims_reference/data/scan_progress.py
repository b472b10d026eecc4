"""How far a scan of label maps is, on one line."""

from __future__ import annotations

import sys
import time


class ScanProgress:
    """Print the progress of :func:`dpsims.data.class_presence`: what is done, pace, time left.

    Args:
        every: Seconds between two lines. ``None`` means 0.5 on a terminal, where one line is
            written over, and 10 elsewhere.

    Source:
        Not from the paper: the reference trainer's own output.
    """

    def __init__(self, *, every: float | None = None) -> None:
        self.terminal = sys.stdout.isatty()
        self.every = (0.5 if self.terminal else 10.0) if every is None else every
        self._start: tuple[float, int] | None = None
        self._last = 0.0
        self._printed = False

    def __call__(self, done: int, total: int) -> None:
        """Tell that ``done`` of ``total`` maps are read."""
        now = time.monotonic()
        if self._start is None:
            # a resumed scan does not begin at 0
            self._start, self._last = (now, done), now
        finished = done == total and self._printed
        if now - self._last < self.every and not finished:
            return
        began, first = self._start
        pace = (done - first) / max(now - began, 1e-9)
        left = (total - done) / max(pace, 1e-9)
        line = f"reading label maps: {done}/{total}  {pace:.0f} per second  {left:.0f} s left"
        ends = "\n" if finished or not self.terminal else ""
        print(f"\r{line:<78}" if self.terminal else line, end=ends, flush=True)
        self._last, self._printed = now, True
