"""How the kernels of the SPADE tail cut their maps into tiles, and tiles into programs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from dpsims.ops._launch import ceil_div, is_flat, power_of_two, reach
from dpsims.ops.spade_tail._layout import joined_columns, signs_are_by_channel

_TILE = 2048
# programs of a reduction: several for each of a large GPU's processors
_PROGRAMS = 1024
# tiles that a program of the moments adds up around the mean of its first one
_MAX_TILES = 64
_INT32 = 2**31


def tile_sizes(features: Tensor, upsample: int, *maps: Tensor) -> dict[str, Any]:
    """Tile and index width for a set of maps."""
    channels, pixels = features.shape[1], num_pixels(features)
    columns = joined_columns(features, upsample)
    if signs_are_by_channel(features):
        block_c = min(max(power_of_two(channels), 8), 128)
        block_p = min(power_of_two(pixels), _TILE // block_c)
    else:
        block_p = min(max(power_of_two(pixels), 8), _TILE // 2 // columns)
        block_c = min(power_of_two(channels), _TILE // (block_p * columns))
    return {
        "UP": upsample,
        "COLUMNS": columns,
        "BY_CHANNEL": signs_are_by_channel(features),
        "FLAT": upsample == 1 and all(is_flat(value) for value in maps),
        "WIDE": any(_extent(value) >= _INT32 for value in maps),
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
        # stated, for Triton is about to change what it does unless told
        "enable_fp_fusion": True,
    }


def shares_of_tiles(features: Tensor, sizes: dict[str, Any]) -> tuple[int, int, int]:
    """How a reduction is split: all tiles, tiles per program, programs per tile of channels."""
    tiles = features.shape[0] * ceil_div(num_pixels(features), sizes["BLOCK_P"])
    wanted = ceil_div(_PROGRAMS, ceil_div(features.shape[1], sizes["BLOCK_C"]))
    share = min(ceil_div(tiles, wanted), _MAX_TILES)
    return tiles, share, ceil_div(tiles, share)


def grid(features: Tensor, sizes: dict[str, Any]) -> tuple[int]:
    """One program for every tile of every image."""
    batch, channels = features.shape[:2]
    tiles = ceil_div(channels, sizes["BLOCK_C"])
    return (batch * tiles * ceil_div(num_pixels(features), sizes["BLOCK_P"]),)


def num_pixels(features: Tensor) -> int:
    """Of one image."""
    return features.shape[2] * features.shape[3]


def _extent(value: Tensor) -> int:
    """Above every index and offset that tiles of an image may have; they run over its end."""
    return max(reach(value), value.shape[1:].numel()) + _TILE * max(value.stride()[1:])
