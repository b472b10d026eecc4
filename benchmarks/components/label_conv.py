"""The first convolution of a label map: dense on the one-hot map, or rows looked up."""

from __future__ import annotations

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
    label_map,
    normal,
    plain,
    random_generator,
    traced,
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
    return [_case(place, *options) for options in every]


def _case(place: Place, dtype: torch.dtype, num_classes: int, width: int, backward: bool) -> Case:
    side = place.pick(smoke=6, cpu=128, gpu=256)
    batch = place.pick(smoke=2, cpu=1, gpu=8)

    def inputs(rng: torch.Generator) -> Inputs:
        drawn = {"labels": label_map(rng, num_classes, batch, side, side)}
        if backward:
            drawn["upstream"] = normal(rng, batch, width, side, side, dtype=dtype)
        return drawn

    def layer(wanted: torch.dtype) -> LabelConv2d:
        conv = LabelConv2d(num_classes, width)
        rng = random_generator(torch.device("cpu"), 7)
        with torch.no_grad():
            for parameter in conv.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=rng))
        return conv.to(place.device, wanted)

    def run(function: Callable[[Tensor], Tensor], conv: LabelConv2d) -> Run:
        def labels_only(drawn: Inputs) -> Tensor:
            return function(drawn["labels"])

        if backward:
            return with_gradients(labels_only, [], list(conv.parameters()))
        return plain(labels_only)

    def dense(wanted: torch.dtype) -> Run:
        conv = layer(wanted)

        def function(labels: Tensor) -> Tensor:
            maps = one_hot(labels, num_classes, wanted)
            return F.conv2d(maps, conv.weight, conv.bias, padding=1)

        return run(function, conv)

    def lookup(wrap: Callable[..., Callable[..., Tensor]]) -> Run:
        conv = layer(dtype)
        return run(wrap(conv), conv)

    def reference(drawn: Inputs) -> Outputs:
        upstream = {n: v.double() if n == "upstream" else v for n, v in drawn.items()}
        return dense(torch.float64)(upstream)

    short = "bf16" if dtype == _HALF else "fp32"
    written = batch * width * side**2 * dtype.itemsize
    return Case(
        component="label_conv",
        name=f"K{num_classes} to {width} {side}x{side} b{batch} {short} "
        + ("forward+backward" if backward else "forward"),
        inputs=inputs,
        variants=[
            Variant("one-hot", lambda: dense(dtype)),
            Variant("dpsims", lambda: lookup(lambda conv: conv)),
            Variant("compile", lambda: lookup(traced), opaque=True),
        ],
        reference=reference,
        tolerance=place.tolerance(dtype),
        baseline="one-hot",
        axes={
            "classes": num_classes,
            "width": width,
            "side": side,
            "batch": batch,
            "dtype": short,
            "pass": "forward+backward" if backward else "forward",
        },
        unit=place.unit(dtype),
        # labels in, maps out; backward reads the gradient of the maps
        bytes=(2 if backward else 1) * (written + batch * side**2),
        budget=6.0 if place.profile == "cpu" else 1.5,
    )
