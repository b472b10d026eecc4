"""Parameters, operations and memory of one training step, counted on fake tensors.

Fake tensors have shapes, dtypes and sizes but no values, so a network of any size is counted in
seconds on any machine, under the same autocast and with the same attention kernel as in training.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dpsims._checks import check_int
from dpsims_reference.config import Config
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.networks import ImageGenerator, PixelDiscriminator
from dpsims_reference.objective import Objective
from dpsims_reference.planning.phases import MeasuredStep, Phase


@dataclass(frozen=True)
class StepCounts:
    """What one step of one GPU needs."""

    batch: int
    """Images on this GPU."""
    parameters: dict[str, int]
    """Trained parameters of ``generator``, ``decoder`` and ``projector``; and ``frozen`` ones."""
    weight_bytes: int
    """All weights and buffers, frozen ones included."""
    ema_bytes: int
    """The averaged generator."""
    gradient_bytes: int
    """Gradients of everything trained; what is all-reduced."""
    phases: tuple[Phase, ...]
    """The parts of a step, in order."""
    peak_bytes: int
    """Largest sum of everything else that is alive at once: activations, gradients, inputs."""

    @property
    def trained(self) -> int:
        """Number of trained parameters."""
        return sum(count for name, count in self.parameters.items() if name != "frozen")

    @property
    def optimizer_bytes(self) -> int:
        """Adam's two moments."""
        return 2 * 4 * self.trained

    @property
    def flops(self) -> int:
        """Operations of a whole step."""
        return sum(phase.flops for phase in self.phases)

    def flops_of(self, *, half: str | None = None, frozen: bool | None = None) -> int:
        """Operations of some phases."""
        return sum(
            phase.flops
            for phase in self.phases
            if half in (None, phase.half) and frozen in (None, phase.frozen)
        )

    @property
    def saved_bytes(self) -> dict[str, int]:
        """What is kept for the backward pass of each half."""
        return {
            half: sum(phase.saved_bytes for phase in self.phases if phase.half == half)
            for half in ("D", "G")
        }

    @property
    def memory_bytes(self) -> int:
        """Everything that is alive at the fullest moment."""
        return self.weight_bytes + self.ema_bytes + self.optimizer_bytes + self.peak_bytes


def count_step(config: Config, batch: int) -> StepCounts:
    """Count one training step of ``config`` with ``batch`` images on one GPU.

    Args:
        config: The run; pre-trained weights are neither needed nor read.
        batch: Images on this GPU.

    Raises:
        InputError: ``batch`` below 1, or below 2 where the step splits it into pairs.

    Note:
        Elementwise work is not counted as operations; its memory is. What a kernel allocates for
        itself and what an allocator leaves unused are not counted.
    """
    return count_steps(config, [batch])[0]


def count_steps(config: Config, batches: Sequence[int]) -> list[StepCounts]:
    """As :func:`count_step`, for several batch sizes; the networks are built once."""
    pairs = config.optim.pairs == "split_batch"
    for batch in batches:
        check_int("count_step", "batch", batch, minimum=2 if pairs else 1)
    with torch.device("meta"):
        networks = _build(config)
    lasting: list[Tensor] = []
    sizes: list[int] = []

    def convert(tensor: Tensor) -> Tensor:
        """The fake twin, on the processor, of a tensor on the meta device."""
        nhwc = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
        lasting.append(torch.empty(tensor.shape, dtype=tensor.dtype, memory_format=nhwc))
        sizes.append(tensor.numel() * isinstance(tensor, nn.Parameter))
        return lasting[-1]

    with FakeTensorMode():
        for module in networks:
            # _apply also reaches frozen networks, which are in no list of parameters
            module._apply(convert)
        ema = sum(value.nbytes for value in networks[0].state_dict().values())
        return [_count(config, networks, lasting, sum(sizes), ema, batch) for batch in batches]


def _count(
    config: Config,
    networks: tuple[ImageGenerator, PixelDiscriminator, Objective],
    lasting: list[Tensor],
    num_weights: int,
    ema_bytes: int,
    batch: int,
) -> StepCounts:
    for module in networks:
        module.zero_grad(set_to_none=True)
    step = MeasuredStep(config, *networks, lasting)
    step.run(batch)
    parameters = {n: sum(p.numel() for p in found) for n, found in step.trained.items()}
    parameters["frozen"] = num_weights - sum(parameters.values())
    return StepCounts(
        batch=batch,
        parameters=parameters,
        weight_bytes=sum(tensor.nbytes for tensor in lasting),
        ema_bytes=ema_bytes,
        gradient_bytes=4 * sum(parameters[name] for name in step.trained),
        phases=tuple(step.phases),
        peak_bytes=step.meter.peak,
    )


def _build(config: Config) -> tuple[ImageGenerator, PixelDiscriminator, Objective]:
    config = replace(
        config,
        discriminator=replace(config.discriminator, pretrained=False, weights=None),
        objective=replace(
            config.objective,
            contrastive_pretrained=False,
            # only values depend on it
            diversity_threshold=config.objective.diversity_threshold or 0.0,
        ),
    )
    discriminator = build_discriminator(config)
    return build_generator(config), discriminator, Objective(config, discriminator)
