"""Which statistics a SPADE hands to its tail, and when it normalises beforehand instead."""

from __future__ import annotations

from torch import Tensor, nn

from dpsims.nn.norm import BatchNorm2d
from dpsims.ops.spade_tail import _reference
from dpsims.ops.spade_tail._choice import resolve_for
from dpsims.ops.spade_tail.api import ChannelStatistics, spade_tail


def normalize_lazily(norm: nn.Module, features: Tensor) -> tuple[Tensor, ChannelStatistics | None]:
    """The maps and what is left to normalise them by: nothing where that gains no pass."""
    if not isinstance(norm, BatchNorm2d) or norm.weight is not None:
        return norm(features), None
    # processes that share moments must agree, so sizes that differ between them do not decide
    size = None if norm.reduces else features.numel()
    if resolve_for("auto", features, size=size) == "reference":
        return norm(features), None
    return features, norm.statistics(features)


def modulate(
    features: Tensor, modulation: Tensor, statistics: ChannelStatistics | None, slope: float
) -> Tensor:
    """The tail of maps that came from :func:`normalize_lazily`."""
    if statistics is None and features.device.type == "cpu":
        # nothing to gain, and at a few pixels per map a second round of checks would be felt
        return _reference.apply(features, modulation, None, None, 0.0, slope, 1)
    return spade_tail(features, modulation, statistics, slope=slope)
