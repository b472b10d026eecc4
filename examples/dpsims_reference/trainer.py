"""The training loop, on one device or many: log, pictures, checkpoints, resume."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from dpsims.nn.norm import BatchNorm2d
from dpsims_reference.batches import local_batch_size, norm_images, train_batches
from dpsims_reference.checkpoints import (
    Checkpoint,
    CheckpointStore,
    load_module_,
    load_optimizer_,
    optimizer_tensors,
)
from dpsims_reference.config import Config, to_dict
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.ema import GeneratorEMA
from dpsims_reference.figures import save_image
from dpsims_reference.generator import Generator, build_generator
from dpsims_reference.objective import Objective
from dpsims_reference.parallel import Parallel, stop_signals
from dpsims_reference.probes import calibrate_, recalibrate_, sample_grid, scan_labels
from dpsims_reference.randomness import derive_seed
from dpsims_reference.reporting import Report
from dpsims_reference.resuming import check_same_run
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
    ) -> None:
        self.config, self.dataset, self.folder = config, dataset, folder
        self.parallel = Parallel(device) if parallel is None else parallel
        self.device, self.is_first = self.parallel.device, self.parallel.rank == 0
        local_batch_size(config, self.parallel.world_size)
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
        self._store = CheckpointStore(folder / "checkpoints") if self.is_first else None
        self.step = 0
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
        """Train to the last step; Ctrl-C or ``max_seconds`` stop earlier, and save.

        Args:
            save_every: Steps between checkpoints.
            picture_every: Steps between sample grids.
            max_seconds: Training time after which the run stops as if it were done.

        Returns:
            Whether the last step was reached.

        Raises:
            NonFiniteError: A loss became NaN or infinite.
        """
        scan_labels(self.dataset, self.config, self.parallel)
        if self.objective.diversity_hinge is None:
            calibrate_(self.objective, self.generator, self.dataset, self.config, self.parallel)
        last = self.config.optim.steps
        report = Report(self.folder, last, first_step=self.step, active=self.is_first)
        batches = train_batches(
            self.dataset, self.config, first_step=self.step, shard=self.parallel.shard
        )
        started = time.perf_counter() - self.seconds
        try:
            with report, stop_signals(self.parallel) as signalled:
                while self.step < last:
                    terms = self.update(next(batches).to(self.device), self.step)
                    self.ema.update(self.generator)
                    self.seconds = time.perf_counter() - started
                    stop = signalled() or (max_seconds is not None and self.seconds >= max_seconds)
                    flag = torch.tensor(float(stop), device=self.device)
                    terms = self.parallel.mean(terms | {"stop": flag})
                    # on any process: all of them leave after the same step
                    stop = bool(terms.pop("stop"))
                    record = {"step": float(self.step), "seconds": self.seconds}
                    record |= {name: float(value) for name, value in terms.items()}
                    self.step += 1
                    report.step(record)
                    if self.step % picture_every == 0:
                        self._picture(report)
                    if self.step % save_every == 0 and self.step < last:
                        self.save()
                    if stop:
                        break
        except KeyboardInterrupt:
            if self.parallel.world_size > 1:
                # the others wait for this process in the middle of a step: nothing can be saved
                raise
            print(f"\nstopped after step {self.step}; saving")
            print(f"go on with: python -m dpsims_reference train --resume {self.folder}")
        self.save()
        return self.step >= last

    def averaged_generator(self) -> Generator:
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

    def save(self) -> Path | None:
        """Write a checkpoint of the present step.

        All processes call this together; the first one writes and gets the path.
        """
        self.averaged_generator()
        if not self.is_first:
            return None
        optim_g, state_g = optimizer_tensors(self.update.generator_optimizer)
        optim_d, state_d = optimizer_tensors(self.update.discriminator_optimizer)
        ema_tensors, ema_state = self.ema.state()
        return self.store.save(
            self.step,
            {
                "generator": self.generator.state_dict(),
                "discriminator": self.discriminator.state_dict(),
                "objective": self.objective.state_dict(),
                "ema": ema_tensors,
                "optimizer_generator": optim_g,
                "optimizer_discriminator": optim_d,
            },
            {
                "config": to_dict(self.config),
                "spec": self.dataset.spec.to_dict(),
                "data": self.dataset.fingerprint(),
                "backbone": self.discriminator.backbone.identity,
                "diversity_hinge": self.objective.diversity_hinge,
                "optimizer_generator": state_g,
                "optimizer_discriminator": state_d,
                "ema": ema_state,
                "seconds": self.seconds,
                "norm_images": norm_images(self.config, self.parallel.world_size),
            },
        )

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
        state, tensors = checkpoint.state, checkpoint.tensors
        present = {
            "config": to_dict(self.config),
            "data": self.dataset.fingerprint(),
            "backbone": self.discriminator.backbone.identity,
            "norm_images": norm_images(self.config, self.parallel.world_size),
        }
        check_same_run(state, present, allow=allow)
        load_module_(self.generator, tensors["generator"], name="generator")
        load_module_(self.discriminator, tensors["discriminator"], name="discriminator")
        load_module_(self.objective, tensors["objective"], name="objective")
        self.ema.load(tensors["ema"], state["ema"])
        for name in ("generator", "discriminator"):
            optimizer = getattr(self.update, f"{name}_optimizer")
            load_optimizer_(optimizer, tensors[f"optimizer_{name}"], state[f"optimizer_{name}"])
        self.objective.diversity_hinge = state["diversity_hinge"]
        self.step, self.seconds = checkpoint.step, state["seconds"]
