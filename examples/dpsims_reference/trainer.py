"""The training loop of one device: log, pictures, checkpoints, resume."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dpsims.errors import IncompatibleCheckpointError, NonFiniteError
from dpsims_reference.batches import Batch, train_batches, view_batches
from dpsims_reference.checkpoints import (
    Checkpoint,
    CheckpointStore,
    load_module_,
    load_optimizer_,
    optimizer_tensors,
)
from dpsims_reference.config import Config, to_dict
from dpsims_reference.crash import Networks, dump_crash
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.diagnosis import diagnose_networks
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.ema import GeneratorEMA
from dpsims_reference.figures import captioned_grid, label_pictures, save_image, to_uint8
from dpsims_reference.generator import Generator, build_generator
from dpsims_reference.logs import ProgressBar, RunLog
from dpsims_reference.objective import Objective
from dpsims_reference.randomness import build_seeded, derive_generator
from dpsims_reference.recalibration import recalibrate_batch_norm_
from dpsims_reference.steps import TrainingStep

# maps for Eq. 7, for the averaged generator's batch-norm statistics, and in a sample grid
CALIBRATION_MAPS = 64
RECALIBRATION_MAPS = 144
GRID_MAPS, GRID_NOISES = 8, 3
# settings that change no number of a run
_ALWAYS_FREE = {"config.data.workers", "config.data.root"}


M = TypeVar("M", bound=nn.Module)


class Trainer:
    """Everything that one run holds, and its loop.

    Args:
        config: The run.
        dataset: The training images.
        folder: Where the log, the pictures and the checkpoints go.
        device: Where the networks live.
    """

    def __init__(
        self, config: Config, dataset: ImageDataset, folder: Path, *, device: str = "cpu"
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
        self.store = CheckpointStore(folder / "checkpoints")
        self.step = 0
        self.seconds = 0.0

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
        """Train to the last step; Ctrl-C or ``max_seconds`` stop earlier, and save.

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
        """
        if self.objective.diversity_hinge is None:
            self._calibrate()
        last = self.config.optim.steps
        log = RunLog(self.folder, first_step=self.step)
        batches = train_batches(self.dataset, self.config, first_step=self.step)
        started = time.perf_counter() - self.seconds
        try:
            with ProgressBar(last, first_step=self.step) as bar:
                while self.step < last:
                    batch = next(batches).to(self.device)
                    try:
                        terms = self.update(batch, self.step)
                    except NonFiniteError as error:
                        raise self._crashed(batch, error) from error
                    self.ema.update(self.generator)
                    self.seconds = time.perf_counter() - started
                    record = {"step": float(self.step), "seconds": self.seconds}
                    record |= {name: float(value) for name, value in terms.items()}
                    self.step += 1
                    log.write(record)
                    bar.advance(record)
                    if self.step % picture_every == 0:
                        self._picture(log)
                    if diagnose_every and self.step % diagnose_every == 0:
                        found = diagnose_networks(
                            self.generator, self.discriminator, self.dataset, self.config
                        )
                        log.numbers("diagnosis", found.numbers(), self.step)
                    if self.step % save_every == 0 and self.step < last:
                        self.save()
                    if max_seconds is not None and self.seconds >= max_seconds:
                        break
        except KeyboardInterrupt:
            print(f"\nstopped after step {self.step}; saving")
            print(f"go on with: python -m dpsims_reference train --resume {self.folder}")
        finally:
            log.close()
        self.save()
        return self.step >= last

    def _crashed(self, batch: Batch, error: NonFiniteError) -> NonFiniteError:
        networks = Networks(self.generator, self.discriminator, self.objective, self.config)
        return dump_crash(self.folder, networks, batch, self.step, error)

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

    def save(self) -> Path:
        """Write a checkpoint of the present step."""
        self.averaged_generator()
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
            },
        )

    def restore(self, checkpoint: Checkpoint, *, allow: tuple[str, ...] = ()) -> None:
        """Continue from ``checkpoint``.

        Args:
            checkpoint: What to continue from.
            allow: Settings that may differ, such as ``"config.optim.steps"``.

        Raises:
            IncompatibleCheckpointError: Another setting, data set or backbone differs; the message
                names it, and nothing has been loaded.
        """
        state, tensors = checkpoint.state, checkpoint.tensors
        present = {
            "config": to_dict(self.config),
            "data": self.dataset.fingerprint(),
            "backbone": self.discriminator.backbone.identity,
        }
        differing = sorted(set(differences(state, present)) - set(allow) - _ALWAYS_FREE)
        if differing:
            shown = "; ".join(differing[:10])
            msg = (
                f"Trainer: a resumed run must have the checkpoint's settings; got others: {shown}"
            )
            raise IncompatibleCheckpointError(msg)
        load_module_(self.generator, tensors["generator"], name="generator")
        load_module_(self.discriminator, tensors["discriminator"], name="discriminator")
        load_module_(self.objective, tensors["objective"], name="objective")
        self.ema.load(tensors["ema"], state["ema"])
        for name in ("generator", "discriminator"):
            optimizer = getattr(self.update, f"{name}_optimizer")
            load_optimizer_(optimizer, tensors[f"optimizer_{name}"], state[f"optimizer_{name}"])
        self.objective.diversity_hinge = state["diversity_hinge"]
        self.step, self.seconds = checkpoint.step, state["seconds"]


def differences(saved: dict[str, Any], present: dict[str, Any], path: str = "") -> list[str]:
    """Names of the entries of ``present``, at any depth, that differ in ``saved``."""
    found = []
    for key, value in present.items():
        name = f"{path}.{key}" if path else key
        other = saved.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            found += differences(other, value, name)
        elif value != other:
            found.append(name)
    return found
