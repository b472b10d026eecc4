"""Which statistics a SPADE hands to its tail, and when it normalises beforehand instead."""

from __future__ import annotations

from torch import Tensor, nn

from dpsims.nn.norm import BatchNorm2d
from dpsims.ops.spade_tail._choice import resolve_for
from dpsims.ops.spade_tail.api import ChannelStatistics


def normalize_lazily(norm: nn.Module, features: Tensor) -> tuple[Tensor, ChannelStatistics | None]:
    """The maps and what is left to normalise them by: nothing where that gains no pass."""
    if not isinstance(norm, BatchNorm2d) or norm.weight is not None:
        return norm(features), None
    # processes that share moments must agree, so sizes that differ between them do not decide
    size = None if norm.reduces else features.numel()
    if resolve_for("auto", features, size=size) == "reference":
        return norm(features), None
    return features, norm.statistics(features)
