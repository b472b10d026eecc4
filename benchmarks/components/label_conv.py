"""The first convolution of a label map: dense on the one-hot map, or rows looked up."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

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
    label_map,
    normal,
    plain,
    random_generator,
    short,
    traced,
    wide,
    with_gradients,
)
from benchmarks.naive import one_hot
from dpsims.nn import LabelConv2d

_FLOAT, _HALF = torch.float32, torch.bfloat16


def cases(place: Place) -> list[Case]:
    """The first layer of DP-SIMS (64 wide) and of OASIS's SPADEs (128 wide)."""
    classes = place.pick(smoke=(5,), cpu=(35, 151), gpu=(35, 151, 183))
    widths = place.pick(smoke=(3,), cpu=(64,), gpu=(64, 128))
    dtypes = place.pick(smoke=(_FLOAT,), cpu=(_FLOAT,), gpu=(_HALF, _FLOAT))
    every = itertools.product(dtypes, classes, widths, (False, True))
    return [_Setting(place, *options).case() for options in every]


@dataclass(frozen=True)
class _Setting:
    """One layer."""

    place: Place
    dtype: torch.dtype
    num_classes: int
    width: int
    backward: bool

    @property
    def side(self) -> int:
        found: int = self.place.pick(smoke=6, cpu=128, gpu=256)
        return found

    @property
    def batch(self) -> int:
        found: int = self.place.pick(smoke=2, cpu=1, gpu=8)
        return found

    def case(self) -> Case:
        direction = "forward+backward" if self.backward else "forward"
        sizes = f"K{self.num_classes} to {self.width} {self.side}x{self.side} b{self.batch}"
        pixels = self.batch * self.side**2
        return Case(
            component="label_conv",
            name=f"{sizes} {short(self.dtype)} {direction}",
            inputs=self.inputs,
            variants=[
                Variant("one-hot", lambda: self._dense(self.dtype)),
                Variant("dpsims", self._lookup),
                Variant("compile", lambda: self._lookup(traced), opaque=True),
            ],
            reference=self.reference,
            tolerance=self.place.tolerance(self.dtype),
            baseline="one-hot",
            axes={
                "classes": self.num_classes,
                "width": self.width,
                "side": self.side,
                "batch": self.batch,
                "dtype": short(self.dtype),
                "pass": direction,
            },
            unit=self.place.unit(self.dtype),
            # labels in, maps out; backward reads labels and the gradient of the maps
            bytes=(2 if self.backward else 1) * pixels * (1 + self.width * self.dtype.itemsize),
            budget=6.0 if self.place.profile == "cpu" else 1.5,
        )

    def inputs(self, rng: torch.Generator) -> Inputs:
        drawn = {"labels": label_map(rng, self.num_classes, self.batch, self.side, self.side)}
        if self.backward:
            shape = (self.batch, self.width, self.side, self.side)
            drawn["upstream"] = normal(rng, *shape, dtype=self.dtype)
        return drawn

    def reference(self, drawn: Inputs) -> Outputs:
        return self._dense(torch.float64)(wide(drawn))

    def _dense(self, dtype: torch.dtype) -> Run:
        conv = self._layer(dtype)

        def function(labels: Tensor) -> Tensor:
            maps = one_hot(labels, self.num_classes, dtype)
            return F.conv2d(maps, conv.weight, conv.bias, padding=1)

        return self._run(function, conv)

    def _lookup(self, wrap: Callable[[Any], Callable[..., Any]] | None = None) -> Run:
        conv = self._layer(self.dtype)
        return self._run(conv if wrap is None else wrap(conv), conv)

    def _layer(self, dtype: torch.dtype) -> LabelConv2d:
        conv = LabelConv2d(self.num_classes, self.width)
        rng = random_generator(torch.device("cpu"), 7)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
        return conv.to(self.place.device, dtype)

    def _run(self, function: Callable[[Tensor], Tensor], conv: LabelConv2d) -> Run:
        def labels_only(drawn: Inputs) -> Tensor:
            return function(drawn["labels"])

        if self.backward:
            return with_gradients(labels_only, [], list(conv.parameters()))
        return plain(labels_only)
