"""The terms of the adversarial losses, on one head or on many."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from dpsims._checks import check_tensor
from dpsims.errors import InputError

Kind = Literal["hinge", "softplus", "pixel"]


def check_logits(
    owner: str, name: str, logits: object, *, like: Tensor | None = None
) -> list[Tensor]:
    """The logits of every head, or an error; all are on the device of ``like``.

    Raises:
        DTypeError: A head is not a floating-point tensor.
        InputError: No head, an axis other than the first is empty, or heads on two devices.
    """
    several = isinstance(logits, list | tuple)
    heads: list[Any] = list(logits) if isinstance(logits, list | tuple) else [logits]
    if not heads:
        msg = f"{owner}: {name} must hold at least one head; got {logits!r}"
        raise InputError(msg)
    if like is None and isinstance(heads[0], Tensor):
        like = heads[0]
    for index, head in enumerate(heads):
        ndim = head.ndim if isinstance(head, Tensor) else 1
        layout = " ".join(["B", *(f"N{axis}" for axis in range(1, ndim))][:ndim])
        check_tensor(owner, f"{name}[{index}]" if several else name, head, layout, like=like)
    return heads


def widened(logits: Tensor) -> Tensor:
    """The logits in float32 or better."""
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def real_term(kind: Kind, heads: Sequence[Tensor], label_smoothing: float = 0.0) -> Tensor:
    """What the discriminator pays for its logits of real images."""
    if kind == "hinge":
        return _mean_of_means(heads, lambda logits: F.relu(1 - logits))
    if not label_smoothing:
        return _mean_of_means(heads, _name_real)
    # (1 - s) softplus(-x) + s softplus(x)
    return _mean_of_means(heads, lambda logits: _name_real(logits) + label_smoothing * logits)


def fake_term(kind: Kind, heads: Sequence[Tensor]) -> Tensor:
    """What the discriminator pays for its logits of fake images."""
    if kind == "hinge":
        return _mean_of_means(heads, lambda logits: F.relu(1 + logits))
    return _mean_of_means(heads, lambda logits: _name_real(-logits))


def generator_term(kind: Kind, heads: Sequence[Tensor]) -> Tensor:
    """What the generator pays for the discriminator's logits of its images."""
    return _mean_of_means(heads, torch.neg if kind == "hinge" else _name_real)


def _name_real(logits: Tensor) -> Tensor:
    # softplus(-x), which torch's own softplus cuts off beyond 20
    return -F.logsigmoid(logits)


def _mean_of_means(heads: Sequence[Tensor], cost: Callable[[Tensor], Tensor]) -> Tensor:
    # an empty batch costs 0, not 0/0
    means = [cost(widened(head)).sum() / max(1, head.numel()) for head in heads]
    return torch.stack(means).mean()
