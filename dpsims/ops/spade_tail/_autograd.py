"""Forward and backward of the SPADE tail, out of the pieces of an implementation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dpsims.ops.spade_tail import _closed_form, _library, _reference
from dpsims.ops.spade_tail._reference import AllReduce


def tail(
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    num_values: int | Tensor | None,
    all_reduce: AllReduce | None,
    eps: float,
    slope: float,
    upsample: int,
    *,
    fused: bool,
) -> Tensor:
    """The tail by the operators of `_library` or, not fused, by those of `_closed_form`."""
    wanted = features.requires_grad or modulation.requires_grad
    if torch.is_grad_enabled() and wanted:
        out: Tensor = _Tail.apply(
            features, modulation, mean, var, num_values, all_reduce, eps, slope, upsample, fused
        )
        return out
    if fused:
        return _library.apply(features, modulation, mean, var, eps, slope, upsample, False)[0]
    return _closed_form.apply(features, modulation, mean, var, eps, slope, upsample)


class _Tail(torch.autograd.Function):
    """A second derivative is taken through the formula of the first one, in plain torch."""

    @staticmethod
    def forward(
        ctx: Any,
        features: Tensor,
        modulation: Tensor,
        mean: Tensor | None,
        var: Tensor | None,
        num_values: int | Tensor | None,
        all_reduce: AllReduce | None,
        eps: float,
        slope: float,
        upsample: int,
        fused: bool,
    ) -> Tensor:
        inputs = (features, modulation, mean, var)
        rest: Tensor | None = None
        if fused:
            out, rest = _library.apply(*inputs, eps, slope, upsample, slope != 1)
        else:
            out = _closed_form.apply(*inputs, eps, slope, upsample)
            rest = out if slope != 1 else None
        ctx.save_for_backward(*inputs, rest)
        ctx.num_values, ctx.all_reduce, ctx.fused = num_values, all_reduce, fused
        ctx.scalars = (eps, slope, upsample)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        features, modulation, mean, var, rest = ctx.saved_tensors
        moments, group = (mean, var), (ctx.num_values, ctx.all_reduce)
        # a compiler refuses the closed form's strided `out=`, and fuses the formula by itself
        if torch.is_grad_enabled() or (torch.compiler.is_compiling() and not ctx.fused):
            both = _reference.gradients(grad, features, modulation, *moments, *group, *ctx.scalars)
        elif ctx.fused:
            inputs = (grad, features, modulation, rest)
            both = _fused_gradients(inputs, mean, var, *group, ctx.scalars)
        else:
            both = _closed_form.gradients(
                grad, features, modulation, rest, *moments, *group, *ctx.scalars
            )
        return *both, *(None,) * 8


def _fused_gradients(
    inputs: tuple[Tensor, Tensor, Tensor, Tensor],
    mean: Tensor | None,
    var: Tensor | None,
    num_values: int | Tensor | None,
    all_reduce: AllReduce | None,
    scalars: tuple[float, float, int],
) -> tuple[Tensor, Tensor]:
    shares = None
    if mean is not None and var is not None and num_values is not None:
        sums = _library.sums(*inputs, mean, var, *scalars)
        shares = (sums if all_reduce is None else all_reduce(sums)) / num_values
    return _library.gradients(*inputs, mean, var, shares, *scalars)
