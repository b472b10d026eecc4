"""What is compared: cases, their variants, and the inputs and gradients they share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Run = Callable[[Inputs], Outputs]

# the largest relative error of a right variant. float32 sums of thousands of terms differ by some
# 1e-6; cuDNN multiplies float32 maps in TF32, with 10 bits; bf16 has 8, and layers add up
_TOLERANCE = {("cpu", torch.float32): 1e-4, ("cuda", torch.float32): 5e-3}
_BFLOAT16_TOLERANCE = 5e-2


class UnavailableError(Exception):
    """A variant cannot run here; the message says why."""


@dataclass(frozen=True)
class Place:
    """Where and how thoroughly to measure.

    Attributes:
        device: The device of all tensors.
        profile: ``"smoke"`` (tiny shapes), ``"cpu"`` or ``"gpu"``.
        compiled: Whether variants under ``torch.compile`` run.
        peers: Other projects' code by name.
    """

    device: torch.device
    profile: str
    compiled: bool = True
    peers: Mapping[str, Any] = field(default_factory=dict)

    def pick(self, *, smoke: Any, cpu: Any, gpu: Any) -> Any:
        """The value for this profile."""
        return {"smoke": smoke, "cpu": cpu, "gpu": gpu}[self.profile]

    def tolerance(self, dtype: torch.dtype) -> float:
        """The largest relative error of a right variant in ``dtype``."""
        return _TOLERANCE.get((self.device.type, dtype), _BFLOAT16_TOLERANCE)

    def unit(self, dtype: torch.dtype) -> str:
        """Name of the matrix product whose rate bounds work in ``dtype``."""
        if dtype == torch.bfloat16:
            return "bfloat16"
        return "tf32" if self.device.type == "cuda" else "float32"


@dataclass(frozen=True)
class Variant:
    """One way to compute what the case asks for.

    Attributes:
        name: Short and unique in the case.
        build: Makes the function to time; raises :class:`UnavailableError`.
        reference: The variant's own true result, where it computes another function than the case.
        opaque: Whether its operators cannot be seen one by one, as behind ``torch.compile``: its
            operations are not counted, and on a CPU neither is its memory.
        optional: Whether the library may refuse it here: an ``InputError`` then is the reason why
            it is not available.
        consumes: Whether it overwrites its inputs: it gets copies, which count as inputs.
    """

    name: str
    build: Callable[[], Run]
    reference: Run | None = None
    opaque: bool = False
    optional: bool = False
    consumes: bool = False


@dataclass(frozen=True)
class Case:
    """Several variants of one computation on one kind of input.

    Attributes:
        component: The script it belongs to.
        name: Unique in the component.
        inputs: Draws the inputs.
        variants: What to compare.
        reference: The true result, in float64 where nothing else is said.
        tolerance: Largest relative error of a right variant.
        baseline: Variant that the others' speed is divided by.
        axes: Sizes and options, for tables and pictures.
        unit: Name of the matrix product that bounds the operations.
        bytes: Fewest bytes to read and write.
        budget: Seconds of measuring after which no further round starts.
        wall: Whether to take wall times with launches too.
        late: Whether it waits for a compiler for minutes, and so comes after all others.
    """

    component: str
    name: str
    inputs: Callable[[torch.Generator], Inputs]
    variants: Sequence[Variant]
    reference: Run
    tolerance: float
    baseline: str
    axes: dict[str, int | str] = field(default_factory=dict)
    unit: str = "float32"
    bytes: int = 0
    budget: float = 3.0
    wall: bool = False
    late: bool = False

    @property
    def key(self) -> str:
        """Unique name of the case."""
        return f"{self.component}/{self.name}"


def random_generator(device: torch.device, seed: int) -> torch.Generator:
    """A source of random numbers on ``device``."""
    return torch.Generator(device).manual_seed(seed)


def normal(generator: torch.Generator, *size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(size, generator=generator, device=generator.device, dtype=dtype)


def label_map(
    generator: torch.Generator, num_classes: int, batch: int, height: int, width: int
) -> Tensor:
    """Class ids in regions of 16 pixels, as label maps are not white noise."""
    size = (batch, -(-height // 16), -(-width // 16))
    draw = torch.randint(0, num_classes, size, generator=generator, device=generator.device)
    wide = draw.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :height, :width]
    return wide.to(torch.uint8).contiguous()


def plain(function: Callable[[Inputs], Tensor]) -> Run:
    """The forward pass alone."""

    def run(inputs: Inputs) -> Outputs:
        with torch.no_grad():
            return (function(inputs),)

    return run


def with_gradients(
    function: Callable[[Inputs], Tensor],
    names: Sequence[str],
    parameters: Sequence[Tensor] = (),
) -> Run:
    """Forward and backward: the result, and the gradients of some inputs and of parameters.

    The gradient that comes from above is ``inputs["upstream"]``, or 1 for a scalar.
    """

    def run(inputs: Inputs) -> Outputs:
        leaves = {name: inputs[name].detach().requires_grad_() for name in names}
        result = function({**inputs, **leaves})
        wanted = [*leaves.values(), *parameters]
        gradients = torch.autograd.grad(result, wanted, inputs.get("upstream"))
        return (result.detach(), *gradients)

    return run


def short(dtype: torch.dtype) -> str:
    """``"bf16"`` or ``"fp32"``."""
    return "bf16" if dtype == torch.bfloat16 else "fp32"


def copied(inputs: Inputs) -> Inputs:
    """Copies, for a variant that overwrites them."""
    return {name: value.clone() for name, value in inputs.items()}


def wide(inputs: Inputs) -> Inputs:
    """The inputs in float64, integers as they are."""
    return {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}


def traced(function: Callable[..., Any]) -> Callable[..., Any]:
    """``torch.compile`` for one set of shapes."""
    compiled: Callable[..., Any] = torch.compile(function, dynamic=False)
    return compiled


def replayed(run: Run, example: Inputs) -> Run:
    """``run`` as a CUDA graph; copying the inputs in is part of every replay."""
    static = {name: value.clone() for name, value in example.items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(static)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(static)

    def replay(inputs: Inputs) -> Outputs:
        for name, value in inputs.items():
            static[name].copy_(value)
        graph.replay()
        return outputs

    return replay
