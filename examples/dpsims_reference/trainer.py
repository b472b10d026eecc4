"""The training loop of one device: log, pictures, checkpoints, resume."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from dpsims._checks import check_int
from dpsims.errors import CheckpointError
from dpsims_reference.batches import Batch, train_batches, view_batches
from dpsims_reference.best import BestFigure
from dpsims_reference.checkpoints import Checkpoint, CheckpointStore
from dpsims_reference.config import Config
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.ema import GeneratorEMA
from dpsims_reference.figures import captioned_grid, label_pictures, save_image, to_uint8
from dpsims_reference.generator import Generator, build_generator
from dpsims_reference.logs import ProgressBar, RunLog
from dpsims_reference.objective import Objective
from dpsims_reference.randomness import derive_generator, derive_seed
from dpsims_reference.recalibration import recalibrate_batch_norm_
from dpsims_reference.resume import CHECKPOINTS, captured, restore_
from dpsims_reference.signals import StopRequested, StopSignals
from dpsims_reference.steps import TrainingStep

# maps for Eq. 7, for the averaged generator's batch-norm statistics, and in a sample grid
CALIBRATION_MAPS = 64
RECALIBRATION_MAPS = 144
GRID_MAPS, GRID_NOISES = 8, 3
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
        keep: int = 2,
        best: BestFigure | None = None,
    ) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.device = torch.device(device)
        self.generator = self._built("generator", lambda: build_generator(config))
        self.discriminator = self._built("discriminator", lambda: build_discriminator(config))
        self.objective = self._built("objective", lambda: Objective(config, self.discriminator))
        self.ema = GeneratorEMA(
            self.generator, decay=config.optim.ema_decay, warmup=config.optim.ema_warmup
        )
        self.update = TrainingStep(self.generator, self.discriminator, self.objective, config)
        self.best = BestFigure(None) if best is None else best
        self.store = CheckpointStore(folder / CHECKPOINTS, keep=keep)
        self.step, self._saved, self._failed_saves = 0, -1, 0
        self.seconds = 0.0

    def _built(self, name: str, build: Callable[[], M]) -> M:
        """Build with a seeded global generator, which is put back; channels last is faster."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(self.config.seed, f"weights-{name}"))
            module = build()
        return module.to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def run(
        self,
        *,
        save_every: int = 1000,
        picture_every: int = 500,
        max_seconds: float | None = None,
    ) -> bool:
        """Train to the last step; a signal or ``max_seconds`` stops earlier, and saves.

        Ctrl-C, SIGTERM and SIGUSR1 are handled as :class:`StopSignals` says.

        Args:
            save_every: Steps between checkpoints.
            picture_every: Steps between sample grids.
            max_seconds: Training time after which the run stops as if it were done.

        Returns:
            Whether the last step was reached.

        Raises:
            NonFiniteError: A loss became NaN or infinite.
            CheckpointError: The last checkpoint, or several in a row, could not be written.
            KeyboardInterrupt: A second Ctrl-C came during a step; nothing was saved.
        """
        check_int("Trainer.run", "save_every", save_every, minimum=1)
        check_int("Trainer.run", "picture_every", picture_every, minimum=1)
        with StopSignals() as stop:
            self._train(stop, save_every, picture_every, max_seconds)
            with stop.saving():
                if self.step >= self.config.optim.steps:
                    self._save_regular(last=True)
                elif self._saved != self.step:
                    self.save()
            if stop.requested and self.step < self.config.optim.steps:
                print(f"\nstopped by {stop.requested} after step {self.step}; everything is saved")
                print(f"go on with: python -m dpsims_reference train --resume {self.folder}")
        return self.step >= self.config.optim.steps

    def _train(
        self, stop: StopSignals, save_every: int, picture_every: int, max_seconds: float | None
    ) -> None:
        if self.objective.diversity_hinge is None:
            self._calibrate()
        if self.step == 0:
            self.best.start(self.averaged_generator)
        last = self.config.optim.steps
        log = RunLog(self.folder, first_step=self.step)
        batches = train_batches(self.dataset, self.config, first_step=self.step)
        started = time.perf_counter() - self.seconds
        try:
            with ProgressBar(last, first_step=self.step) as bar:
                while self.step < last and stop.requested is None:
                    with stop.waiting():
                        batch = next(batches)
                    terms = self.update(batch.to(self.device), self.step)
                    self.ema.update(self.generator)
                    self.seconds = time.perf_counter() - started
                    record = {"step": float(self.step), "seconds": self.seconds}
                    record |= {name: float(value) for name, value in terms.items()}
                    self.step += 1
                    log.write(record)
                    bar.advance(record)
                    self.best.observe(record)
                    if self.step % picture_every == 0:
                        self._picture(log)
                    if self.step % save_every == 0 and self.step < last:
                        with stop.saving():
                            self._save_regular()
                    if max_seconds is not None and self.seconds >= max_seconds:
                        break
        except StopRequested:
            pass
        finally:
            # ends the loader's processes before anything is saved
            batches.close()
            log.close()

    def averaged_generator(self) -> Generator:
        """The averaged generator, its batch-norm statistics re-estimated on training maps."""
        model = self.ema.model
        batches = itertools.islice(
            train_batches(self.dataset, self.config),
            -(-RECALIBRATION_MAPS // self.config.optim.batch_size),
        )
        rng = derive_generator(self.config.seed, "recalibration")
        recalibrate_batch_norm_(model, batches, lambda batch: self._generate(model, batch, rng))
        return model

    def _generate(self, model: Generator, batch: Batch, rng: torch.Generator) -> Tensor:
        batch = batch.to(self.device)
        latents = model.sample_latents(len(batch.labels), generator=rng)
        noise = model.sample_noise(len(batch.labels), batch.labels.shape[-2:], generator=rng)
        return model(batch.labels, latents, batch.extra, noise).images

    @torch.no_grad()
    def _calibrate(self) -> None:
        """Eq. 7 on the untrained generator, over batches of different maps."""
        rng = derive_generator(self.config.seed, "calibration")
        size = self.config.optim.batch_size
        outputs = []
        for batch in itertools.islice(
            train_batches(self.dataset, self.config), -(-CALIBRATION_MAPS // size)
        ):
            batch = batch.to(self.device)
            latents = self.generator.sample_latents(len(batch.labels), generator=rng)
            noise = self.generator.sample_noise(
                len(batch.labels), batch.labels.shape[-2:], generator=rng
            )
            outputs.append((self.generator(batch.labels, latents, batch.extra, noise), latents))
        self.objective.calibrate(outputs)

    @torch.no_grad()
    def _picture(self, log: RunLog) -> None:
        model = self.averaged_generator()
        batch = next(view_batches(self.dataset, self.config, batch_size=GRID_MAPS))
        rng = derive_generator(self.config.seed, "picture")
        rows = [
            ("labels", label_pictures(self.dataset.spec, batch.labels)),
            ("real", list(to_uint8(batch.images))),
        ]
        rows += [
            (f"noise {index + 1}", list(to_uint8(self._generate(model, batch, rng))))
            for index in range(GRID_NOISES)
        ]
        grid = captioned_grid(rows)
        save_image(self.folder / "samples" / f"step-{self.step:08d}.png", grid)
        log.picture("samples", grid, self.step)

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

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        self.averaged_generator()
        path = self.store.save(self.step, *captured(self), best=self.best.is_best(self.step))
        self._saved = self.step
        return path

    def restore(self, checkpoint: Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue from ``checkpoint``.

        Args:
            checkpoint: What to continue from.
            allow: Settings that may differ, such as ``"config.optim.steps"``.

        Raises:
            IncompatibleCheckpointError: Another setting, data set or backbone differs; the message
                names it, and nothing has been loaded.
        """
        restore_(self, checkpoint, allow=allow)
