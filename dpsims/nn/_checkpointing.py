"""Activation checkpointing that fits spectral normalisation."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import TracebackType

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dpsims.nn._spectral_norm import SpectralNorm


def checkpointed(
    modules: list[nn.Module], function: Callable[..., Tensor], *inputs: Tensor
) -> Tensor:
    """``function(*inputs)``, whose activations are computed again in the backward pass.

    Outputs and gradients are bit for bit those of the plain call: the second computation takes no
    step of the power method and uses the vectors of the first one, even if further forward passes
    have moved them on. Every layer must run once per call.

    Args:
        modules: What ``function`` runs.
        function: What to compute.
        inputs: Its inputs, which are kept.
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    norms = [part for m in modules for part in m.modules() if isinstance(part, SpectralNorm)]
    first = _Record(norms)
    result: Tensor = checkpoint(
        function,
        *inputs,
        use_reentrant=False,
        # nothing here is random
        preserve_rng_state=False,
        context_fn=lambda: (first, _Replay(first)),
    )
    return result


class _Record(AbstractContextManager[None]):
    """Keep the vectors that a forward pass used."""

    def __init__(self, norms: list[SpectralNorm]) -> None:
        self.norms = norms
        self.vectors: list[Tensor] = []

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.vectors = [norm.v.clone() for norm in self.norms]


class _Replay(AbstractContextManager[None]):
    """Use those vectors again; may be entered many times."""

    def __init__(self, record: _Record) -> None:
        self.record = record

    def __enter__(self) -> None:
        for norm, vector in zip(self.record.norms, self.record.vectors, strict=True):
            norm.held = vector

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for norm in self.record.norms:
            norm.held = None
