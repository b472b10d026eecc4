"""The loop of a run: batches, steps, and between them log, pictures, diagnoses, checkpoints."""

from __future__ import annotations

import contextlib
import time
import warnings
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from dpsims.errors import CheckpointError, NonFiniteError
from dpsims_reference.batches import Batch, train_batches
from dpsims_reference.crash import Networks, dump_crash
from dpsims_reference.diagnosis import diagnose_networks
from dpsims_reference.figures import save_image
from dpsims_reference.probes import sample_grid
from dpsims_reference.reporting import Report
from dpsims_reference.signals import StopRequested, StopSignals

if TYPE_CHECKING:
    from dpsims_reference.trainer import Trainer

# regular checkpoints in a row that may fail before the run ends
_FAILED_SAVES = 3


class Schedule(NamedTuple):
    """When a run does what else than train."""

    save_every: int
    """Steps between checkpoints."""
    picture_every: int
    """Steps between sample grids."""
    diagnose_every: int
    """Steps between diagnoses; 0 for none."""
    max_seconds: float | None
    """Training time after which the run stops as if it were done."""


class Loop:
    """One call of :meth:`Trainer.run`, between its preparation and its last checkpoint."""

    def __init__(self, trainer: Trainer, schedule: Schedule, stop: StopSignals) -> None:
        self.trainer, self.schedule, self.stop = trainer, schedule, stop
        self.parallel = trainer.parallel
        # a process that left the others while it waits would leave them waiting
        self.alone = self.parallel.world_size == 1
        self._failed_saves = 0

    def run(self) -> None:
        """Train until the last step, a signal or the end of the time."""
        trainer, stop = self.trainer, self.stop
        last = trainer.config.optim.steps
        report = Report(trainer.folder, last, first_step=trainer.step, active=trainer.is_first)
        batches = train_batches(
            trainer.dataset, trainer.config, first_step=trainer.step, shard=self.parallel.shard
        )
        waiting = stop.waiting if self.alone else contextlib.nullcontext
        started = time.perf_counter() - trainer.seconds
        stopping = stop.requested is not None
        try:
            with report:
                while trainer.step < last and not stopping:
                    with waiting():
                        batch = next(batches).to(trainer.device)
                    stopping = self._step(batch, report, started)
                    # a signal during a save; many processes agree after the next step
                    stopping = stopping or (self.alone and stop.requested is not None)
        except StopRequested:
            pass
        finally:
            # ends the loader's processes before anything is saved
            batches.close()

    def _step(self, batch: Batch, report: Report, started: float) -> bool:
        """One step and what is due after it; whether any process wants to stop."""
        trainer = self.trainer
        terms = self._updated(batch)
        trainer.ema.update(trainer.generator)
        trainer.seconds = time.perf_counter() - started
        limit = self.schedule.max_seconds
        late = limit is not None and trainer.seconds >= limit
        terms, stopping = self._agreed(terms, late or self.stop.requested is not None)
        record = {"step": float(trainer.step), "seconds": trainer.seconds}
        record |= {name: float(value) for name, value in terms.items()}
        trainer.step += 1
        report.step(record)
        trainer.best.observe(record)
        self._between_steps(report)
        return stopping

    def _between_steps(self, report: Report) -> None:
        step, (save_every, picture_every, diagnose_every, _) = self.trainer.step, self.schedule
        if step % picture_every == 0:
            self._picture(report)
        if diagnose_every and step % diagnose_every == 0:
            self._diagnose(report)
        if step % save_every == 0 and step < self.trainer.config.optim.steps:
            with self.stop.saving():
                self.save()

    def _updated(self, batch: Batch) -> dict[str, Tensor]:
        """One step; where it fails, the state is written beside the run."""
        trainer = self.trainer
        try:
            return trainer.update(batch, trainer.step)
        except NonFiniteError as error:
            networks = Networks(
                trainer.generator, trainer.discriminator, trainer.objective, trainer.config
            )
            raise dump_crash(trainer.folder, networks, batch, trainer.step, error) from error

    def _agreed(self, terms: dict[str, Tensor], stopping: bool) -> tuple[dict[str, Tensor], bool]:
        """The terms' means, and whether any process wants to stop, in one message."""
        flag = torch.tensor(float(stopping), device=self.parallel.device)
        terms = self.parallel.mean(terms | {"stopping": flag})
        return terms, bool(terms.pop("stopping"))

    def _picture(self, report: Report) -> None:
        trainer = self.trainer
        model = trainer.averaged_generator()
        if not trainer.is_first:
            return
        grid = sample_grid(model, trainer.dataset, trainer.config)
        save_image(trainer.folder / "samples" / f"step-{trainer.step:08d}.png", grid)
        report.picture("samples", grid, trainer.step)

    def _diagnose(self, report: Report) -> None:
        trainer = self.trainer
        found = diagnose_networks(
            trainer.generator, trainer.discriminator, trainer.dataset, trainer.config
        )
        report.numbers("diagnosis", found.numbers(), trainer.step)

    def save(self, *, last: bool = False) -> None:
        """Judge and save; a disk that refuses ends the run only if it goes on refusing."""
        trainer = self.trainer
        before = trainer.best.state()
        trainer.best.judge(trainer.step, trainer.averaged_generator)
        try:
            trainer.save()
            self._failed_saves = 0
        except CheckpointError as error:
            trainer.best.load(before)
            self._failed_saves += 1
            if last or self._failed_saves >= _FAILED_SAVES:
                raise
            text = f"Trainer: no checkpoint of step {trainer.step}, the training goes on: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
