"""The training loop, on one device or many: log, pictures, checkpoints, resume."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dpsims._checks import check_int
from dpsims.errors import CheckpointError, NonFiniteError
from dpsims.nn.norm import BatchNorm2d
from dpsims_reference.batches import Batch, local_batch_size, train_batches
from dpsims_reference.best import BestFigure
from dpsims_reference.checkpoints import Checkpoint, CheckpointStore
from dpsims_reference.config import Config
from dpsims_reference.cpu import warn_of_bfloat16
from dpsims_reference.crash import Networks, dump_crash
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.diagnosis import diagnose_networks
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.ema import GeneratorEMA
from dpsims_reference.figures import save_image
from dpsims_reference.generator import build_generator
from dpsims_reference.networks import ImageGenerator
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import Parallel
from dpsims_reference.probes import calibrate_, recalibrate_, sample_grid, scan_labels
from dpsims_reference.randomness import build_seeded
from dpsims_reference.reporting import Report
from dpsims_reference.resume import CHECKPOINTS, captured, restore_
from dpsims_reference.signals import StopRequested, StopSignals
from dpsims_reference.steps import TrainingStep

# regular checkpoints in a row that may fail before the run ends
_FAILED_SAVES = 3

M = TypeVar("M", bound=nn.Module)


class Trainer:
    """Everything that one run holds, and its loop.

    Args:
        config: The run.
        dataset: The training images.
        folder: Where the log, the pictures and the checkpoints go.
        device: Where the networks live.
        parallel: The processes that share the run; ``None`` is this one alone, on ``device``. All
            of them build a trainer and call the same methods; the first one alone writes.
        shard_backbones: Whether the processes share the frozen networks' weights (FSDP).
        keep: How many checkpoints stay, beside the best one.
        best: Judges which checkpoint is the best one; ``None`` judges nothing.
    """

    def __init__(
        self,
        config: Config,
        dataset: ImageDataset,
        folder: Path,
        *,
        device: str = "cpu",
        parallel: Parallel | None = None,
        shard_backbones: bool = False,
        keep: int = 2,
        best: BestFigure | None = None,
    ) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.parallel = Parallel(device) if parallel is None else parallel
        self.device, self.is_first = self.parallel.device, self.parallel.rank == 0
        local_batch_size(config, self.parallel.world_size)
        if self.is_first:
            warn_of_bfloat16(config.optim.precision, self.device)
        self.generator = self._built("generator", lambda: build_generator(config))
        self.discriminator = self._built("discriminator", lambda: build_discriminator(config))
        self.objective = self._built("objective", lambda: Objective(config, self.discriminator))
        if shard_backbones:
            # its torch modules take half a second to import
            from dpsims_reference.sharding import shard_backbones_

            shard_backbones_(self.discriminator, self.objective, self.parallel)
        self.ema = GeneratorEMA(
            self.generator, decay=config.optim.ema_decay, warmup=config.optim.ema_warmup
        )
        # its statistics are measured over all processes, whatever the trained generator does
        for module in self.ema.model.modules():
            if isinstance(module, BatchNorm2d):
                module.sync = True
        self.update = TrainingStep(
            self.generator, self.discriminator, self.objective, config, parallel=self.parallel
        )
        self.best = BestFigure(None) if best is None else best
        self._store = CheckpointStore(folder / CHECKPOINTS, keep=keep) if self.is_first else None
        self.step, self._saved, self._failed_saves = 0, -1, 0
        self.seconds = 0.0

    @property
    def store(self) -> CheckpointStore:
        """The checkpoints, which the first process alone may open."""
        assert self._store is not None, "only the first process has the store"
        return self._store

    def close(self) -> None:
        """Let other trainers write to the folder."""
        if self._store is not None:
            self._store.close()

    def _built(self, name: str, build: Callable[[], M]) -> M:
        return build_seeded(self.config.seed, name, build, self.device)

    def run(
        self,
        *,
        save_every: int = 1000,
        picture_every: int = 500,
        diagnose_every: int = 0,
        max_seconds: float | None = None,
    ) -> bool:
        """Train to the last step; a signal or ``max_seconds`` stops earlier, and saves.

        Ctrl-C, SIGTERM and SIGUSR1 are handled as :class:`StopSignals` says. Of many processes,
        all stop after the same step.

        Args:
            save_every: Steps between checkpoints.
            picture_every: Steps between sample grids.
            diagnose_every: Steps between diagnoses; 0 for none.
            max_seconds: Training time after which the run stops as if it were done.

        Returns:
            Whether the last step was reached.

        Raises:
            NonFiniteError: A loss or a gradient became NaN or infinite; names the first bad tensor
                and the folder ``crash-step-N`` from which the step can be replayed.
            CheckpointError: The last checkpoint, or several in a row, could not be written.
            KeyboardInterrupt: A second Ctrl-C came during a step; nothing was saved.
        """
        check_int("Trainer.run", "save_every", save_every, minimum=1)
        check_int("Trainer.run", "picture_every", picture_every, minimum=1)
        check_int("Trainer.run", "diagnose_every", diagnose_every, minimum=0)
        with StopSignals() as stop:
            self._train(stop, save_every, picture_every, diagnose_every, max_seconds)
            with stop.saving():
                if self.step >= self.config.optim.steps:
                    self._save_regular(last=True)
                elif self._saved != self.step:
                    self.save()
            if stop.requested and self.is_first and self.step < self.config.optim.steps:
                print(f"\nstopped by {stop.requested} after step {self.step}; everything is saved")
                print(f"go on with: python -m dpsims_reference train --resume {self.folder}")
        return self.step >= self.config.optim.steps

    def _train(
        self,
        stop: StopSignals,
        save_every: int,
        picture_every: int,
        diagnose_every: int,
        max_seconds: float | None,
    ) -> None:
        scan_labels(self.dataset, self.config, self.parallel)
        if self.objective.diversity_hinge is None:
            calibrate_(self.objective, self.generator, self.dataset, self.config, self.parallel)
        if self.step == 0:
            self.best.start(self.averaged_generator)
        last = self.config.optim.steps
        report = Report(self.folder, last, first_step=self.step, active=self.is_first)
        batches = train_batches(
            self.dataset, self.config, first_step=self.step, shard=self.parallel.shard
        )
        # a process that left the others while it waits would leave them waiting
        alone = self.parallel.world_size == 1
        waiting = stop.waiting if alone else contextlib.nullcontext
        started = time.perf_counter() - self.seconds
        stopping = stop.requested is not None
        try:
            with report:
                while self.step < last and not stopping:
                    with waiting():
                        batch = next(batches).to(self.device)
                    terms = self._updated(batch)
                    self.ema.update(self.generator)
                    self.seconds = time.perf_counter() - started
                    late = max_seconds is not None and self.seconds >= max_seconds
                    terms, stopping = self._agreed(terms, late or stop.requested is not None)
                    record = {"step": float(self.step), "seconds": self.seconds}
                    record |= {name: float(value) for name, value in terms.items()}
                    self.step += 1
                    report.step(record)
                    self.best.observe(record)
                    if self.step % picture_every == 0:
                        self._picture(report)
                    if diagnose_every and self.step % diagnose_every == 0:
                        self._diagnose(report)
                    if self.step % save_every == 0 and self.step < last:
                        with stop.saving():
                            self._save_regular()
                    # a signal during the save; many processes agree after the next step
                    stopping = stopping or (alone and stop.requested is not None)
        except StopRequested:
            pass
        finally:
            # ends the loader's processes before anything is saved
            batches.close()

    def _updated(self, batch: Batch) -> dict[str, Tensor]:
        """One step; where it fails, the state is written beside the run."""
        try:
            return self.update(batch, self.step)
        except NonFiniteError as error:
            networks = Networks(self.generator, self.discriminator, self.objective, self.config)
            raise dump_crash(self.folder, networks, batch, self.step, error) from error

    def _agreed(self, terms: dict[str, Tensor], stopping: bool) -> tuple[dict[str, Tensor], bool]:
        """The terms' means, and whether any process wants to stop, in one message."""
        flag = torch.tensor(float(stopping), device=self.device)
        terms = self.parallel.mean(terms | {"stopping": flag})
        return terms, bool(terms.pop("stopping"))

    def averaged_generator(self) -> ImageGenerator:
        """The averaged generator, its batch-norm statistics re-estimated on training maps."""
        model = self.ema.model
        recalibrate_(model, self.dataset, self.config, self.parallel)
        return model

    def _picture(self, report: Report) -> None:
        model = self.averaged_generator()
        if not self.is_first:
            return
        grid = sample_grid(model, self.dataset, self.config)
        save_image(self.folder / "samples" / f"step-{self.step:08d}.png", grid)
        report.picture("samples", grid, self.step)

    def _diagnose(self, report: Report) -> None:
        found = diagnose_networks(self.generator, self.discriminator, self.dataset, self.config)
        report.numbers("diagnosis", found.numbers(), self.step)

    def _save_regular(self, *, last: bool = False) -> None:
        """Judge and save; a disk that refuses ends the run only if it goes on refusing."""
        before = self.best.state()
        self.best.judge(self.step, self.averaged_generator)
        try:
            self.save()
            self._failed_saves = 0
        except CheckpointError as error:
            self.best.load(before)
            self._failed_saves += 1
            if last or self._failed_saves >= _FAILED_SAVES:
                raise
            text = f"Trainer: no checkpoint of step {self.step}, the training goes on: {error}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)

    def save(self) -> Path | None:
        """Write a checkpoint of the present step.

        All processes call this together; the first one writes and gets the path.
        """
        self.averaged_generator()
        path = None
        if self.is_first:
            best = self.best.is_best(self.step)
            path = self.store.save(self.step, *captured(self), best=best)
        self._saved = self.step
        return path

    def restore(self, checkpoint: Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue from ``checkpoint``.

        Args:
            checkpoint: What to continue from.
            allow: Settings that may differ, such as ``"config.optim.steps"``.

        Raises:
            IncompatibleCheckpointError: Another setting, data set or backbone differs, or batch
                norms would see another number of images; the message names it, and nothing has
                been loaded.

        Note:
            The state belongs to the run, not to a process: a checkpoint continues on any number
            of processes that divides the batch, unless norms of one process (``"batch"``) then
            see another number of images. Allow ``"norm_images"`` to accept that.
        """
        restore_(self, checkpoint, allow=allow)
