"""InfoNCE over patches: image by image in a loop, or all at once."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.cases import (
    Case,
    Inputs,
    Place,
    Run,
    Variant,
    normal,
    traced,
    wide,
    with_gradients,
)
from benchmarks.naive_losses import looped_nce
from dpsims.losses._patches import patch_nce

_LEVELS = 3
_TEMPERATURE = 0.3


def cases(place: Place) -> list[Case]:
    """Three scales, 128 patches of width 256, as in the paper."""
    return [_case(place, b) for b in place.pick(smoke=(2,), cpu=(1, 8), gpu=(1, 8, 64))]


def _case(place: Place, batch: int) -> Case:
    patches, dim = place.pick(smoke=(5, 4), cpu=(128, 256), gpu=(128, 256))
    return Case(
        component="info_nce",
        name=f"{_LEVELS}x{patches}x{dim} b{batch} fp32 forward+backward",
        inputs=functools.partial(_inputs, (batch, patches, dim)),
        variants=[
            Variant("loop", lambda: _run(looped_nce)),
            Variant("dpsims", lambda: _run(_by_level)),
            Variant("stacked", lambda: _run(_stacked)),
            Variant("compile stacked", lambda: _run(traced(_stacked)), opaque=True),
        ],
        reference=lambda drawn: _run(looped_nce)(wide(drawn)),
        tolerance=place.tolerance(torch.float32),
        baseline="loop",
        axes={"batch": batch, "patches": patches, "dim": dim, "dtype": "fp32"},
        unit=place.unit(torch.float32),
        # both vectors in, the queries' gradient out
        bytes=3 * _LEVELS * batch * patches * dim * 4,
        budget=4.0 if place.profile == "cpu" else 1.5,
        wall=batch == 1,
    )


def _inputs(shape: tuple[int, int, int], rng: torch.Generator) -> Inputs:
    names = [f"{kind}{i}" for kind in ("query", "positive") for i in range(_LEVELS)]
    return {name: normal(rng, *shape) for name in names}


def _run(loss: Callable[..., Tensor]) -> Run:
    def function(drawn: Inputs) -> Tensor:
        levels = [(drawn[f"query{i}"], drawn[f"positive{i}"]) for i in range(_LEVELS)]
        return loss(levels, _TEMPERATURE)

    return with_gradients(function, [f"query{i}" for i in range(_LEVELS)])


def _by_level(levels: list[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """One product a level, as ``PatchInfoNCE`` does it."""
    losses = [_group(queries, positives, temperature).mean() for queries, positives in levels]
    return torch.stack(losses).sum()


def _stacked(levels: list[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """One product for all levels."""
    queries, positives = (torch.cat(maps) for maps in zip(*levels, strict=True))
    return _group(queries, positives, temperature).mean() * len(levels)


def _group(queries: Tensor, positives: Tensor, temperature: float) -> Tensor:
    own = torch.eye(queries.shape[1], dtype=torch.bool, device=queries.device)
    return patch_nce(
        queries,
        positives,
        positives,
        temperature=temperature,
        normalize=True,
        excluded=own.expand(len(queries), -1, -1),
    )
