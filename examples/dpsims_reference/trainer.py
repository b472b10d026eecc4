"""Everything that a run holds, on one device or many: networks, averages, checkpoints, resume."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from torch import nn

from dpsims._checks import check_int
from dpsims.nn.norm import BatchNorm2d
from dpsims_reference.batches import local_batch_size
from dpsims_reference.best import BestFigure
from dpsims_reference.checkpoints import Checkpoint, CheckpointStore
from dpsims_reference.config import Config
from dpsims_reference.cpu import warn_of_bfloat16
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.ema import GeneratorEMA
from dpsims_reference.generator import build_generator
from dpsims_reference.loop import Loop, Schedule
from dpsims_reference.networks import ImageGenerator
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import Parallel
from dpsims_reference.probes import calibrate_, recalibrate_, scan_labels
from dpsims_reference.randomness import build_seeded
from dpsims_reference.resume import captured, restore_
from dpsims_reference.runs import CHECKPOINTS
from dpsims_reference.signals import StopSignals
from dpsims_reference.steps import TrainingStep

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
        self.step, self._saved = 0, -1
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
            self._prepare()
            schedule = Schedule(save_every, picture_every, diagnose_every, max_seconds)
            loop = Loop(self, schedule, stop)
            loop.run()
            with stop.saving():
                if self.step >= self.config.optim.steps:
                    loop.save(last=True)
                elif self._saved != self.step:
                    self.save()
            if stop.requested and self.is_first and self.step < self.config.optim.steps:
                print(f"\nstopped by {stop.requested} after step {self.step}; everything is saved")
                print(f"go on with: python -m dpsims_reference train --resume {self.folder}")
        return self.step >= self.config.optim.steps

    def _prepare(self) -> None:
        """What the first step needs to know of the data."""
        scan_labels(self.dataset, self.config, self.parallel)
        if self.objective.diversity_hinge is None:
            calibrate_(self.objective, self.generator, self.dataset, self.config, self.parallel)
        if self.step == 0:
            self.best.start(self.averaged_generator)

    def averaged_generator(self) -> ImageGenerator:
        """The averaged generator, its batch-norm statistics re-estimated on training maps."""
        model = self.ema.model
        recalibrate_(model, self.dataset, self.config, self.parallel)
        return model

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
