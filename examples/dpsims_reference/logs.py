"""What a run tells: a progress bar, ``log.jsonl`` and TensorBoard."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class RunLog:
    """Append a record per step to ``log.jsonl`` and to TensorBoard.

    A log that cannot be written warns once and stays silent: it never stops a training run.

    Args:
        folder: The run's folder.
        first_step: Records from this step on are dropped from an existing log: the run that
            continues from here writes them again.
    """

    def __init__(self, folder: Path, *, first_step: int = 0) -> None:
        from torch.utils.tensorboard.writer import SummaryWriter

        self.path = folder / "log.jsonl"
        kept = [record for record in read_log(self.path) if record["step"] < first_step]
        folder.mkdir(parents=True, exist_ok=True)
        self._file = self.path.open("w", encoding="utf-8")
        for record in kept:
            self._file.write(json.dumps(record) + "\n")
        self._board = SummaryWriter(
            str(folder / "tensorboard"), purge_step=first_step if first_step else None
        )
        self._failed = False

    def write(self, record: dict[str, float]) -> None:
        """Append ``record``, which holds ``step`` and numbers by name."""
        if self._failed:
            return
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            for name, value in record.items():
                if name != "step":
                    self._board.add_scalar(name, value, int(record["step"]))
        except OSError as error:
            self._failed = True
            warnings.warn(f"logging stops, the training goes on: {error}", stacklevel=2)

    def numbers(self, name: str, numbers: dict[str, float], step: int) -> None:
        """Append the numbers of some step to ``<name>.jsonl`` and to TensorBoard.

        Records of this step and later ones, left by the run that this one continues, are dropped.
        """
        if self._failed:
            return
        path = self.path.with_name(f"{name}.jsonl")
        try:
            kept = [record for record in read_log(path) if record["step"] < step]
            lines = [json.dumps(record) for record in [*kept, {"step": float(step)} | numbers]]
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            for key, value in numbers.items():
                self._board.add_scalar(f"{name}/{key}", value, step)
        except OSError as error:
            self._failed = True
            warnings.warn(f"logging stops, the training goes on: {error}", stacklevel=2)

    def picture(self, name: str, pixels: Any, step: int) -> None:
        """Show an ``(H, W, 3)`` picture in TensorBoard."""
        self._board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Flush everything to disk."""
        self._file.close()
        self._board.close()


def read_log(path: Path) -> list[dict[str, float]]:
    """The records of a ``log.jsonl``; a torn last line, left by a crash, is skipped."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


class ProgressBar:
    """Step, losses and time left, on one line. Plain lines when the output is not a terminal."""

    def __init__(self, total: int, *, first_step: int = 0, every: int = 50) -> None:
        self._console = Console()
        self._total, self._step, self._every = total, first_step, every
        self._progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._progress.add_task("", total=total, completed=first_step, losses="")

    def __enter__(self) -> ProgressBar:
        self._progress.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.__exit__(kind, error, trace)

    def advance(self, record: dict[str, float]) -> None:
        """Show one finished step."""
        self._step += 1
        losses = "  ".join(
            f"{name} {value:.3f}" for name, value in record.items() if name[:2] in ("d_", "g_")
        )
        self._progress.update(self._task, completed=self._step, losses=losses)
        plain = not self._console.is_terminal
        if plain and (self._step % self._every == 0 or self._step == self._total):
            pace = record["seconds"] / max(self._step, 1)
            left = pace * (self._total - self._step)
            self._console.print(f"step {self._step}/{self._total}  {losses}  {left:.0f} s left")
