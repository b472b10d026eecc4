"""One training step: D, then G (Sec. 3.3). Plain torch, no loop, no logging, no framework."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn

from dpsims.errors import InputError
from dpsims_reference.batches import Batch, local_batch_size
from dpsims_reference.config import Config, OptimConfig
from dpsims_reference.fakes import Fake, FakeSource
from dpsims_reference.finite import check_finite_gradients, check_finite_loss
from dpsims_reference.networks import ImageGenerator, PixelDiscriminator
from dpsims_reference.objective import Loss, Objective
from dpsims_reference.parallel import Parallel, Shard
from dpsims_reference.randomness import derive_generator

F = TypeVar("F", bound=Callable[..., object])


class Part(NamedTuple):
    """What G's half needs of a batch that D's half has seen."""

    batch: Batch
    shard: Shard
    real_maps: list[Tensor]
    fake: Fake | None
    fake_features: list[Tensor]


def learning_rate(optim: OptimConfig, step: int) -> float:
    """The rate at ``step``: constant, or along a half cosine to ``final_lr`` times ``lr``."""
    done = min(step / max(optim.steps, 1), 1.0)
    share = 0.5 * (1 + math.cos(math.pi * done))
    return optim.lr * (optim.final_lr + (1 - optim.final_lr) * share)


class TrainingStep:
    """Both halves of a step, with the optimisers.

    D is updated first, on one batch of fakes; G follows, on the same fakes through the updated D
    (``reuse_fake``) or on new ones. Only the trained half receives gradients: D's half sees its
    inputs detached, and D's weights are frozen during G's.

    Args:
        generator: G.
        discriminator: D.
        objective: The losses.
        config: The run.
        parallel: Runs it on many processes, each with its rows of the batch. ``None`` is one.

    Note:
        Every random number belongs to an image's place in the step's batch, so how the batch is
        split over processes and parts changes none. Only what is trained is wrapped: the
        batch norms of a frozen backbone's conditioner lie outside, where no buffer is broadcast
        between the two forward passes of D's half.
    """

    def __init__(
        self,
        generator: ImageGenerator,
        discriminator: PixelDiscriminator,
        objective: Objective,
        config: Config,
        *,
        parallel: Parallel | None = None,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.objective, self.config = objective, config
        self.parallel = Parallel(generator.device) if parallel is None else parallel
        self._check()
        self.generator_parameters = [
            p for module in (generator, objective) for p in module.parameters() if p.requires_grad
        ]
        self.discriminator_parameters = [p for p in discriminator.parameters() if p.requires_grad]
        self.generator_optimizer = self._adam(self.generator_parameters)
        self.discriminator_optimizer = self._adam(self.discriminator_parameters)
        self._encode: Callable[[Tensor], list[Tensor]] = self._built(discriminator.frozen_part)
        # G's half looks through D as it is: no gradient of D's weights is to be averaged
        self._decode: Callable[..., Tensor] = self._built(discriminator.trained_part)
        self._trained_decode = self.parallel.wrap(self._decode)
        self._generate = self.parallel.wrap(self._built(generator))
        self._fakes = FakeSource(generator, self._generate, config)
        self._contrast: Callable[..., Tensor] | None = None
        if objective.contrastive is not None:
            self._contrast = self.parallel.wrap(objective.contrastive)

    def _check(self) -> None:
        local_batch_size(self.config, self.parallel.world_size)
        optim = self.config.optim
        if optim.accumulate > 1 and optim.reuse_fake:
            msg = (
                "TrainingStep: optim.accumulate must be 1 with optim.reuse_fake, which would keep "
                f"the fakes of all parts; got {optim.accumulate}"
            )
            raise InputError(msg)
        if optim.compile and self.config.discriminator.checkpoint_decoder:
            msg = (
                "TrainingStep: optim.compile must be off with discriminator.checkpoint_decoder, "
                "which cannot be traced; got both"
            )
            raise InputError(msg)

    def _built(self, part: F) -> F:
        return cast("F", torch.compile(part)) if self.config.optim.compile else part

    def _adam(self, parameters: list[nn.Parameter]) -> torch.optim.Adam:
        optim = self.config.optim
        # torch refuses an int beside a float
        betas = (float(optim.betas[0]), float(optim.betas[1]))
        return torch.optim.Adam(parameters, lr=optim.lr, betas=betas, fused=True)

    def __call__(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Update both networks once.

        Args:
            batch: This process's rows of the step's batch.
            step: Number of the step, from 0.

        Returns:
            The unweighted terms of both losses on this process, detached.

        Raises:
            NonFiniteError: A loss or a gradient is NaN or infinite, here or on another process;
                names the terms, and no weight has been changed by that loss.
        """
        for optimizer in (self.generator_optimizer, self.discriminator_optimizer):
            optimizer.param_groups[0]["lr"] = learning_rate(self.config.optim, step)
        found, parts = [], []
        weights = self.objective.class_weights(batch.labels)
        self.discriminator_optimizer.zero_grad(set_to_none=True)
        for number, local in self._synced(self._trained_decode):
            shard = self.parallel.shard.part(number, self.config.optim.accumulate)
            part, terms = self._discriminator_part(batch.part(local), shard, weights, step)
            parts.append(part)
            found.append(terms)
        self._descend(self.discriminator_optimizer, self.discriminator_parameters)
        if self.config.optim.pairs == "split_batch":
            weights = self.objective.class_weights(batch.labels[: len(batch.labels) // 2])
        self.generator_optimizer.zero_grad(set_to_none=True)
        with _frozen(self.discriminator_parameters):
            for number, _ in self._synced(self._generate, self._contrast):
                found.append(self._generator_part(parts[number], weights, step))
        self._descend(self.generator_optimizer, self.generator_parameters)
        return _means(found)

    def _discriminator_part(
        self, batch: Batch, shard: Shard, weights: Tensor | None, step: int
    ) -> tuple[Part, dict[str, Tensor]]:
        """Gradients of D, from one part of the batch."""
        with torch.no_grad(), self._autocast():
            real_features = self._encode(batch.images)
            real_maps = self.objective.contrastive_maps(batch.images, real_features)
        with torch.set_grad_enabled(self.config.optim.reuse_fake), self._autocast():
            fake = self._fakes(batch, shard, step, phase=0)
            fake_features = self._encode(fake.output.images)
        images = fake.output.images.detach()
        with self._autocast():
            real_logits = self._trained_decode(batch.images, real_features)
            fake_logits = self._trained_decode(images, [f.detach() for f in fake_features])
            loss = self.objective.discriminator_loss(
                real_logits, fake_logits, batch.labels, class_weights=weights
            )
        self._add_gradients(loss)
        if not self.config.optim.reuse_fake:
            return Part(batch, shard, real_maps, None, []), loss.terms
        return Part(batch, shard, real_maps, fake, fake_features), loss.terms

    def _generator_part(self, part: Part, weights: Tensor | None, step: int) -> dict[str, Tensor]:
        """Gradients of G and the projector, from one part of the batch."""
        fake, fake_features = part.fake, part.fake_features
        if fake is None:
            with self._autocast():
                fake = self._fakes(part.batch, part.shard, step, phase=1)
                fake_features = self._encode(fake.output.images)
        rng = derive_generator(self.config.seed, "patches", step)
        images = fake.output.images
        with self._autocast():
            logits = self._decode(images, fake_features)
            loss = self.objective.generator_loss(
                logits,
                fake.labels,
                self.objective.contrastive_maps(images, fake_features),
                [level[fake.sources] for level in part.real_maps],
                fake.pair,
                generator=rng,
                class_weights=weights,
                contrastive=self._contrast,
                shard=part.shard,
            )
        self._add_gradients(loss)
        return loss.terms

    def _add_gradients(self, loss: Loss) -> None:
        # all processes stop together: one alone would leave the others waiting for it
        check_finite_loss(loss, anywhere=self.parallel.any)
        parts = self.config.optim.accumulate
        self.parallel.backward(loss.total / parts if parts > 1 else loss.total)

    def _descend(self, optimizer: torch.optim.Optimizer, parameters: list[nn.Parameter]) -> None:
        check_finite_gradients(parameters, anywhere=self.parallel.any)
        if self.config.optim.clip_grad is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.config.optim.clip_grad)
        optimizer.step()

    def _synced(self, *wrapped: Callable[..., object] | None) -> Iterator[tuple[int, Shard]]:
        """The parts of this process's batch; only the last one averages the gradients."""
        parts = self.config.optim.accumulate
        for number in range(parts):
            with contextlib.ExitStack() as local:
                for module in wrapped if number < parts - 1 else ():
                    if module is not None:
                        local.enter_context(self.parallel.no_sync(module))
                yield number, Shard(number, parts)

    def _autocast(self) -> torch.autocast:
        device = self.generator.device
        enabled = device.type == "cuda" and self.config.optim.precision == "bf16"
        return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


@contextlib.contextmanager
def _frozen(parameters: list[nn.Parameter]) -> Iterator[None]:
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _means(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The terms of all parts; one part's stay as they are."""
    values: dict[str, list[Tensor]] = {}
    for terms in found:
        for name, value in terms.items():
            values.setdefault(name, []).append(value)
    return {n: v[0] if len(v) == 1 else torch.stack(v).mean() for n, v in values.items()}
