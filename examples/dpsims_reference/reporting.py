"""What a training loop shows and logs; silent on all processes but the first."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType
from typing import Any

from dpsims_reference.logs import ProgressBar, RunLog


class Report:
    """The log and the progress bar of a run.

    Args:
        folder: The run's folder.
        last: Number of steps of the run.
        first_step: The step that the run continues from.
        active: Whether to write and to show anything.
    """

    def __init__(
        self, folder: Path, last: int, *, first_step: int = 0, active: bool = True
    ) -> None:
        self._log = RunLog(folder, first_step=first_step) if active else None
        self._bar = ProgressBar(last, first_step=first_step) if active else None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Report:
        if self._log is not None:
            self._stack.callback(self._log.close)
        if self._bar is not None:
            self._stack.enter_context(self._bar)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def step(self, record: dict[str, float]) -> None:
        """Log and show one finished step."""
        if self._log is not None and self._bar is not None:
            self._log.write(record)
            self._bar.advance(record)

    def numbers(self, name: str, numbers: dict[str, float], step: int) -> None:
        """Log the numbers of a step that are no losses."""
        if self._log is not None:
            self._log.numbers(name, numbers, step)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Show an ``(H, W, 3)`` picture in TensorBoard."""
        if self._log is not None:
            self._log.picture(name, pixels, step)
