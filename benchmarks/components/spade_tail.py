"""SPADE's tail: batch statistics, normalise, modulate, LeakyReLU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cases import (
    Case,
    Inputs,
    Outputs,
    Place,
    Run,
    Variant,
    normal,
    plain,
    traced,
    wide,
    with_gradients,
)
from dpsims.nn.norm import BatchNorm2d
from dpsims.nn.spade import spade_modulate
from dpsims.ops.spade_tail.api import spade_tail

_SLOPE, _EPS = 0.2, 1e-5
_FLOAT, _HALF = torch.float32, torch.bfloat16
_NAMES = ("features", "modulation")
# passes over the features: statistics 1, apply 4 (read features, gamma and beta, write); backward
# reduce 3, apply 6
_PASSES = {"eval": 4, "train": 5, "train+backward": 14}


def cases(place: Place) -> list[Case]:
    """Channels and sides of the paper's blocks."""
    shapes = place.pick(
        smoke=((3, 4),),
        cpu=((64, 256), (512, 32)),
        gpu=((1024, 8), (1024, 32), (512, 64), (256, 128), (128, 256), (64, 256)),
    )
    batch = place.pick(smoke=2, cpu=1, gpu=8)
    dtypes = place.pick(smoke=(_FLOAT,), cpu=(_FLOAT,), gpu=(_HALF, _FLOAT))
    every = itertools.product(dtypes, shapes, _PASSES)
    return [_case(place, c, side, batch, dtype, mode) for dtype, (c, side), mode in every]


def eager_tail(inputs: Inputs, *, training: bool) -> Tensor:
    """The tail as published code writes it."""
    features = inputs["features"]
    gamma, beta = inputs["modulation"].chunk(2, 1)
    mean, var = None, None
    if not training:
        mean, var = inputs["mean"], inputs["var"]
    normalized = F.batch_norm(features, mean, var, training=training, eps=_EPS)
    return F.leaky_relu(normalized * (1 + gamma) + beta, _SLOPE)


def _dpsims_tail(channels: int, device: torch.device, *, training: bool) -> Callable[..., Tensor]:
    norm = _norm(channels, device, training=training)

    def tail(inputs: Inputs) -> Tensor:
        _set_statistics(norm, inputs)
        gamma, beta = inputs["modulation"].chunk(2, 1)
        return F.leaky_relu(spade_modulate(norm(inputs["features"]), gamma, beta), _SLOPE)

    return tail


def _kernel_tail(
    channels: int, device: torch.device, impl: str, *, training: bool
) -> Callable[..., Tensor]:
    norm = _norm(channels, device, training=training)

    def tail(inputs: Inputs) -> Tensor:
        _set_statistics(norm, inputs)
        statistics = norm.statistics(inputs["features"])
        return spade_tail(
            inputs["features"], inputs["modulation"], statistics, slope=_SLOPE, impl=impl
        )

    return tail


def _norm(channels: int, device: torch.device, *, training: bool) -> BatchNorm2d:
    return BatchNorm2d(channels, affine=False, eps=_EPS).to(device).train(training)


def _set_statistics(norm: BatchNorm2d, inputs: Inputs) -> None:
    if not norm.training:
        norm.running_mean, norm.running_var = inputs["mean"], inputs["var"]


def _case(
    place: Place, channels: int, side: int, batch: int, dtype: torch.dtype, mode: str
) -> Case:
    training = mode != "eval"

    def inputs(rng: torch.Generator) -> Inputs:
        shape = (batch, channels, side, side)
        drawn = {
            "features": normal(rng, *shape, dtype=dtype),
            # one convolution makes gamma and beta
            "modulation": normal(rng, batch, 2 * channels, side, side, dtype=dtype),
            "mean": normal(rng, channels),
            "var": normal(rng, channels).exp(),
        }
        if mode == "train+backward":
            drawn["upstream"] = normal(rng, *shape, dtype=dtype)
        return drawn

    def run(tail: Callable[[Inputs], Tensor]) -> Run:
        return with_gradients(tail, _NAMES) if mode == "train+backward" else plain(tail)

    def eager(drawn: Inputs) -> Tensor:
        return eager_tail(drawn, training=training)

    def dpsims() -> Run:
        return run(_dpsims_tail(channels, place.device, training=training))

    def kernel(impl: str) -> Run:
        return run(_kernel_tail(channels, place.device, impl, training=training))

    def reference(drawn: Inputs) -> Outputs:
        return run(eager)(wide(drawn))

    short = "bf16" if dtype == _HALF else "fp32"
    numbers = batch * channels * side**2
    return Case(
        component="spade_tail",
        name=f"{channels}x{side}x{side} b{batch} {short} {mode}",
        inputs=inputs,
        variants=[
            Variant("eager", lambda: run(eager)),
            Variant("dpsims", dpsims),
            *(
                Variant(impl.replace("_", " "), functools.partial(kernel, impl), optional=True)
                for impl in ("closed_form", "fused")
            ),
            Variant("compile", lambda: run(traced(eager)), opaque=True),
        ],
        reference=reference,
        tolerance=place.tolerance(dtype),
        baseline="eager",
        axes={
            "channels": channels,
            "side": side,
            "batch": batch,
            "dtype": short,
            "pass": mode,
            "elements": numbers,
        },
        unit=place.unit(dtype),
        bytes=_PASSES[mode] * numbers * dtype.itemsize,
        budget=4.0 if place.profile == "cpu" else 1.0,
    )
