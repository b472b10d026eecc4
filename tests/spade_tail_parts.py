"""Inputs and a float64 oracle of the SPADE tail, and what a kernel's rounding may cost."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

EPS = 1e-5
# one value per channel and image, odd sizes, one channel, more than one tile of channels
SIZES = [(3, 5, 1, 1), (2, 3, 7, 5), (2, 1, 5, 7), (2, 16, 1, 9), (2, 16, 8, 8), (2, 65, 3, 5)]
LAYOUTS = ("contiguous", "channels_last", "transposed", "sliced", "mixed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Case(NamedTuple):
    features: Tensor
    modulation: Tensor
    grad: Tensor


def make_case(
    size: tuple[int, ...], *, upsample: int = 1, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Case:
    """Features of mean 5 and deviation 2; no value near the kink of the activation."""
    generator = torch.Generator().manual_seed(seed)
    b, c, h, w = size

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    fine = (h * upsample, w * upsample)
    return Case(2 * randn(*size) + 5, randn(b, 2 * c, *fine), randn(b, c, *fine))


def laid_out(value: Tensor, layout: str, place: int = 0) -> Tensor:
    """The same numbers in another memory layout; ``mixed`` gives every map another one."""
    if layout == "mixed":
        layout = LAYOUTS[place % 4]
    if layout == "channels_last":
        return value.contiguous(memory_format=torch.channels_last)
    if layout == "transposed":
        return value.mT.contiguous().mT
    if layout == "sliced":
        wide = value.new_full((value.shape[0], value.shape[1] + 2, *value.shape[2:]), torch.nan)
        wide[:, 1:-1] = value
        return wide[:, 1:-1]
    return value.contiguous()


class Answer(NamedTuple):
    mean: Tensor
    var: Tensor
    out: Tensor
    to_features: Tensor
    to_modulation: Tensor
    # how far each value is from the kink of the activation
    margin: Tensor


def oracle(case: Case, *, mode: str, slope: float, upsample: int = 1) -> Answer:
    """Everything in float64 numpy: ``mode`` is "batch", "fixed" or "none"."""
    x, m, g = (value.detach().double().cpu().numpy() for value in case)
    gamma, beta = np.split(m, 2, axis=1)
    mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    wide = (slice(None), None, None)
    rstd = 1 / np.sqrt(var + EPS) if mode != "none" else np.ones_like(var)
    normal = (x - mean[wide]) * rstd[wide] if mode != "none" else x
    fine = normal.repeat(upsample, 2).repeat(upsample, 3)
    inside = fine * (1 + gamma) + beta
    g = np.where(inside > 0, g, slope * g)
    b, c, h, w = x.shape
    inner = (g * (1 + gamma)).reshape(b, c, h, upsample, w, upsample).sum((3, 5))
    if mode == "batch":
        inner = (
            inner
            - inner.mean((0, 2, 3), keepdims=True)
            - normal * (inner * normal).mean((0, 2, 3), keepdims=True)
        )
    out = np.where(inside > 0, inside, slope * inside)
    arrays = mean, var, out, inner * rstd[wide], np.concatenate((g * fine, g), 1), np.abs(inside)
    return Answer(*map(torch.from_numpy, arrays))


def assert_near(actual: Tensor, expected: Tensor, *, roundings: float, scale: float = 1.0) -> None:
    """Off by no more than some roundings to float32 at ``scale``, and one to the own dtype."""
    own = torch.finfo(actual.dtype).eps
    wide = 2**-53 if actual.dtype == torch.float64 else 2**-24
    actual = actual.detach().double().cpu()
    size = max(scale, expected.abs().max().item())
    bound = roundings * wide * size + own * expected.abs() + torch.finfo(torch.float16).tiny
    error = (actual - expected).abs()
    assert actual.shape == expected.shape
    assert bool((error <= bound).all()), f"off by {(error / bound).max().item():.3g} times"


def statistics_arguments(answer: Answer, mode: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """Mean and variance as a kernel takes them."""
    if mode == "none":
        return None, None
    wide = torch.promote_types(dtype, torch.float32)
    return answer.mean.to(DEVICE, wide), answer.var.to(DEVICE, wide)
