"""The SPADE tail on a GPU: two reductions and two elementwise kernels, each one read per input.

Every kernel works on tiles of channels by pixels of one image and takes the strides of each map,
so that no memory format needs a copy. A pixel is one of the features; where they are upsampled, it
stands for a square of pixels of the other maps. Arithmetic is in float32. Nothing waits for the
device, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsims.ops._launch import is_flat, map_strides, on, reach
from dpsims.ops.spade_tail._layout import (
    empty_result,
    empty_signs,
    signs_are_by_channel,
    signs_sizes,
)

_TILE = 2048
# programs of a reduction: several for each of a large GPU's processors
_PROGRAMS = 1024
# tiles that a program of the moments adds up around the mean of its first one
_MAX_TILES = 64
_INT32 = 2**31


@triton.jit
def _spatial(
    p,
    width,
    s_h,
    s_w,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    UP: tl.constexpr,
    FLAT: tl.constexpr,
):
    """Offset of a pixel inside a plane."""
    if FLAT:
        return p * s_w
    else:  # noqa: RET505  Triton compiles only one of two branches, not what follows them
        return (p // width * UP + ROW) * s_h + (p % width * UP + COLUMN) * s_w


@triton.jit
def _tile(c_tile, p_tile, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, WIDE: tl.constexpr):
    """Channels as a column and pixels as a row."""
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    p = p_tile * BLOCK_P + tl.arange(0, BLOCK_P)[None, :]
    if WIDE:
        c = c.to(tl.int64)
        p = p.to(tl.int64)
    return c, p


@triton.jit
def _place(
    channels, pixels, BY_CHANNEL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Image and tile of this program; neighbours in memory run beside each other."""
    pid = tl.program_id(0)
    c_tiles = tl.cdiv(channels, BLOCK_C)
    p_tiles = tl.cdiv(pixels, BLOCK_P)
    if BY_CHANNEL:
        c_tile = pid % c_tiles
        p_tile = pid // c_tiles % p_tiles
    else:
        p_tile = pid % p_tiles
        c_tile = pid // p_tiles % c_tiles
    image = pid // (c_tiles * p_tiles)
    return image.to(tl.int64), c_tile, p_tile


@triton.jit
def _statistics(mean_ptr, var_ptr, c, channels, eps):
    mean = tl.load(mean_ptr + c, mask=c < channels, other=0.0)
    var = tl.load(var_ptr + c, mask=c < channels, other=1.0)
    return mean, 1.0 / tl.sqrt(var + eps)


@triton.jit
def _pack(bits, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Eight neighbours of a row in one byte."""
    groups = tl.reshape(bits.to(tl.int32), (ROWS, COLUMNS // 8, 8))
    return tl.sum(groups << tl.arange(0, 8)[None, None, :], axis=2).to(tl.uint8)


@triton.jit
def _activated(grad, signs_ptr, c, p, row, inside, slope, BY_CHANNEL: tl.constexpr):
    """Gradient behind the activation, by the signs that the forward left."""
    if BY_CHANNEL:
        at = p * row + c // 8
        bit = c % 8
    else:
        at = c * row + p // 8
        bit = p % 8
    byte = tl.load(signs_ptr + at, mask=inside, other=0).to(tl.int32)
    return tl.where(((byte >> bit) & 1) != 0, grad, grad * slope)


@triton.jit
def apply_kernel(
    x_ptr, m_ptr, mean_ptr, var_ptr, y_ptr, signs_ptr,
    channels, pixels, width, beta, plane, row,
    x_b, x_c, x_h, x_w, m_b, m_c, m_h, m_w, y_b, y_c, y_h, y_w,
    eps, slope,
    NORMALIZE: tl.constexpr, ACTIVATE: tl.constexpr, SAVE: tl.constexpr,
    WHOLE: tl.constexpr, SHIFT: tl.constexpr,
    UP: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BY_CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``x * (1 + gamma) + beta``; ``x * gamma + beta`` if gamma is whole; with no beta without."""
    image, c_tile, p_tile = _place(channels, pixels, BY_CHANNEL, BLOCK_C, BLOCK_P)
    c, p = _tile(c_tile, p_tile, BLOCK_C, BLOCK_P, WIDE)
    inside = (c < channels) & (p < pixels)
    x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, 0, 0, 1, FLAT)
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        mean, rstd = _statistics(mean_ptr, var_ptr, c, channels, eps)
        x = (x - mean) * rstd
    for k in tl.static_range(UP * UP):
        m_at = m_ptr + image * m_b + c * m_c
        m_at += _spatial(p, width, m_h, m_w, k // UP, k % UP, UP, FLAT)
        gamma = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
        if not WHOLE:
            gamma += 1.0
        y = x * gamma
        if SHIFT:
            y += tl.load(m_at + beta, mask=inside, other=0.0).to(tl.float32)
        if SAVE:
            signs_at = signs_ptr + (image * (UP * UP) + k) * plane
            if BY_CHANNEL:
                bits = _pack(tl.trans((y > 0) & inside), BLOCK_P, BLOCK_C)
                c8 = c_tile * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)[None, :]
                p8 = tl.trans(p)
                tl.store(signs_at + p8 * row + c8, bits, mask=(p8 < pixels) & (c8 < row))
            else:
                bits = _pack((y > 0) & inside, BLOCK_C, BLOCK_P)
                p8 = p_tile * (BLOCK_P // 8) + tl.arange(0, BLOCK_P // 8)[None, :]
                tl.store(signs_at + c * row + p8, bits, mask=(c < channels) & (p8 < row))
        if ACTIVATE:
            y = tl.where(y > 0, y, y * slope)
        y_at = y_ptr + image * y_b + c * y_c
        y_at += _spatial(p, width, y_h, y_w, k // UP, k % UP, UP, FLAT)
        tl.store(y_at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def moments_kernel(
    x_ptr, means_ptr, squares_ptr, counts_ptr,
    channels, pixels, width, tiles, share, splits,
    x_b, x_c, x_h, x_w,
    FLAT: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Count, mean and sum of squared deviations of a share of the tiles."""
    split = tl.program_id(0) % splits
    c_tile = tl.program_id(0) // splits
    p_tiles = tl.cdiv(pixels, BLOCK_P)
    first = split * share
    last = tl.minimum(first + share, tiles)
    c, p = _tile(c_tile, first % p_tiles, BLOCK_C, BLOCK_P, WIDE)
    image = (first // p_tiles).to(tl.int64)
    inside = (c < channels) & (p < pixels)
    x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, 0, 0, 1, FLAT)
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    count = tl.minimum(pixels - first % p_tiles * BLOCK_P, BLOCK_P)
    # sums around a value near the mean do not cancel
    origin = (tl.sum(x, axis=1) / count)[:, None]
    gap = tl.where(inside, x - origin, 0.0)
    total = gap
    squares = gap * gap
    for tile in range(first + 1, last):
        c, p = _tile(c_tile, tile % p_tiles, BLOCK_C, BLOCK_P, WIDE)
        image = (tile // p_tiles).to(tl.int64)
        inside = (c < channels) & (p < pixels)
        x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, 0, 0, 1, FLAT)
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        gap = tl.where(inside, x - origin, 0.0)
        total += gap
        squares += gap * gap
        count += tl.minimum(pixels - tile % p_tiles * BLOCK_P, BLOCK_P)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)[:, None]
    offset = tl.sum(total, axis=1)[:, None] / count
    spread = tl.sum(squares, axis=1)[:, None] - offset * offset * count
    spread = tl.where(spread < 0, 0.0, spread)
    at = split * channels + c
    tl.store(means_ptr + at, origin + offset, mask=c < channels)
    tl.store(squares_ptr + at, spread, mask=c < channels)
    if c_tile == 0:
        tl.store(counts_ptr + split, count.to(tl.float32))


@triton.jit
def combine_kernel(
    means_ptr, squares_ptr, counts_ptr, mean_ptr, var_ptr,
    channels, splits, total,
    BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Moments of all tiles from those of the shares."""
    c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    mean = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < splits) & (c < channels)
        part = tl.load(means_ptr + s * channels + c, mask=inside, other=0.0)
        mean += part * (tl.load(counts_ptr + s, mask=s < splits, other=0.0) / total)
    mean = tl.sum(mean, axis=0)[None, :]
    squares = tl.zeros((BLOCK_S, BLOCK_C), tl.float32)
    for start in range(0, splits, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)[:, None]
        inside = (s < splits) & (c < channels)
        gap = tl.load(means_ptr + s * channels + c, mask=inside, other=0.0) - mean
        gap = tl.where(inside, gap, 0.0)
        count = tl.load(counts_ptr + s, mask=s < splits, other=0.0)
        squares += tl.load(squares_ptr + s * channels + c, mask=inside, other=0.0)
        squares += gap * gap * count
    var = tl.sum(squares, axis=0)[None, :] / total
    tl.store(mean_ptr + c, mean, mask=c < channels)
    tl.store(var_ptr + c, var, mask=c < channels)


@triton.jit
def sums_kernel(
    g_ptr, x_ptr, m_ptr, signs_ptr, mean_ptr, var_ptr, parts_ptr,
    channels, pixels, width, plane, row, tiles, share, splits,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, m_b, m_c, m_h, m_w,
    eps, slope,
    ACTIVATE: tl.constexpr, UP: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient by the normalised features, plain and times them, of a share."""
    split = tl.program_id(0) % splits
    c_tile = tl.program_id(0) // splits
    p_tiles = tl.cdiv(pixels, BLOCK_P)
    plain = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    times = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    c, p = _tile(c_tile, 0, BLOCK_C, BLOCK_P, WIDE)
    mean, rstd = _statistics(mean_ptr, var_ptr, c, channels, eps)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        c, p = _tile(c_tile, tile % p_tiles, BLOCK_C, BLOCK_P, WIDE)
        image = (tile // p_tiles).to(tl.int64)
        inside = (c < channels) & (p < pixels)
        x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, 0, 0, 1, FLAT)
        x = (tl.load(x_at, mask=inside, other=0.0).to(tl.float32) - mean) * rstd
        for k in tl.static_range(UP * UP):
            g_at = g_ptr + image * g_b + c * g_c
            g_at += _spatial(p, width, g_h, g_w, k // UP, k % UP, UP, FLAT)
            m_at = m_ptr + image * m_b + c * m_c
            m_at += _spatial(p, width, m_h, m_w, k // UP, k % UP, UP, FLAT)
            grad = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
            gamma = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATE:
                signs_at = signs_ptr + (image * (UP * UP) + k) * plane
                grad = _activated(grad, signs_at, c, p, row, inside, slope, BY_CHANNEL)
            grad = tl.where(inside, grad * (1.0 + gamma), 0.0)
            plain += grad
            times += tl.where(inside, grad * x, 0.0)
    c = c_tile * BLOCK_C + tl.arange(0, BLOCK_C)
    at = split * channels + c
    tl.store(parts_ptr + at, tl.sum(plain, axis=1), mask=c < channels)
    tl.store(parts_ptr + splits * channels + at, tl.sum(times, axis=1), mask=c < channels)


@triton.jit
def gradients_kernel(
    g_ptr, x_ptr, m_ptr, signs_ptr, mean_ptr, var_ptr, shares_ptr, dx_ptr, dm_ptr,
    channels, pixels, width, plane, row, beta,
    g_b, g_c, g_h, g_w, x_b, x_c, x_h, x_w, m_b, m_c, m_h, m_w,
    dx_b, dx_c, dx_h, dx_w, dm_b, dm_c, dm_h, dm_w,
    eps, slope,
    NORMALIZE: tl.constexpr, SHARES: tl.constexpr, ACTIVATE: tl.constexpr,
    UP: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr, BY_CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    image, c_tile, p_tile = _place(channels, pixels, BY_CHANNEL, BLOCK_C, BLOCK_P)
    c, p = _tile(c_tile, p_tile, BLOCK_C, BLOCK_P, WIDE)
    inside = (c < channels) & (p < pixels)
    x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, 0, 0, 1, FLAT)
    x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    if NORMALIZE:
        mean, rstd = _statistics(mean_ptr, var_ptr, c, channels, eps)
        x = (x - mean) * rstd
    inner = tl.zeros((BLOCK_C, BLOCK_P), tl.float32)
    for k in tl.static_range(UP * UP):
        g_at = g_ptr + image * g_b + c * g_c
        g_at += _spatial(p, width, g_h, g_w, k // UP, k % UP, UP, FLAT)
        m_at = m_ptr + image * m_b + c * m_c
        m_at += _spatial(p, width, m_h, m_w, k // UP, k % UP, UP, FLAT)
        grad = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATE:
            signs_at = signs_ptr + (image * (UP * UP) + k) * plane
            grad = _activated(grad, signs_at, c, p, row, inside, slope, BY_CHANNEL)
        dm_at = dm_ptr + image * dm_b + c * dm_c
        dm_at += _spatial(p, width, dm_h, dm_w, k // UP, k % UP, UP, FLAT)
        tl.store(dm_at, (grad * x).to(dm_ptr.dtype.element_ty), mask=inside)
        tl.store(dm_at + beta, grad.to(dm_ptr.dtype.element_ty), mask=inside)
        inner += grad * (1.0 + gamma)
    if SHARES:
        inner -= tl.load(shares_ptr + c, mask=c < channels, other=0.0)
        inner -= x * tl.load(shares_ptr + channels + c, mask=c < channels, other=0.0)
    if NORMALIZE:
        inner *= rstd
    dx_at = dx_ptr + image * dx_b + c * dx_c + _spatial(p, width, dx_h, dx_w, 0, 0, 1, FLAT)
    tl.store(dx_at, inner.to(dx_ptr.dtype.element_ty), mask=inside)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float32."""
    sizes = _sizes(features, 1, features)
    tiles, share, splits = _shares(features, sizes)
    channels = features.shape[1]
    parts = features.new_empty((2, splits, channels), dtype=torch.float32)
    counts = features.new_empty(splits, dtype=torch.float32)
    result = features.new_empty((2, channels), dtype=torch.float32)
    with on(features.device):
        moments_kernel[(splits * triton.cdiv(channels, sizes["BLOCK_C"]),)](
            features, parts[0], parts[1], counts,
            channels, _pixels(features), features.shape[3], tiles, share, splits,
            *map_strides(features),
            FLAT=sizes["FLAT"], WIDE=sizes["WIDE"],
            BLOCK_C=sizes["BLOCK_C"], BLOCK_P=sizes["BLOCK_P"],
        )  # fmt: skip
        combine_kernel[(triton.cdiv(channels, 32),)](
            parts[0], parts[1], counts, result[0], result[1],
            channels, splits, features.numel() // channels,
            BLOCK_C=32, BLOCK_S=min(64, triton.next_power_of_2(splits)),
        )  # fmt: skip
    mean, var = result.unbind()
    return mean, var


def apply(
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
    save_signs: bool,
) -> tuple[Tensor, Tensor]:
    """The tail's output, and the signs that its gradient needs if they are asked for."""
    out = empty_result(features, upsample)
    signs = empty_signs(features, upsample) if save_signs else _no_bytes(features)
    if not out.numel():
        return out, signs
    sizes = _sizes(features, upsample, features, modulation, out)
    row, plane = signs_sizes(features)
    channels = features.shape[1]
    with on(features.device):
        apply_kernel[_grid(features, sizes)](
            features, modulation, mean, var, out, signs,
            channels, _pixels(features), features.shape[3],
            channels * modulation.stride(1), plane, row,
            *map_strides(features), *map_strides(modulation), *map_strides(out),
            eps, slope,
            NORMALIZE=mean is not None, ACTIVATE=slope != 1, SAVE=save_signs,
            WHOLE=False, SHIFT=True,
            UP=upsample, BY_CHANNEL=signs_are_by_channel(features), **sizes,
        )  # fmt: skip
    return out, signs


def modulate(features: Tensor, modulation: Tensor, slope: float, upsample: int) -> Tensor:
    """The tail of folded weights: a whole scale, and a shift unless there is none."""
    out = empty_result(features, upsample)
    if not out.numel():
        return out
    sizes = _sizes(features, upsample, features, modulation, out)
    channels = features.shape[1]
    with on(features.device):
        apply_kernel[_grid(features, sizes)](
            features, modulation, None, None, out, None,
            channels, _pixels(features), features.shape[3],
            channels * modulation.stride(1), 0, 0,
            *map_strides(features), *map_strides(modulation), *map_strides(out),
            0.0, slope,
            NORMALIZE=False, ACTIVATE=slope != 1, SAVE=False,
            WHOLE=True, SHIFT=modulation.shape[1] > channels,
            UP=upsample, BY_CHANNEL=signs_are_by_channel(features), **sizes,
        )  # fmt: skip
    return out


def sums(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float,
    upsample: int,
) -> Tensor:
    """Per channel, the sum of the gradient by the normalised features, plain and times them."""
    channels = features.shape[1]
    if not features.numel():
        return features.new_zeros((2, channels), dtype=torch.float32)
    sizes = _sizes(features, upsample, grad, features, modulation)
    tiles, share, splits = _shares(features, sizes)
    row, plane = signs_sizes(features)
    parts = features.new_empty((2, splits, channels), dtype=torch.float32)
    with on(features.device):
        sums_kernel[(splits * triton.cdiv(channels, sizes["BLOCK_C"]),)](
            grad, features, modulation, signs, mean, var, parts,
            channels, _pixels(features), features.shape[3], plane, row, tiles, share, splits,
            *map_strides(grad), *map_strides(features), *map_strides(modulation),
            eps, slope,
            ACTIVATE=slope != 1, UP=upsample, BY_CHANNEL=signs_are_by_channel(features), **sizes,
        )  # fmt: skip
    return parts.sum(1)


def gradients(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    shares: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and modulation; ``shares`` are the sums over all, per value."""
    to_features, to_modulation = torch.empty_like(features), torch.empty_like(modulation)
    if not features.numel():
        return to_features, to_modulation
    maps = (grad, features, modulation, to_features, to_modulation)
    sizes = _sizes(features, upsample, *maps)
    row, plane = signs_sizes(features)
    channels = features.shape[1]
    with on(features.device):
        gradients_kernel[_grid(features, sizes)](
            grad, features, modulation, signs, mean, var, shares, to_features, to_modulation,
            channels, _pixels(features), features.shape[3],
            plane, row, channels * to_modulation.stride(1),
            *(stride for value in maps for stride in map_strides(value)),
            eps, slope,
            NORMALIZE=mean is not None, SHARES=shares is not None, ACTIVATE=slope != 1,
            UP=upsample, BY_CHANNEL=signs_are_by_channel(features), **sizes,
        )  # fmt: skip
    return to_features, to_modulation


def _sizes(features: Tensor, upsample: int, *maps: Tensor) -> dict[str, Any]:
    """Tile and index width for a set of maps."""
    channels, pixels = features.shape[1], _pixels(features)
    if signs_are_by_channel(features):
        block_c = min(max(triton.next_power_of_2(channels), 8), 128)
        block_p = min(triton.next_power_of_2(pixels), _TILE // block_c)
    else:
        block_p = min(max(triton.next_power_of_2(pixels), 8), _TILE // 2)
        block_c = min(triton.next_power_of_2(channels), _TILE // block_p)
    return {
        "FLAT": upsample == 1 and all(is_flat(value) for value in maps),
        "WIDE": any(_extent(value) >= _INT32 for value in maps),
        "BLOCK_C": block_c,
        "BLOCK_P": block_p,
    }


def _shares(features: Tensor, sizes: dict[str, Any]) -> tuple[int, int, int]:
    """How a reduction is split: all tiles, tiles per program, programs per tile of channels."""
    tiles = features.shape[0] * triton.cdiv(_pixels(features), sizes["BLOCK_P"])
    wanted = triton.cdiv(_PROGRAMS, triton.cdiv(features.shape[1], sizes["BLOCK_C"]))
    share = min(triton.cdiv(tiles, wanted), _MAX_TILES)
    return tiles, share, triton.cdiv(tiles, share)


def _grid(features: Tensor, sizes: dict[str, Any]) -> tuple[int]:
    batch, channels = features.shape[:2]
    tiles = triton.cdiv(channels, sizes["BLOCK_C"])
    return (batch * tiles * triton.cdiv(_pixels(features), sizes["BLOCK_P"]),)


def _pixels(features: Tensor) -> int:
    return features.shape[2] * features.shape[3]


def _extent(value: Tensor) -> int:
    """Above every index and offset that tiles of an image may have; they run over its end."""
    return max(reach(value), value.shape[1:].numel()) + _TILE * max(value.stride()[1:])


def _no_bytes(features: Tensor) -> Tensor:
    return features.new_empty(0, dtype=torch.uint8)
