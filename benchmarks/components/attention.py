"""Cross-attention noise injection and self-attention, at the sizes of the label pyramid."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
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
    normal,
    plain,
    random_generator,
    replayed,
    short,
    traced,
    wide,
    with_gradients,
)
from dpsims.nn import CrossAttentionNoiseInjector, SelfAttention2d

_CHANNELS, _TOKEN_DIM = 64, 256
_FLOAT, _HALF = torch.float32, torch.bfloat16
# map reads and writes: forward reads and writes it; backward reads the map and the gradient from
# above, and writes one
_PASSES = {False: 2, True: 5}


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
            # a compiler takes seconds for every case
            compiled = _is_compiled(place, dtype, side, count)
            setting = _Setting(place, "cross", side, count, batch, dtype, backward, compiled)
            found.append(setting.case())
        compiled = _is_compiled(place, dtype, side, 8)
        found.append(_Setting(place, "self", side, 0, batch, dtype, backward, compiled).case())
    if place.profile == "gpu":
        for kind, side in itertools.product(("cross", "self"), sides):
            found.append(_Setting(place, kind, side, 8, 1, _HALF, False, False).case())
    return found


def _is_compiled(place: Place, dtype: torch.dtype, side: int, tokens: int) -> bool:
    if place.profile == "gpu":
        return dtype == _HALF or tokens == 8
    return side in (4, 64) and tokens in (3, 8)


@dataclass(frozen=True)
class _Setting:
    """One module on one size of maps."""

    place: Place
    kind: str
    side: int
    tokens: int
    batch: int
    dtype: torch.dtype
    backward: bool
    compiled: bool

    def case(self) -> Case:
        name = f"{self.kind} {self.side}x{self.side}"
        name += f" T{self.tokens}" if self.kind == "cross" else ""
        direction = "forward+backward" if self.backward else "forward"
        numbers = self.batch * _CHANNELS * self.side**2
        return Case(
            component="attention",
            name=f"{name} b{self.batch} {short(self.dtype)} {direction}",
            inputs=self.inputs,
            variants=self.variants(),
            reference=self.reference,
            tolerance=self.place.tolerance(self.dtype),
            baseline="eager",
            axes={
                "kind": self.kind,
                "side": self.side,
                "tokens": self.tokens,
                "batch": self.batch,
                "dtype": short(self.dtype),
                "pass": direction,
            },
            unit=self.place.unit(self.dtype),
            bytes=_PASSES[self.backward] * numbers * self.dtype.itemsize,
            budget=2.0 if self.place.profile == "cpu" else 1.0,
            wall=self.batch == 1,
        )

    def inputs(self, rng: torch.Generator) -> Inputs:
        shape = (self.batch, _CHANNELS, self.side, self.side)
        drawn = {"features": normal(rng, *shape, dtype=self.dtype)}
        if self.kind == "cross":
            drawn["tokens"] = normal(rng, self.batch, self.tokens, _TOKEN_DIM, dtype=self.dtype)
        if self.backward:
            drawn["upstream"] = normal(rng, *shape, dtype=self.dtype)
        return drawn

    def reference(self, drawn: Inputs) -> Outputs:
        return self._run("reference", dtype=torch.float64)(wide(drawn))

    def variants(self) -> list[Variant]:
        run = self._run
        found = [
            Variant("eager", lambda: run("reference")),
            Variant("sdpa", lambda: run("sdpa")),
            Variant("fused", lambda: run("fused"), opaque=True, optional=True),
        ]
        if self.kind == "cross":
            found.append(Variant("folded", lambda: run("folded")))
        if self.compiled:
            found.append(Variant("compile", lambda: run("sdpa", traced), opaque=True))
            if self.kind == "cross":
                build = functools.partial(run, "folded", traced)
                found.append(Variant("compile folded", build, opaque=True))
        if self.batch == 1 and self.place.profile == "gpu":
            for impl in ("sdpa", "fused"):
                build = functools.partial(self._graph, impl)
                found.append(Variant(f"graph {impl}", build, opaque=True, optional=True))
        return found

    def _run(
        self,
        impl: str,
        wrap: Callable[[Any], Callable[..., Any]] | None = None,
        dtype: torch.dtype | None = None,
    ) -> Run:
        module = _module(self.kind, impl).to(self.place.device, dtype or self.dtype)
        forward = module if wrap is None else wrap(module)
        names = ["features", "tokens"] if self.kind == "cross" else ["features"]

        def function(inputs: Inputs) -> Tensor:
            result: Tensor = forward(*(inputs[name] for name in names))
            return result

        if self.backward:
            return with_gradients(function, names, list(module.parameters()))
        return plain(function)

    def _graph(self, impl: str) -> Run:
        return replayed(self._run(impl), self.inputs(random_generator(self.place.device, 0)))


def _module(kind: str, impl: str) -> nn.Module:
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
    return module
