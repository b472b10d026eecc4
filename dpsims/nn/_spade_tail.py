"""Which statistics a SPADE hands to its tail, and when it normalises beforehand instead."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from dpsims.nn._spade_inputs import normalized
from dpsims.nn.norm import BatchNorm2d
from dpsims.ops.spade_tail import _reference
from dpsims.ops.spade_tail._choice import resolve_for
from dpsims.ops.spade_tail.api import ChannelStatistics, spade_tail


class Unmodulated(NamedTuple):
    """Maps, what is left to normalise them by, and how often to repeat rows and columns."""

    maps: Tensor
    statistics: ChannelStatistics | None = None
    upsample: int = 1


def normalize_lazily(norm: nn.Module, features: Tensor, upsample: int = 1) -> Unmodulated:
    """The maps with what is left to do to them: nothing where that gains no pass."""
    # of a single pixel there are moments only after enlarging
    single = upsample > 1 and features.shape[2:].numel() == 1
    if isinstance(norm, BatchNorm2d) and norm.weight is None and not single:
        # processes that share moments must agree, so sizes that differ between them do not decide
        size = None if norm.reduces else features.numel()
        if resolve_for("auto", features, size=size) != "reference":
            return Unmodulated(features, norm.statistics(features, upsample=upsample), upsample)
    return Unmodulated(normalized(norm, features, upsample))


def modulate(features: Unmodulated, modulation: Tensor, slope: float) -> Tensor:
    """The tail of maps that came from :func:`normalize_lazily`."""
    maps, statistics, upsample = features
    if statistics is None and maps.device.type == "cpu":
        # nothing to gain, and at a few pixels per map a second round of checks would be felt
        return _reference.apply(maps, modulation, None, None, 0.0, slope, 1)
    return spade_tail(maps, modulation, statistics, slope=slope, upsample=upsample)
