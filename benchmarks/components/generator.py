"""Inference of whole generators, from a label map to an image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

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
    replayed,
    traced,
    wide,
)
from benchmarks.models import (
    DP_SIMS,
    DP_SIMS_CITYSCAPES,
    DP_SIMS_TINY,
    OASIS,
    OASIS_TINY,
    SMOKE,
    Model,
    built,
    num_weights,
)
from benchmarks.naive import naive_generator
from dpsims.nn import fold_spectral_norm_

_FLOAT, _HALF = torch.float32, torch.bfloat16


def cases(place: Place) -> list[Case]:
    """Paper sizes and tiny ones, by batch; those that wait for a compiler apart."""
    if place.profile == "smoke":
        return [_case(place, model, 2, _FLOAT, compiled=False) for model in SMOKE]
    if place.profile == "cpu":
        found = [_case(place, model, 1, _FLOAT, compiled=False) for model in (OASIS, DP_SIMS)]
        tiny = itertools.product((OASIS_TINY, DP_SIMS_TINY), (1, 8))
        found += [_case(place, *option, _FLOAT, compiled=False) for option in tiny]
        return [*found, _case(place, OASIS_TINY, 1, _FLOAT, compiled=True)]
    every = itertools.product((False, True), (DP_SIMS, OASIS), (1, 8, 64), (_HALF, _FLOAT))
    # float32 at 64 images says nothing that 8 do not
    wanted = [o for o in every if o[3] == _HALF or (o[2] < 64 and not o[0])]
    found = [_case(place, m, b, dtype, compiled=c) for c, m, b, dtype in wanted]
    return found + [_case(place, DP_SIMS_CITYSCAPES, b, _HALF, compiled=False) for b in (1, 8)]


def _case(place: Place, model: Model, batch: int, dtype: torch.dtype, *, compiled: bool) -> Case:
    def inputs(rng: torch.Generator) -> Inputs:
        return {
            "labels": label_map(rng, model.num_classes, batch, model.height, model.width),
            "latents": normal(rng, batch, model.latent_dim, dtype=dtype),
        }

    def placed(network: nn.Module, wanted: torch.dtype = dtype) -> nn.Module:
        # convolutions of both kinds of device are at home in channels_last, if not in float64
        nhwc = place.device.type == "cuda" and wanted != torch.float64
        layout = torch.channels_last if nhwc else torch.preserve_format
        return network.to(place.device, wanted).to(memory_format=layout)

    def naive(wanted: torch.dtype = dtype) -> nn.Module:
        # as published: no memory format is chosen
        return naive_generator(built(model)).eval().to(place.device, wanted)

    def graph(make: Callable[[], nn.Module]) -> Run:
        return replayed(_images(make()), inputs(random_generator(place.device, 0)))

    def reference(drawn: Inputs) -> Outputs:
        return _images(placed(built(model), torch.float64))(wide(drawn))

    plain_variants = [
        Variant("naive", lambda: _images(naive())),
        Variant("dpsims", lambda: _images(placed(built(model)))),
    ]
    if compiled:
        free = functools.partial(_free_lunches, model, placed)
        folded = functools.partial(_folded, model, placed)
        variants = [
            *plain_variants,
            Variant("compile naive", lambda: _images(traced(free())), opaque=True),
            Variant("compile dpsims", lambda: _images(traced(folded())), opaque=True),
        ]
    else:
        variants = plain_variants
        if dtype == _HALF:
            variants.append(Variant("naive fp32", lambda: _cast(_images(naive(_FLOAT)))))
        if place.device.type == "cuda" and batch == 1:
            folded = functools.partial(_folded, model, placed)
            variants.append(Variant("graph dpsims", lambda: graph(folded), opaque=True))
        if model.architecture == "oasis":
            variants += [
                Variant(
                    f"peer {name}",
                    functools.partial(peer.generator, model, place.device, dtype),
                    functools.partial(peer.true_images, model, place.device),
                )
                for name, peer in place.peers.items()
            ]
    short = "bf16" if dtype == _HALF else "fp32"
    return Case(
        component="generator",
        name=f"{model.name} b{batch} {short}" + (" compiled" if compiled else ""),
        inputs=inputs,
        variants=variants,
        reference=reference,
        tolerance=place.tolerance(dtype),
        baseline="naive",
        axes={
            "model": model.name,
            "batch": batch,
            "dtype": short,
            "compiled": int(compiled),
        },
        unit=place.unit(dtype),
        bytes=_least_bytes(model, batch, dtype),
        budget=place.pick(smoke=1.0, cpu=150.0, gpu=8.0 if batch == 64 else 4.0),
        wall=batch == 1,
        late=compiled,
    )


def _images(network: Callable[..., Any]) -> Run:
    def function(inputs: Inputs) -> Tensor:
        images: Tensor = network(inputs["labels"], inputs["latents"]).images
        return images

    return plain(function)


def _cast(run: Run) -> Run:
    return lambda inputs: run({**inputs, "latents": inputs["latents"].float()})


def _folded(model: Model, placed: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return placed(fold_spectral_norm_(built(model)))


def _free_lunches(model: Model, placed: Callable[[nn.Module], nn.Module]) -> nn.Module:
    """The naive form with what costs nothing: spectral norms folded, memory format chosen."""
    return placed(naive_generator(fold_spectral_norm_(built(model))).eval())


def _least_bytes(model: Model, batch: int, dtype: torch.dtype) -> int:
    """Labels and weights read once, images written once."""
    numbers = num_weights(model) + 3 * batch * model.height * model.width
    return numbers * dtype.itemsize
