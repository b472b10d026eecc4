"""Finding NaN and infinity: in the terms of a loss, in gradients, and where they come from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dpsims.errors import NonFiniteError
from dpsims_reference.objective import Loss


class StepNonFiniteError(NonFiniteError):
    """A loss or a gradient of a training step is NaN or infinite.

    Attributes:
        terms: The terms of the loss, unweighted; none if the loss was finite.
    """

    def __init__(self, message: str, terms: Mapping[str, float]) -> None:
        super().__init__(message)
        self.terms = dict(terms)


class Finding(NamedTuple):
    """One place with values that are not finite.

    Attributes:
        kind: ``"batch"``, ``"parameter"``, ``"buffer"``, ``"activation"`` or ``"gradient"``.
        name: Name of the tensor or module.
        bad: How many values are not finite.
        total: How many values there are.
        note: What else is known.
    """

    kind: str
    name: str
    bad: int
    total: int
    note: str = ""

    def __str__(self) -> str:
        text = f"{self.kind} {self.name}: {self.bad} of {self.total} values are not finite"
        return f"{text} ({self.note})" if self.note else text


def check_finite_loss(loss: Loss, *, anywhere: Callable[[Tensor], bool] = bool) -> None:
    """Raise unless the loss is finite.

    Args:
        loss: What is about to be minimised.
        anywhere: Whether a flag is set on any process; they must all stop together.

    Raises:
        StepNonFiniteError: It is not; names the terms that are not, or says that all are.
    """
    if not anywhere(~torch.isfinite(loss.total.detach())):
        return
    terms = {name: float(value) for name, value in loss.terms.items()}
    shown = ", ".join(f"{name} {value:g}" for name, value in terms.items())
    bad = [name for name, value in terms.items() if not math.isfinite(value)]
    total = float(loss.total.detach())
    which = f"not finite: {', '.join(bad)}" if bad else "every term is finite, their sum is not"
    if math.isfinite(total):
        which = "it is not on another process"
    msg = f"TrainingStep: the loss must be finite; got {total:g} ({which}; {shown})"
    raise StepNonFiniteError(msg, terms)


def check_finite_gradients(
    parameters: Iterable[Tensor], *, anywhere: Callable[[Tensor], bool] = bool
) -> None:
    """Raise unless every gradient is finite; waits for the device once.

    Args:
        parameters: Whose gradients; those without one do not count.
        anywhere: As in :func:`check_finite_loss`.

    Raises:
        StepNonFiniteError: Some gradient is not finite although the loss was.
    """
    gradients = [_local(p.grad) for p in parameters if p.grad is not None]
    # a process may hold none of a sharded parameter
    gradients = [gradient for gradient in gradients if gradient.numel()]
    # the largest entry rather than a sum of squares, which overflows for sound gradients
    largest = torch.nn.utils.get_total_norm(gradients, norm_type=torch.inf)
    if not anywhere(~torch.isfinite(largest)):
        return
    bad = sum(not bool(torch.isfinite(gradient).all()) for gradient in gradients)
    msg = (
        f"TrainingStep: gradients must be finite; got {bad} of {len(gradients)} that are not, "
        "from a finite loss"
    )
    raise StepNonFiniteError(msg, {})


def _local(gradient: Tensor) -> Tensor:
    """This process's part, where the parameter is sharded."""
    part: Tensor = gradient.to_local() if hasattr(gradient, "to_local") else gradient
    return part


def scan(
    modules: Mapping[str, nn.Module], tensors: Mapping[str, Tensor], *, gradients: bool = True
) -> list[Finding]:
    """Every tensor of ``tensors`` and of ``modules`` that holds a value that is not finite.

    Args:
        modules: By name; their parameters, buffers and gradients are looked at, in this order.
        tensors: By name, such as the batch; looked at first.
        gradients: Whether to look at gradients.
    """
    found = [_finding("batch", name, value) for name, value in tensors.items()]
    for owner, module in modules.items():
        for name, parameter in module.named_parameters(prefix=owner):
            found.append(_finding("parameter", name, parameter))
        for name, buffer in module.named_buffers(prefix=owner):
            found.append(_finding("buffer", name, buffer))
    if gradients:
        for owner, module in modules.items():
            for name, parameter in module.named_parameters(prefix=owner):
                if parameter.grad is not None:
                    found.append(_finding("gradient", name, parameter.grad))
    return [finding for finding in found if finding is not None]


@contextmanager
def watch(modules: Mapping[str, nn.Module]) -> Iterator[list[Finding]]:
    """Collect the modules whose outputs, or the gradients of these, are not finite, in order.

    The list fills while the block runs; its first entry is where the trouble starts. Modules are
    called in the order in which they finish, so an inner one comes before those around it. A
    frozen backbone is not looked into: its conditioner then says that its input is bad already.

    Args:
        modules: By name; all their parts are watched.
    """
    found: list[Finding] = []
    handles = [
        part.register_forward_hook(partial(_check_output, found, name))
        for owner, module in modules.items()
        for name, part in module.named_modules(prefix=owner)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def _check_output(
    found: list[Finding], name: str, module: nn.Module, inputs: Any, output: Any
) -> None:
    bad_input = any(_finding("", "", tensor) for tensor in _tensors(inputs))
    note = (
        f"{type(module).__name__}; its input is {'not finite either' if bad_input else 'finite'}"
    )
    for tensor in _tensors(output):
        finding = _finding("activation", name, tensor, note)
        if finding is not None:
            found.append(finding)
        if tensor.requires_grad:
            tensor.register_hook(partial(_check_gradient, found, name, type(module).__name__))


def _check_gradient(found: list[Finding], name: str, kind: str, gradient: Tensor) -> None:
    finding = _finding("gradient", f"of {name}'s output", gradient, kind)
    if finding is not None:
        found.append(finding)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for entry in value:
            yield from _tensors(entry)


def _finding(kind: str, name: str, value: Tensor, note: str = "") -> Finding | None:
    if not value.is_floating_point():
        return None
    bad = int((~torch.isfinite(value.detach())).sum())
    if not bad:
        return None
    if kind == "batch":
        rows = (~torch.isfinite(value)).flatten(1).any(1).nonzero().flatten().tolist()
        note = f"in samples {rows}"
    return Finding(kind, name, bad, value.numel(), note)
