"""Whole training steps, and G's phase through the discriminator."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
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
    sizes = place.pick(
        smoke=[(tiny, 5, 64, 2)],
        cpu=[(small, 151, 64, 2)],
        gpu=[({}, 151, 256, 8)],
    )
    found = [_phase_case(place, *options) for options in _phases(place)]
    return found + [_step_case(place, *options) for options in sizes]


def _phases(place: Place) -> list[tuple[int, int, int, int]]:
    """Discriminator channels, classes, side and batch of G's phase."""
    options: list[tuple[int, int, int, int]] = place.pick(
        smoke=[(2, 5, 64, 1)], cpu=[(64, 151, 256, 1)], gpu=[(64, 151, 256, 8)]
    )
    return options


def _phase_case(place: Place, channels: int, num_classes: int, side: int, batch: int) -> Case:
    def inputs(rng: torch.Generator) -> Inputs:
        return {
            "images": normal(rng, batch, 3, side, side).tanh(),
            "labels": label_map(rng, num_classes, batch, side, side),
        }

    def run(
        loss: Callable[[Tensor, Tensor], Tensor], frozen: bool, dtype: torch.dtype = torch.float32
    ) -> Run:
        # a step of the power method would change D from one call to the next
        network = copy.deepcopy(_discriminator(num_classes, channels)).eval()
        network = network.to(place.device, dtype)
        phase = through_discriminator(network, loss, frozen=frozen)
        return lambda drawn: phase(drawn["images"], drawn["labels"])

    def naive_loss(logits: Tensor, labels: Tensor) -> Tensor:
        return one_hot_focal(logits, labels, logits.new_ones(num_classes + 1))

    def reference(drawn: Inputs) -> Outputs:
        return run(naive_loss, True, torch.float64)(wide(drawn))

    return Case(
        component="training",
        name=f"G through D {side}x{side} b{batch} fp32",
        inputs=inputs,
        variants=[
            Variant("naive", lambda: run(naive_loss, False)),
            Variant("all gradients", lambda: run(pixel_focal_loss, False)),
            Variant("frozen D", lambda: run(pixel_focal_loss, True)),
        ],
        reference=reference,
        tolerance=_GRADIENT_TOLERANCE,
        baseline="all gradients",
        axes={"part": "G through D", "side": side, "batch": batch, "dtype": "fp32"},
        unit=place.unit(torch.float32),
        budget=place.pick(smoke=1.0, cpu=120.0, gpu=5.0),
    )


@functools.lru_cache(maxsize=1)
def _discriminator(num_classes: int, channels: int) -> OasisDiscriminator:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        return OasisDiscriminator(num_classes, channels=channels)


def _step_case(
    place: Place, sizes: dict[str, Any], num_classes: int, side: int, batch: int
) -> Case:
    def inputs(rng: torch.Generator) -> Inputs:
        return {
            "images": normal(rng, batch, 3, side, side).tanh(),
            "labels": label_map(rng, num_classes, batch, side, side),
        }

    def config(**options: Any) -> Config:
        return _config(sizes, num_classes, side, batch, **options)

    def naive(dtype: torch.dtype, same_fakes: bool) -> Run:
        generator, discriminator, _ = _networks(config())
        generator = generator.to(place.device, dtype)
        discriminator = discriminator.to(place.device, dtype)
        step = NaiveStep(generator, discriminator, config(), same_fakes=same_fakes)
        return _stepping(step)

    def dpsims(**options: Any) -> Run:
        wanted = config(**options)
        generator, discriminator, objective = (n.to(place.device) for n in _networks(wanted))
        return _stepping(TrainingStep(generator, discriminator, objective, wanted))

    def true(same_fakes: bool, drawn: Inputs) -> Outputs:
        return naive(torch.float64, same_fakes)(wide(drawn))

    reuse = functools.partial(true, True)
    variants = [
        Variant("naive", lambda: naive(torch.float32, False)),
        Variant("dpsims", dpsims),
        Variant("reuse fake", lambda: dpsims(reuse_fake=True), reuse),
    ]
    if place.device.type == "cuda":
        variants += [
            Variant("bf16", lambda: dpsims(precision="bf16")),
            Variant("bf16 reuse", lambda: dpsims(precision="bf16", reuse_fake=True), reuse),
            Variant(
                "compile bf16 reuse",
                lambda: dpsims(precision="bf16", reuse_fake=True, compile=True),
                reuse,
                opaque=True,
            ),
        ]
    return Case(
        component="training",
        name=f"step OASIS {side}x{side} b{batch}",
        inputs=inputs,
        variants=variants,
        reference=functools.partial(true, False),
        tolerance=place.tolerance(torch.bfloat16) if len(variants) > 3 else _STEP_TOLERANCE,
        baseline="naive",
        axes={"part": "step", "side": side, "batch": batch},
        unit=place.unit(torch.bfloat16 if len(variants) > 3 else torch.float32),
        budget=place.pick(smoke=1.0, cpu=60.0, gpu=20.0),
        late=place.profile == "gpu",
    )


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
