"""Checks of :class:`dpsims.data.ClassBalancedSampler`."""

from __future__ import annotations

import hashlib
from typing import Any

import torch.distributed as dist
from torch import Tensor

from dpsims._checks import check_int, check_tensor
from dpsims.errors import DistributedError, InputError


def summed(weights: Tensor) -> tuple[Tensor, int, str]:
    """Running sums of the weights, the last index that may be drawn, and a hash."""
    check_tensor("ClassBalancedSampler", "weights", weights, "I")
    values = weights.detach().cpu().double().contiguous()
    # negated, so that NaN is caught as well
    wrong = (~((values >= 0) & (values < float("inf")))).nonzero().flatten()
    if len(wrong):
        index = int(wrong[0])
        msg = (
            "ClassBalancedSampler: weights must be finite and at least 0; "
            f"got {values[index].item()} at {index}"
        )
        raise InputError(msg)
    drawable = values.nonzero().flatten()
    if len(drawable) == 0:
        msg = f"ClassBalancedSampler: weights must not all be 0; got {len(values)} zeros"
        raise InputError(msg)
    fingerprint = hashlib.sha256(values.numpy().tobytes()).hexdigest()
    # scaled, so that sums of huge weights stay finite
    return (values / values.max()).cumsum(0), int(drawable[-1]), fingerprint


def checked_rank(rank: int | None, world_size: int | None, num_samples: int) -> tuple[int, int]:
    """Return rank and number of processes, or say what is wrong with them."""
    owner = "ClassBalancedSampler"
    if (rank is None) != (world_size is None):
        msg = f"{owner}: rank and world_size must be given together; got {rank} and {world_size}"
        raise InputError(msg)
    if rank is None or world_size is None:
        return 0, 1
    check_int(owner, "world_size", world_size)
    check_int(owner, "rank", rank, minimum=0)
    if rank >= world_size:
        msg = f"{owner}: rank must be below world_size={world_size}; got {rank}"
        raise InputError(msg)
    if num_samples < world_size:
        msg = f"{owner}: num_samples must be at least world_size={world_size}; got {num_samples}"
        raise InputError(msg)
    return rank, world_size


def check_agreement(mine: tuple[object, ...], world_size: int) -> None:
    """Raise, on every rank, unless all ranks pass the same values."""
    theirs: list[Any] = [None] * world_size
    dist.all_gather_object(theirs, mine)
    for rank, other in enumerate(theirs):
        if other != theirs[0]:
            msg = (
                "ClassBalancedSampler: seed, num_samples and weights must be the same on all "
                f"ranks; got {theirs[0]} on rank 0 and {other} on rank {rank}"
            )
            raise DistributedError(msg)
