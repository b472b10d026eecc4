"""Normalise, modulate and activate a map in one pass: the tail of every SPADE."""

from dpsims.ops.spade_tail._choice import resolve_spade_tail_impl as resolve_spade_tail_impl
from dpsims.ops.spade_tail.api import (
    ChannelStatistics as ChannelStatistics,
    channel_moments as channel_moments,
    spade_tail as spade_tail,
)
