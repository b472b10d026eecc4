"""SPADE's tail: batch statistics, normalise, modulate, LeakyReLU."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

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
    short,
    traced,
    wide,
    with_gradients,
)
from dpsims.nn.norm import BatchNorm2d
from dpsims.nn.spade import spade_modulate
from dpsims.ops.spade_tail.api import spade_tail

_SLOPE, _EPS = 0.2, 1e-5
_FLOAT, _HALF = torch.float32, torch.bfloat16
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
    return [
        _Setting(place, channels, side, batch, dtype, mode).case()
        for dtype, (channels, side), mode in every
    ]


def eager_tail(inputs: Inputs, *, training: bool) -> Tensor:
    """The tail as published code writes it."""
    gamma, beta = inputs["modulation"].chunk(2, 1)
    mean, var = (None, None) if training else (inputs["mean"], inputs["var"])
    normalized = F.batch_norm(inputs["features"], mean, var, training=training, eps=_EPS)
    return F.leaky_relu(normalized * (1 + gamma) + beta, _SLOPE)


@dataclass(frozen=True)
class _Setting:
    """One shape in one mode."""

    place: Place
    channels: int
    side: int
    batch: int
    dtype: torch.dtype
    mode: str

    def case(self) -> Case:
        numbers = self.batch * self.channels * self.side**2
        sizes = f"{self.channels}x{self.side}x{self.side} b{self.batch}"
        return Case(
            component="spade_tail",
            name=f"{sizes} {short(self.dtype)} {self.mode}",
            inputs=self.inputs,
            variants=self.variants(),
            reference=self.reference,
            tolerance=self.place.tolerance(self.dtype),
            baseline="eager",
            axes={
                "channels": self.channels,
                "side": self.side,
                "batch": self.batch,
                "dtype": short(self.dtype),
                "pass": self.mode,
                "elements": numbers,
            },
            unit=self.place.unit(self.dtype),
            bytes=_PASSES[self.mode] * numbers * self.dtype.itemsize,
            budget=4.0 if self.place.profile == "cpu" else 1.0,
        )

    def inputs(self, rng: torch.Generator) -> Inputs:
        shape = (self.batch, self.channels, self.side, self.side)
        drawn = {
            "features": normal(rng, *shape, dtype=self.dtype),
            # one convolution makes gamma and beta
            "modulation": normal(rng, shape[0], 2 * shape[1], *shape[2:], dtype=self.dtype),
            "mean": normal(rng, self.channels),
            "var": normal(rng, self.channels).exp(),
        }
        if self.mode == "train+backward":
            drawn["upstream"] = normal(rng, *shape, dtype=self.dtype)
        return drawn

    def reference(self, drawn: Inputs) -> Outputs:
        return self._run(self._eager)(wide(drawn))

    def variants(self) -> list[Variant]:
        kernels = [
            Variant(impl.replace("_", " "), functools.partial(self._kernel, impl), optional=True)
            for impl in ("closed_form", "fused")
        ]
        return [
            Variant("eager", lambda: self._run(self._eager)),
            Variant("modules", self._modules),
            *kernels,
            Variant("compile", lambda: self._run(traced(self._eager)), opaque=True),
        ]

    def _run(self, tail: Callable[[Inputs], Tensor]) -> Run:
        if self.mode == "train+backward":
            return with_gradients(tail, ["features", "modulation"])
        return plain(tail)

    def _eager(self, drawn: Inputs) -> Tensor:
        return eager_tail(drawn, training=self.mode != "eval")

    def _modules(self) -> Run:
        """The library's norm and modulation, one after the other."""
        norm = self._norm()

        def tail(drawn: Inputs) -> Tensor:
            _set_statistics(norm, drawn)
            gamma, beta = drawn["modulation"].chunk(2, 1)
            return F.leaky_relu(spade_modulate(norm(drawn["features"]), gamma, beta), _SLOPE)

        return self._run(tail)

    def _kernel(self, impl: str) -> Run:
        norm = self._norm()

        def tail(drawn: Inputs) -> Tensor:
            _set_statistics(norm, drawn)
            features, modulation = drawn["features"], drawn["modulation"]
            statistics = norm.statistics(features)
            return spade_tail(features, modulation, statistics, slope=_SLOPE, impl=impl)

        return self._run(tail)

    def _norm(self) -> BatchNorm2d:
        norm = BatchNorm2d(self.channels, affine=False, eps=_EPS).to(self.place.device)
        return norm.train(self.mode != "eval")


def _set_statistics(norm: BatchNorm2d, drawn: Inputs) -> None:
    if not norm.training:
        norm.running_mean, norm.running_var = drawn["mean"], drawn["var"]
