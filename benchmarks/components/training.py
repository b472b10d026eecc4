"""Whole training steps, and G's phase through the discriminator."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.cases import (
    Case,
    Inputs,
    Outputs,
    Place,
    Run,
    Variant,
    label_map,
    normal,
    wide,
)
from benchmarks.naive_losses import one_hot_focal
from benchmarks.naive_training import NaiveStep, through_discriminator
from dpsims.losses import pixel_focal_loss
from dpsims_reference.batches import Batch
from dpsims_reference.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    ObjectiveConfig,
    OptimConfig,
)
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.oasis import OasisDiscriminator
from dpsims_reference.objective import Objective
from dpsims_reference.steps import TrainingStep

# Adam's first step has the length of its rate whatever the gradient, so rounding decides the sign
# where a gradient is nearly 0; what G's half sees of D then differs in the third digit
_STEP_TOLERANCE = 1e-2
# a LeakyReLU whose input rounds to the other side of 0 changes a gradient by up to its slope: the
# worst pixel of the images' gradient differs from float64's by some 3e-3, whoever computes it
_GRADIENT_TOLERANCE = 2e-2
_TERMS = ("d_real", "d_fake", "g_pixel")


def cases(place: Place) -> list[Case]:
    """OASIS's two networks, with the pixel loss alone."""
    small = {"channels": (256, 256, 256, 128, 64, 32, 16), "oasis_channels": 16}
    tiny = {"channels": (8, 8, 8, 8, 8, 4, 4), "spade_hidden": 4, "oasis_channels": 2}
    sizes = place.pick(smoke=(tiny, 5, 64, 2), cpu=(small, 151, 64, 2), gpu=({}, 151, 256, 8))
    phase = place.pick(smoke=(2, 5, 64, 1), cpu=(64, 151, 256, 1), gpu=(64, 151, 256, 8))
    return [_Phase(place, *phase).case(), _Step(place, *sizes).case()]


@dataclass(frozen=True)
class _Phase:
    """G's phase through OASIS's discriminator: the gradient of the images."""

    place: Place
    channels: int
    num_classes: int
    side: int
    batch: int

    def case(self) -> Case:
        return Case(
            component="training",
            name=f"G through D {self.side}x{self.side} b{self.batch} fp32",
            inputs=functools.partial(_inputs, self.num_classes, self.side, self.batch),
            variants=[
                Variant("naive", lambda: self._run(self._naive_loss, frozen=False)),
                Variant("all gradients", lambda: self._run(pixel_focal_loss, frozen=False)),
                Variant("frozen D", lambda: self._run(pixel_focal_loss, frozen=True)),
            ],
            reference=self.reference,
            tolerance=_GRADIENT_TOLERANCE,
            baseline="all gradients",
            axes={
                "part": "G through D",
                "side": self.side,
                "batch": self.batch,
                "dtype": "fp32",
            },
            unit=self.place.unit(torch.float32),
            budget=self.place.pick(smoke=1.0, cpu=120.0, gpu=5.0),
        )

    def reference(self, drawn: Inputs) -> Outputs:
        return self._run(self._naive_loss, frozen=True, dtype=torch.float64)(wide(drawn))

    def _naive_loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        return one_hot_focal(logits, labels, logits.new_ones(self.num_classes + 1))

    def _run(
        self,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        frozen: bool,
        dtype: torch.dtype = torch.float32,
    ) -> Run:
        # a step of the power method would change D from one call to the next: evaluation
        network = copy.deepcopy(_discriminator(self.num_classes, self.channels)).eval()
        phase = through_discriminator(network.to(self.place.device, dtype), loss, frozen=frozen)
        return lambda drawn: phase(drawn["images"], drawn["labels"])


@functools.lru_cache(maxsize=1)
def _discriminator(num_classes: int, channels: int) -> OasisDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return OasisDiscriminator(num_classes, channels=channels)


@dataclass(frozen=True)
class _Step:
    """Whole steps of OASIS's two networks; ``sizes`` are settings of theirs."""

    place: Place
    sizes: dict[str, Any]
    num_classes: int
    side: int
    batch: int

    def case(self) -> Case:
        on_gpu = self.place.profile == "gpu"
        return Case(
            component="training",
            name=f"step OASIS {self.side}x{self.side} b{self.batch}",
            inputs=functools.partial(_inputs, self.num_classes, self.side, self.batch),
            variants=self.variants(),
            reference=functools.partial(self.true, same_fakes=False),
            tolerance=self.place.tolerance(torch.bfloat16) if on_gpu else _STEP_TOLERANCE,
            baseline="naive",
            axes={"part": "step", "side": self.side, "batch": self.batch},
            unit=self.place.unit(torch.bfloat16 if on_gpu else torch.float32),
            budget=self.place.pick(smoke=1.0, cpu=60.0, gpu=20.0),
            late=on_gpu,
        )

    def variants(self) -> list[Variant]:
        reuse = functools.partial(self.true, same_fakes=True)
        found = [
            Variant("naive", lambda: self._naive(torch.float32, same_fakes=False)),
            Variant("dpsims", self._dpsims),
            Variant("reuse fake", lambda: self._dpsims(reuse_fake=True), reuse),
        ]
        if self.place.profile == "gpu":
            half: dict[str, Any] = {"precision": "bf16"}
            again = {**half, "reuse_fake": True}
            build = functools.partial(self._dpsims, **again, compile=True)
            found += [
                Variant("bf16", lambda: self._dpsims(**half)),
                Variant("bf16 reuse", lambda: self._dpsims(**again), reuse),
                Variant("compile bf16 reuse", build, reuse, opaque=True),
            ]
        return found

    def true(self, drawn: Inputs, *, same_fakes: bool) -> Outputs:
        return self._naive(torch.float64, same_fakes=same_fakes)(wide(drawn))

    def _naive(self, dtype: torch.dtype, *, same_fakes: bool) -> Run:
        config = self._config()
        generator, discriminator, _ = _networks(config)
        generator = generator.to(self.place.device, dtype)
        discriminator = discriminator.to(self.place.device, dtype)
        return _stepping(NaiveStep(generator, discriminator, config, same_fakes=same_fakes))

    def _dpsims(self, **options: Any) -> Run:
        config = self._config(**options)
        generator, discriminator, objective = (
            network.to(self.place.device) for network in _networks(config)
        )
        return _stepping(TrainingStep(generator, discriminator, objective, config))

    def _config(self, **options: Any) -> Config:
        return _config(self.sizes, self.num_classes, self.side, self.batch, **options)


def _inputs(num_classes: int, side: int, batch: int, rng: torch.Generator) -> Inputs:
    return {
        "images": normal(rng, batch, 3, side, side).tanh(),
        "labels": label_map(rng, num_classes, batch, side, side),
    }


def _config(
    sizes: dict[str, Any], num_classes: int, side: int, batch: int, **options: Any
) -> Config:
    generator = {n: v for n, v in sizes.items() if n != "oasis_channels"}
    discriminator = {n: v for n, v in sizes.items() if n == "oasis_channels"}
    optim = {"precision": "float32", **options}
    return Config(
        generator=GeneratorConfig(architecture="oasis", norm="batch", **generator),
        discriminator=DiscriminatorConfig(architecture="oasis", norm="batch", **discriminator),
        objective=ObjectiveConfig(
            contrastive_weight=0.0, diversity_weight=0.0, label_smoothing=0.0
        ),
        optim=OptimConfig(batch_size=batch, **optim),
        data=DataConfig(num_classes=num_classes, image_size=(side, side)),
    )


def _networks(config: Config) -> tuple[Any, Any, Any]:
    """Both networks and the objective, the same weights every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        generator, discriminator = build_generator(config), build_discriminator(config)
    return generator, discriminator, Objective(config, discriminator)


def _stepping(step: Callable[[Batch, int], dict[str, Tensor]]) -> Run:
    numbers = iter(range(10**9))

    def run(inputs: Inputs) -> Outputs:
        terms = step(Batch(inputs["images"], inputs["labels"], None), next(numbers))
        return (torch.stack([terms[name].double() for name in _TERMS]),)

    return run
