"""Moments of every channel over the maps of all processes, on any backend."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F

from dpsims.ops.spade_tail.api import channel_moments


def world_size() -> int:
    """How many processes share the statistics."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return 1
    return distributed.get_world_size()


class AllReduceSum(torch.autograd.Function):
    """Sum over all processes; the gradient of a sum is the sum of the gradients."""

    @staticmethod
    def forward(ctx: FunctionCtx, value: Tensor) -> Tensor:  # noqa: ARG004
        total = value.contiguous().clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: FunctionCtx, grad: Tensor) -> Any:  # noqa: ARG004
        return AllReduceSum.apply(grad)


def group_moments(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and biased variance per channel over the maps of all processes.

    Each process fills its own row of a table of zeros, so one sum serves as a gather. Moments are
    combined around the common mean: a difference of squares would cancel for large means.
    """
    channels = maps.shape[1]
    if not torch.is_grad_enabled():
        mean, var = channel_moments(maps)
    elif maps.numel() == 0:
        # sums of nothing: zeros that still take part in the backward collective
        mean = var = maps.sum((0, 2, 3))
    else:
        var, mean = torch.var_mean(maps, (0, 2, 3), correction=0)
    count = mean.new_full((1,), maps.numel() // channels)
    row = torch.cat((count, mean, var))
    rank, world = distributed.get_rank(), distributed.get_world_size()
    table: Tensor = AllReduceSum.apply(F.pad(row[None], (0, 0, rank, world - 1 - rank)))
    counts, means, variances = table.split((1, channels, channels), dim=1)
    count = counts.sum()
    share = counts / count
    mean = (share * means).sum(0)
    return count, mean, (share * (variances + (means - mean).square())).sum(0)
