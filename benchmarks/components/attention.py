"""Cross-attention noise injection and self-attention, at the sizes of the label pyramid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.cases import (
    Case,
    Inputs,
    Outputs,
    Place,
    Run,
    Variant,
    normal,
    plain,
    random_generator,
    replayed,
    traced,
    wide,
    with_gradients,
)
from dpsims.nn import CrossAttentionNoiseInjector, SelfAttention2d

_CHANNELS, _TOKEN_DIM = 64, 256
_FLOAT, _HALF = torch.float32, torch.bfloat16


def cases(place: Place) -> list[Case]:
    """Every resolution with attention, from one noise token to 64."""
    sides = place.pick(smoke=(4,), cpu=(8, 16, 32, 64), gpu=(8, 16, 32, 64))
    tokens = place.pick(smoke=(3,), cpu=(1, 8, 64), gpu=(1, 8, 64))
    # bf16 on a CPU without bf16 units runs many times slower than float32 and says nothing
    dtypes = place.pick(smoke=(_FLOAT,), cpu=(_FLOAT,), gpu=(_HALF, _FLOAT))
    batch = place.pick(smoke=2, cpu=1, gpu=64)
    found = []
    for dtype, side, backward in itertools.product(dtypes, sides, (False, True)):
        for count in tokens:
            # a compiler takes seconds for every case: float32 is compiled for one count only
            compiled = dtype == _HALF or count == tokens[-1] or place.profile != "gpu"
            found.append(_case(place, "cross", side, count, batch, dtype, backward, compiled))
        found.append(_case(place, "self", side, 0, batch, dtype, backward, True))
    if place.profile == "gpu":
        for kind, side in itertools.product(("cross", "self"), sides):
            found.append(_case(place, kind, side, 8, 1, _HALF, False, False))
    return found


def _case(
    place: Place,
    kind: str,
    side: int,
    tokens: int,
    batch: int,
    dtype: torch.dtype,
    backward: bool,
    compiled: bool,
) -> Case:
    def inputs(rng: torch.Generator) -> Inputs:
        drawn = {"features": normal(rng, batch, _CHANNELS, side, side, dtype=dtype)}
        if kind == "cross":
            drawn["tokens"] = normal(rng, batch, tokens, _TOKEN_DIM, dtype=dtype)
        if backward:
            drawn["upstream"] = normal(rng, batch, _CHANNELS, side, side, dtype=dtype)
        return drawn

    module = functools.partial(_module, kind, place.device)
    run = functools.partial(_run, kind, backward)

    def make(impl: str, wrap: Callable[..., Callable[..., Tensor]]) -> Run:
        return run(module(impl, dtype), wrap)

    def reference(drawn: Inputs) -> Outputs:
        return run(module("reference", torch.float64), _same)(wide(drawn))

    variants = [
        Variant("eager", lambda: make("reference", _same)),
        Variant("sdpa", lambda: make("sdpa", _same)),
        *([Variant("folded", lambda: make("folded", _same))] if kind == "cross" else []),
        Variant("fused", lambda: make("fused", _same), opaque=True, optional=True),
    ]
    if compiled:
        variants.append(Variant("compile", lambda: make("sdpa", traced), opaque=True))
    if compiled and kind == "cross":
        build = functools.partial(make, "folded", traced)
        variants.append(Variant("compile folded", build, opaque=True))
    if batch == 1 and place.profile == "gpu":
        for impl in ("sdpa", "fused"):
            build = functools.partial(_graphed, make, impl, inputs)
            variants.append(Variant(f"graph {impl}", build, opaque=True, optional=True))
    # read the map and write it; backward reads it and two gradients' worth more
    moved = (5 if backward else 2) * batch * _CHANNELS * side**2 * dtype.itemsize
    name = f"{kind} {side}x{side}" + (f" T{tokens}" if kind == "cross" else "")
    name += f" b{batch} {_short(dtype)} {'forward+backward' if backward else 'forward'}"
    return Case(
        component="attention",
        name=name,
        inputs=inputs,
        variants=variants,
        reference=reference,
        tolerance=place.tolerance(dtype),
        baseline="eager",
        axes={
            "kind": kind,
            "side": side,
            "tokens": tokens,
            "batch": batch,
            "dtype": _short(dtype),
            "pass": "forward+backward" if backward else "forward",
        },
        unit=place.unit(dtype),
        bytes=moved,
        budget=2.0 if place.profile == "cpu" else 1.0,
        wall=batch == 1,
    )


def _module(kind: str, device: torch.device, impl: str, dtype: torch.dtype) -> nn.Module:
    """The same weights whatever the implementation; the gate is open."""
    if kind == "cross":
        module: nn.Module = CrossAttentionNoiseInjector(_CHANNELS, _TOKEN_DIM, impl=impl)
    else:
        module = SelfAttention2d(_CHANNELS, impl=impl)
    rng = random_generator(torch.device("cpu"), 7)
    with torch.no_grad():
        for parameter in module.parameters():
            fan = max(parameter[0].numel(), 4)
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * fan**-0.5)
    return module.to(device, dtype)


def _run(kind: str, backward: bool, module: nn.Module, wrap: Callable[..., object]) -> Run:
    forward = wrap(module)
    names = ["features", "tokens"] if kind == "cross" else ["features"]

    def function(inputs: Inputs) -> Tensor:
        return forward(*(inputs[name] for name in names))  # type: ignore[operator]

    if backward:
        return with_gradients(function, names, list(module.parameters()))
    return plain(function)


def _graphed(
    make: Callable[..., Run], impl: str, inputs: Callable[[torch.Generator], Inputs]
) -> Run:
    return replayed(make(impl, _same), inputs(random_generator(torch.device("cuda"), 0)))


def _same(module: nn.Module) -> nn.Module:
    return module


def _short(dtype: torch.dtype) -> str:
    return "bf16" if dtype == _HALF else "fp32"
