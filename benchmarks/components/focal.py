"""The weighted focal loss of every pixel, forward and backward."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import torch
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
    short,
    traced,
    wide,
    with_gradients,
)
from benchmarks.naive_losses import balanced_cross_entropy, gathered_focal, one_hot_focal
from dpsims.losses import pixel_focal_loss

# channels of the logits (classes and the fake one), and size of the maps
_DATA_SETS = {
    "cityscapes": (36, 256, 512),
    "ade20k": (152, 256, 256),
    "coco_stuff": (184, 256, 256),
}
_FLOAT, _HALF = torch.float32, torch.bfloat16


def cases(place: Place) -> list[Case]:
    """The logits of the three data sets."""
    return [_case(place, *sizes) for sizes in _sizes(place)]


def _sizes(place: Place) -> Iterator[tuple[str, int, int, int, int, torch.dtype]]:
    if place.profile == "smoke":
        yield "tiny", 5, 8, 12, 2, _FLOAT
    for name, (channels, height, width) in _DATA_SETS.items():
        if place.profile == "cpu":
            # the gate is asked at full size, of one data set
            side = 256 if name == "ade20k" else 128
            yield name, channels, side, side, 1, _FLOAT
        if place.profile == "gpu":
            for dtype in (_HALF, _FLOAT):
                yield name, channels, height, width, 8, dtype
    if place.profile == "gpu":
        yield "ade20k", *_DATA_SETS["ade20k"], 64, _HALF


def _case(
    place: Place,
    data_set: str,
    channels: int,
    height: int,
    width: int,
    batch: int,
    dtype: torch.dtype,
) -> Case:
    numbers = batch * channels * height * width
    return Case(
        component="focal",
        name=f"{data_set} {channels}x{height}x{width} b{batch} {short(dtype)}",
        inputs=functools.partial(_inputs, (batch, channels, height, width), dtype),
        variants=_variants(place),
        reference=functools.partial(_reference, one_hot_focal),
        tolerance=place.tolerance(dtype),
        baseline="one-hot",
        axes={
            "data": data_set,
            "channels": channels,
            "height": height,
            "width": width,
            "batch": batch,
            "dtype": short(dtype),
            "logits_bytes": numbers * dtype.itemsize,
        },
        unit=place.unit(dtype),
        # one read, one write of the gradient
        bytes=2 * numbers * dtype.itemsize,
        budget=30.0 if place.profile == "cpu" else 4.0,
    )


def _inputs(shape: tuple[int, int, int, int], dtype: torch.dtype, rng: torch.Generator) -> Inputs:
    batch, channels, height, width = shape
    return {
        "logits": normal(rng, *shape, dtype=dtype),
        "labels": label_map(rng, channels - 1, batch, height, width),
        "weights": normal(rng, channels).exp(),
    }


def _variants(place: Place) -> list[Variant]:
    own = functools.partial(_reference, balanced_cross_entropy)
    variants = [
        Variant("one-hot", lambda: _run(_widened(one_hot_focal))),
        Variant("oasis loss", lambda: _run(_widened(balanced_cross_entropy)), own),
        Variant("gathered", lambda: _run(_widened(gathered_focal))),
        Variant("closed form", lambda: _run(_dpsims("closed_form"))),
        Variant("dpsims", lambda: _run(_dpsims("auto"))),
        Variant("in place", lambda: _run(_in_place), consumes=True, optional=True),
        Variant("compile gathered", lambda: _run(traced(_widened(gathered_focal))), opaque=True),
        Variant("compile dpsims", lambda: _run(traced(_dpsims("auto"))), opaque=True),
        Variant("fused", lambda: _run(_dpsims("fused")), optional=True),
    ]
    return variants + [
        Variant(f"peer {name}", peer.loss, peer.true_loss) for name, peer in place.peers.items()
    ]


def _run(loss: Callable[..., Tensor]) -> Run:
    def function(inputs: Inputs) -> Tensor:
        return loss(inputs["logits"], inputs["labels"], inputs["weights"])

    return with_gradients(function, ["logits"])


def _widened(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A plain form in float32 or better, as autocast would have it."""

    def wide_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        dtype = torch.promote_types(logits.dtype, torch.float32)
        return loss(logits.to(dtype), labels, weights)

    return wide_loss


def _reference(loss: Callable[..., Tensor], inputs: Inputs) -> Outputs:
    return _run(loss)(wide(inputs))


def _in_place(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """The gradient over the logits: behind a view, for those of a discriminator are no leaf."""
    return pixel_focal_loss(
        logits.view_as(logits), labels, class_weights=weights, impl="fused", inplace=True
    )


def _dpsims(impl: str) -> Callable[..., Tensor]:
    def loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        return pixel_focal_loss(logits, labels, class_weights=weights, impl=impl)  # type: ignore[arg-type]

    return loss
