"""The parametrization behind :mod:`dpsims.nn.spectral`."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from dpsims.nn._buffers import WideBuffers

# a matrix below this counts as zero: it has no direction to follow and no norm to divide by
_EPS = 1e-12


class SpectralNorm(WideBuffers):
    """Parametrization ``W -> W / sigma``; ``u`` and ``v`` are the power method's vectors.

    ``sigma`` is the length of ``W v``. Where ``u`` and ``v`` are fresh that is ``u W v``; where
    they are stale it is closer to the largest singular value, and never negative.

    Args:
        weight: The weight that it will be registered on.
        dim: Axis of ``weight`` that becomes the rows of the matrix.
        generator: Source of the starting vectors, which then take fifteen steps.

    Source:
        Miyato et al., ICLR 2018, Alg. 1.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, dim: int, generator: torch.Generator | None) -> None:
        super().__init__()
        self.dim = dim
        # a vector v to use instead of the buffer's, without a step
        self.held: Tensor | None = None
        matrix = self._matrix(self._wide(weight.detach()))
        device = weight.device if generator is None else generator.device
        for name, size in zip(("u", "v"), matrix.shape, strict=True):
            draw = torch.randn(size, generator=generator, dtype=matrix.dtype, device=device)
            self.register_buffer(name, (draw / torch.linalg.vector_norm(draw)).to(weight.device))
        self.advance(weight, 15)

    def forward(self, weight: Tensor) -> Tensor:
        """The weight to compute with; in training after one more step."""
        return self.scaled(weight, step=self.training and self.held is None)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """What to store when the user assigns a weight: the weight, not yet normalised."""
        return weight

    @torch.no_grad()
    def advance(self, weight: Tensor, iterations: int) -> None:
        """Let the vectors follow the weight."""
        # a weight without values has no direction
        if weight.is_meta:
            return
        matrix = self._matrix(self._wide(weight))
        u, v = self.u.to(matrix.dtype), self.v.to(matrix.dtype)
        with without_autocast(weight.device.type):
            for _ in range(iterations):
                v = _direction(matrix.mT @ u, v)
                u = _direction(matrix @ v, u)
        self.u.copy_(u)
        self.v.copy_(v)

    def scaled(self, weight: Tensor, *, step: bool = False) -> Tensor:
        """The normalised weight; with ``step`` after one step of the power method."""
        wide = self._wide(weight)
        matrix = self._matrix(wide)
        u = self.u.to(matrix.dtype)
        # a copy: the next step writes to the buffer before this one's backward has run
        v = self.v.to(matrix.dtype, copy=not step) if self.held is None else self.held
        with without_autocast(weight.device.type):
            if step:
                v = _direction(matrix.detach().mT @ u, v)
            image = matrix @ v
            sigma = torch.linalg.vector_norm(image)
        if step:
            self.u.copy_(_direction(image.detach(), u))
            self.v.copy_(v)
        # a zero weight stays zero, with the gradient of an unnormalised one
        scale = torch.where(sigma > _EPS, sigma, 1).reciprocal()
        return (wide * scale).to(weight.dtype)

    def _wide(self, weight: Tensor) -> Tensor:
        return weight.to(torch.promote_types(weight.dtype, torch.float32))

    def _matrix(self, weight: Tensor) -> Tensor:
        return weight.movedim(self.dim, 0).flatten(1)


def without_autocast(device: str) -> AbstractContextManager[None]:
    """Compute in the dtypes that are given."""
    # the meta device has no autocast to switch off
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, enabled=False)


def _direction(vector: Tensor, fallback: Tensor) -> Tensor:
    """The unit vector along ``vector``, or ``fallback`` where that is zero or NaN."""
    length = torch.linalg.vector_norm(vector)
    return torch.where(length > _EPS, vector / length, fallback)
