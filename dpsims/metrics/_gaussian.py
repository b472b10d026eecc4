"""Gaussians by a factor of their covariance, and how far two of them are apart."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from dpsims.errors import NonFiniteError


class Gaussian(NamedTuple):
    """Mean and factor, in float64."""

    mean: Tensor
    # any matrix whose transpose times itself is the covariance
    factor: Tensor


def root(owner: str, covariance: Tensor) -> Tensor:
    """Return a factor of a covariance matrix.

    Raises:
        NonFiniteError: The covariance has overflowed.
    """
    _check_finite(owner, covariance)
    values, vectors = torch.linalg.eigh(covariance)
    # rounding leaves tiny negative eigenvalues where the covariance is singular
    return values.clamp(min=0).sqrt().unsqueeze(1) * vectors.mT


def squared_distance(owner: str, a: Gaussian, b: Gaussian) -> float:
    """Return the squared Frechet distance.

    Raises:
        NonFiniteError: It overflows.
    """
    means = (a.mean - b.mean).square().sum()
    traces = a.factor.square().sum() + b.factor.square().sum()
    product = a.factor @ b.factor.mT
    for value in (product, traces, means):
        _check_finite(owner, value)
    distance = means + traces - 2 * torch.linalg.svdvals(product).sum()
    return max(float(distance), 0.0)


def _check_finite(owner: str, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        msg = f"{owner}: the distance must be finite; got features that overflow float64"
        raise NonFiniteError(msg)
