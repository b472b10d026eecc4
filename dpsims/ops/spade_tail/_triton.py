"""The SPADE tail on a GPU: two reductions and two elementwise kernels, each one read per input.

Every kernel works on tiles of channels by pixels of one image and takes the strides of each map,
so that no memory format needs a copy. A pixel is one of the features; where they are upsampled, it
stands for a square of pixels of the other maps. Arithmetic is in float32. Nothing waits for the
device, and no sum depends on the order in which programs run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsims.ops._launch import ceil_div, map_strides, on, power_of_two
from dpsims.ops.spade_tail._layout import empty_result, empty_signs, signs_sizes
from dpsims.ops.spade_tail._tiling import grid, num_pixels, shares_of_tiles, tile_sizes

# what only kernels of modulated maps are told
_OF_SQUARES = ("UP", "COLUMNS", "BY_CHANNEL")


@triton.jit
def _spatial(p, width, s_h, s_w, FLAT: tl.constexpr):
    """Offset of a pixel inside a plane."""
    return p * s_w if FLAT else p // width * s_h + p % width * s_w


@triton.jit
def _fine(
    q, width, s_h, s_w, k, UP: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr
):  # fmt: skip
    """The same in a larger map: of entry ``k`` of a pixel's square or, with all columns, row."""
    if COLUMNS == 1:
        if FLAT:
            offset = q * s_w
        else:
            offset = (q // width * UP + k // UP) * s_h + (q % width * UP + k % UP) * s_w
    else:
        offset = (q // (width * UP) * UP + k) * s_h + q % (width * UP) * s_w
    return offset


@triton.jit
def _repeated(x, COLUMNS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr):
    """Every pixel of a tile as often as its square has columns in one."""
    if COLUMNS > 1:
        x = tl.broadcast_to(x[:, :, None], (BLOCK_C, BLOCK_P, COLUMNS))
        x = tl.reshape(x, (BLOCK_C, BLOCK_P * COLUMNS))
    return x


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
def _activated(
    grad, signs_ptr, c_tile, q_tile, channels, pixels, row, slope,
    BY_CHANNEL: tl.constexpr, WIDE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_Q: tl.constexpr,
):  # fmt: skip
    """Gradient behind the activation, by the signs that the forward left: a byte for eight."""
    shift = tl.arange(0, 8)[None, None, :]
    c, q = _tile(c_tile, q_tile, BLOCK_C, BLOCK_Q, WIDE)
    if BY_CHANNEL:
        q = tl.trans(q)
        c8 = c_tile * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)[None, :]
        byte = tl.load(signs_ptr + q * row + c8, mask=(q < pixels) & (c8 < row), other=0)
        bits = tl.reshape(byte.to(tl.int32)[:, :, None] >> shift, (BLOCK_Q, BLOCK_C))
        bits = tl.trans(bits)
    else:
        q8 = q_tile * (BLOCK_Q // 8) + tl.arange(0, BLOCK_Q // 8)[None, :]
        byte = tl.load(signs_ptr + c * row + q8, mask=(c < channels) & (q8 < row), other=0)
        bits = tl.reshape(byte.to(tl.int32)[:, :, None] >> shift, (BLOCK_C, BLOCK_Q))
    return tl.where((bits & 1) != 0, grad, grad * slope)


@triton.jit
def apply_kernel(
    x_ptr, m_ptr, mean_ptr, var_ptr, y_ptr, signs_ptr,
    channels, pixels, width, beta, plane, row,
    x_b, x_c, x_h, x_w, m_b, m_c, m_h, m_w, y_b, y_c, y_h, y_w,
    eps, slope,
    NORMALIZE: tl.constexpr, ACTIVATE: tl.constexpr, SAVE: tl.constexpr,
    WHOLE: tl.constexpr, SHIFT: tl.constexpr,
    UP: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``x * (1 + gamma) + beta``; ``x * gamma + beta`` if gamma is whole; with no beta without."""
    image, c_tile, p_tile = _place(channels, pixels, BY_CHANNEL, BLOCK_C, BLOCK_P)
    c, p = _tile(c_tile, p_tile, BLOCK_C, BLOCK_P, WIDE)
    x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, FLAT)
    x = tl.load(x_at, mask=(c < channels) & (p < pixels), other=0.0).to(tl.float32)
    if NORMALIZE:
        mean, rstd = _statistics(mean_ptr, var_ptr, c, channels, eps)
        x = (x - mean) * rstd
    x = _repeated(x, COLUMNS, BLOCK_C, BLOCK_P)
    _, q = _tile(c_tile, p_tile, BLOCK_C, BLOCK_P * COLUMNS, WIDE)
    inside = (c < channels) & (q < pixels * COLUMNS)
    for k in tl.static_range(UP * UP // COLUMNS):
        m_at = m_ptr + image * m_b + c * m_c
        m_at += _fine(q, width, m_h, m_w, k, UP, COLUMNS, FLAT)
        gamma = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
        if not WHOLE:
            gamma += 1.0
        y = x * gamma
        if SHIFT:
            y += tl.load(m_at + beta, mask=inside, other=0.0).to(tl.float32)
        if SAVE:
            signs_at = signs_ptr + (image * (UP * UP // COLUMNS) + k) * plane
            if BY_CHANNEL:
                bits = _pack(tl.trans((y > 0) & inside), BLOCK_P, BLOCK_C)
                c8 = c_tile * (BLOCK_C // 8) + tl.arange(0, BLOCK_C // 8)[None, :]
                p8 = tl.trans(p)
                tl.store(signs_at + p8 * row + c8, bits, mask=(p8 < pixels) & (c8 < row))
            else:
                bits = _pack((y > 0) & inside, BLOCK_C, BLOCK_P * COLUMNS)
                q8 = tl.arange(0, BLOCK_P * COLUMNS // 8)[None, :]
                q8 += p_tile * (BLOCK_P * COLUMNS // 8)
                tl.store(signs_at + c * row + q8, bits, mask=(c < channels) & (q8 < row))
        if ACTIVATE:
            y = tl.where(y > 0, y, y * slope)
        y_at = y_ptr + image * y_b + c * y_c
        y_at += _fine(q, width, y_h, y_w, k, UP, COLUMNS, FLAT)
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
    x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, FLAT)
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
        x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, FLAT)
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
    ACTIVATE: tl.constexpr, UP: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr,
    WIDE: tl.constexpr, BY_CHANNEL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Sums of the gradient by the normalised features, plain and times them, of a share."""
    split = tl.program_id(0) % splits
    c_tile = tl.program_id(0) // splits
    p_tiles = tl.cdiv(pixels, BLOCK_P)
    plain = tl.zeros((BLOCK_C, BLOCK_P * COLUMNS), tl.float32)
    times = tl.zeros((BLOCK_C, BLOCK_P * COLUMNS), tl.float32)
    c, p = _tile(c_tile, 0, BLOCK_C, BLOCK_P, WIDE)
    mean, rstd = _statistics(mean_ptr, var_ptr, c, channels, eps)
    for tile in range(split * share, tl.minimum(split * share + share, tiles)):
        c, p = _tile(c_tile, tile % p_tiles, BLOCK_C, BLOCK_P, WIDE)
        image = (tile // p_tiles).to(tl.int64)
        x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, FLAT)
        x = tl.load(x_at, mask=(c < channels) & (p < pixels), other=0.0).to(tl.float32)
        x = _repeated((x - mean) * rstd, COLUMNS, BLOCK_C, BLOCK_P)
        _, q = _tile(c_tile, tile % p_tiles, BLOCK_C, BLOCK_P * COLUMNS, WIDE)
        inside = (c < channels) & (q < pixels * COLUMNS)
        for k in tl.static_range(UP * UP // COLUMNS):
            g_at = g_ptr + image * g_b + c * g_c
            g_at += _fine(q, width, g_h, g_w, k, UP, COLUMNS, FLAT)
            m_at = m_ptr + image * m_b + c * m_c
            m_at += _fine(q, width, m_h, m_w, k, UP, COLUMNS, FLAT)
            grad = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
            gamma = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
            if ACTIVATE:
                grad = _activated(
                    grad, signs_ptr + (image * (UP * UP // COLUMNS) + k) * plane,
                    c_tile, tile % p_tiles, channels, pixels, row, slope,
                    BY_CHANNEL, WIDE, BLOCK_C, BLOCK_P * COLUMNS,
                )  # fmt: skip
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
    UP: tl.constexpr, COLUMNS: tl.constexpr, FLAT: tl.constexpr, WIDE: tl.constexpr,
    BY_CHANNEL: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    image, c_tile, p_tile = _place(channels, pixels, BY_CHANNEL, BLOCK_C, BLOCK_P)
    c, p = _tile(c_tile, p_tile, BLOCK_C, BLOCK_P, WIDE)
    coarse = (c < channels) & (p < pixels)
    x_at = x_ptr + image * x_b + c * x_c + _spatial(p, width, x_h, x_w, FLAT)
    x = tl.load(x_at, mask=coarse, other=0.0).to(tl.float32)
    if NORMALIZE:
        mean, rstd = _statistics(mean_ptr, var_ptr, c, channels, eps)
        x = (x - mean) * rstd
    repeated = _repeated(x, COLUMNS, BLOCK_C, BLOCK_P)
    _, q = _tile(c_tile, p_tile, BLOCK_C, BLOCK_P * COLUMNS, WIDE)
    inside = (c < channels) & (q < pixels * COLUMNS)
    inner = tl.zeros((BLOCK_C, BLOCK_P * COLUMNS), tl.float32)
    for k in tl.static_range(UP * UP // COLUMNS):
        g_at = g_ptr + image * g_b + c * g_c
        g_at += _fine(q, width, g_h, g_w, k, UP, COLUMNS, FLAT)
        m_at = m_ptr + image * m_b + c * m_c
        m_at += _fine(q, width, m_h, m_w, k, UP, COLUMNS, FLAT)
        grad = tl.load(g_at, mask=inside, other=0.0).to(tl.float32)
        gamma = tl.load(m_at, mask=inside, other=0.0).to(tl.float32)
        if ACTIVATE:
            grad = _activated(
                grad, signs_ptr + (image * (UP * UP // COLUMNS) + k) * plane,
                c_tile, p_tile, channels, pixels, row, slope,
                BY_CHANNEL, WIDE, BLOCK_C, BLOCK_P * COLUMNS,
            )  # fmt: skip
        dm_at = dm_ptr + image * dm_b + c * dm_c
        dm_at += _fine(q, width, dm_h, dm_w, k, UP, COLUMNS, FLAT)
        tl.store(dm_at, (grad * repeated).to(dm_ptr.dtype.element_ty), mask=inside)
        tl.store(dm_at + beta, grad.to(dm_ptr.dtype.element_ty), mask=inside)
        inner += grad * (1.0 + gamma)
    if COLUMNS > 1:
        inner = tl.sum(tl.reshape(inner, (BLOCK_C, BLOCK_P, COLUMNS)), axis=2)
    if SHARES:
        inner -= tl.load(shares_ptr + c, mask=c < channels, other=0.0)
        inner -= x * tl.load(shares_ptr + channels + c, mask=c < channels, other=0.0)
    if NORMALIZE:
        inner *= rstd
    dx_at = dx_ptr + image * dx_b + c * dx_c + _spatial(p, width, dx_h, dx_w, FLAT)
    tl.store(dx_at, inner.to(dx_ptr.dtype.element_ty), mask=coarse)


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float32."""
    sizes = tile_sizes(features, 1, features)
    tiles, share, splits = shares_of_tiles(features, sizes)
    channels = features.shape[1]
    parts = features.new_empty((2, splits, channels), dtype=torch.float32)
    counts = features.new_empty(splits, dtype=torch.float32)
    result = features.new_empty((2, channels), dtype=torch.float32)
    with on(features.device):
        moments_kernel[(splits * ceil_div(channels, sizes["BLOCK_C"]),)](
            features, parts[0], parts[1], counts,
            channels, num_pixels(features), features.shape[3], tiles, share, splits,
            *map_strides(features),
            **{name: value for name, value in sizes.items() if name not in _OF_SQUARES},
        )  # fmt: skip
        combine_kernel[(ceil_div(channels, 32),)](
            parts[0], parts[1], counts, result[0], result[1],
            channels, splits, features.numel() // channels,
            BLOCK_C=32, BLOCK_S=min(64, power_of_two(splits)), enable_fp_fusion=True,
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
    sizes = tile_sizes(features, upsample, features, modulation, out)
    row, plane = signs_sizes(features, upsample)
    channels = features.shape[1]
    with on(features.device):
        apply_kernel[grid(features, sizes)](
            features, modulation, mean, var, out, signs,
            channels, num_pixels(features), features.shape[3],
            channels * modulation.stride(1), plane, row,
            *map_strides(features), *map_strides(modulation), *map_strides(out),
            eps, slope,
            NORMALIZE=mean is not None, ACTIVATE=slope != 1, SAVE=save_signs,
            WHOLE=False, SHIFT=True,
            **sizes,
        )  # fmt: skip
    return out, signs


def modulate(features: Tensor, modulation: Tensor, slope: float, upsample: int) -> Tensor:
    """The tail of folded weights: a whole scale, and a shift unless there is none."""
    out = empty_result(features, upsample)
    if not out.numel():
        return out
    sizes = tile_sizes(features, upsample, features, modulation, out)
    channels = features.shape[1]
    with on(features.device):
        apply_kernel[grid(features, sizes)](
            features, modulation, None, None, out, None,
            channels, num_pixels(features), features.shape[3],
            channels * modulation.stride(1), 0, 0,
            *map_strides(features), *map_strides(modulation), *map_strides(out),
            0.0, slope,
            NORMALIZE=False, ACTIVATE=slope != 1, SAVE=False,
            WHOLE=True, SHIFT=modulation.shape[1] > channels,
            **sizes,
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
    sizes = tile_sizes(features, upsample, grad, features, modulation)
    tiles, share, splits = shares_of_tiles(features, sizes)
    row, plane = signs_sizes(features, upsample)
    parts = features.new_empty((2, splits, channels), dtype=torch.float32)
    with on(features.device):
        sums_kernel[(splits * ceil_div(channels, sizes["BLOCK_C"]),)](
            grad, features, modulation, signs, mean, var, parts,
            channels, num_pixels(features), features.shape[3], plane, row, tiles, share, splits,
            *map_strides(grad), *map_strides(features), *map_strides(modulation),
            eps, slope,
            ACTIVATE=slope != 1, **sizes,
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
    sizes = tile_sizes(features, upsample, *maps)
    row, plane = signs_sizes(features, upsample)
    channels = features.shape[1]
    with on(features.device):
        gradients_kernel[grid(features, sizes)](
            grad, features, modulation, signs, mean, var, shares, to_features, to_modulation,
            channels, num_pixels(features), features.shape[3],
            plane, row, channels * to_modulation.stride(1),
            *(stride for value in maps for stride in map_strides(value)),
            eps, slope,
            NORMALIZE=mean is not None, SHARES=shares is not None, ACTIVATE=slope != 1,
            **sizes,
        )  # fmt: skip
    return to_features, to_modulation


def _no_bytes(features: Tensor) -> Tensor:
    return features.new_empty(0, dtype=torch.uint8)
