"""The Triton kernels of the injection: one forward, one backward. Imported on first use only."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dpsims.ops._launch import ceil_div, is_flat, map_strides, on, power_of_two

# programs that fill a large GPU a few times over; a constant, so that the order of the sums over
# pixels, and with it every bit of the gradients, does not depend on the device
_PROGRAMS = 512


@triton.jit
def _pixel_offsets(pixels, row, column, width, FLAT: tl.constexpr):
    """Where pixels lie, relative to the first one of their image."""
    if FLAT:
        return pixels.to(tl.int64) * column
    return (pixels // width).to(tl.int64) * row + (pixels % width).to(tl.int64) * column


@triton.jit
def _narrowed(x, HALF: tl.constexpr, EMULATED: tl.constexpr):
    """An operand of a product: bfloat16 for bfloat16 maps, else float32."""
    if HALF:
        x = x.to(tl.bfloat16)
        # Triton's interpreter multiplies the bits of bfloat16 numbers
        if EMULATED:
            x = x.to(tl.float32)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def _product(a, b, total, HALF: tl.constexpr, EMULATED: tl.constexpr):
    """``total + a @ b``, summed in float32."""
    a, b = _narrowed(a, HALF, EMULATED), _narrowed(b, HALF, EMULATED)
    if HALF:
        return tl.dot(a, b, total)
    # three products of TF32 parts: float32 to a few units in the last place
    return tl.dot(a, b, total, input_precision="tf32x3")


@triton.jit
def _weights(keys, biases, tile, token_mask, HALF: tl.constexpr, EMULATED: tl.constexpr):
    """The softmax over the tokens, for every pixel of a tile."""
    logits = tl.zeros([keys.shape[0], tile.shape[1]], tl.float32)
    if HALF:
        # a rounded key is off by 2^-9 of the logit: the part that was rounded away joins in
        lost = keys - keys.to(tl.bfloat16).to(tl.float32)
        logits = _product(lost, tile, logits, HALF, EMULATED)
    logits = _product(keys, tile, logits, HALF, EMULATED) + biases[:, None]
    logits = tl.where(token_mask[:, None], logits, -float("inf"))
    weights = tl.exp(logits - tl.max(logits, 0)[None, :])
    return weights / tl.sum(weights, 0)[None, :]


@triton.jit
def _load_tokens(
    keys,
    biases,
    values,
    batch,
    kb,
    kt,
    bb,
    bt,
    vb,
    vt,
    C,
    T,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Keys and values ``(BLOCK_T, BLOCK_C)``, biases and which tokens exist, of one sample."""
    channel, token = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    exists = token < T
    mask = exists[:, None] & (channel < C)[None, :]
    where = keys + batch * kb + token[:, None] * kt + channel[None, :]
    k = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    where = values + batch * vb + token[:, None] * vt + channel[None, :]
    v = tl.load(where, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(biases + batch * bb + token * bt, mask=exists, other=0.0).to(tl.float32)
    return k, b, v, exists


@triton.jit
def _inject_kernel(
    features, keys, biases, values, scale, out,
    fb, fc, fy, fx, kb, kt, bb, bt, vb, vt, ob, oc, oy, ox,
    C, T, pixels, width, tiles,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, HALF: tl.constexpr, EMULATED: tl.constexpr,
    SCALE: tl.constexpr, GELU: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // tiles).to(tl.int64)
    pixel = (program % tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
    channel = tl.arange(0, BLOCK_C)
    mask = (channel < C)[:, None] & (pixel < pixels)[None, :]
    column = channel[:, None].to(tl.int64)
    where = batch * fb + column * fc + _pixel_offsets(pixel, fy, fx, width, FLAT)[None, :]
    tile = tl.load(features + where, mask=mask, other=0.0)
    k, b, v, exists = _load_tokens(
        keys, biases, values, batch, kb, kt, bb, bt, vb, vt, C, T, BLOCK_C, BLOCK_T
    )
    weights = _weights(k, b, tile, exists, HALF, EMULATED)
    read = tl.zeros([BLOCK_C, BLOCK_N], tl.float32)
    read = _product(tl.trans(v), weights, read, HALF, EMULATED)
    base = tile.to(tl.float32)
    if SCALE:
        base *= tl.load(scale + channel, mask=channel < C, other=0.0).to(tl.float32)[:, None]
    total = base + read
    if GELU:
        total = 0.5 * total * (1.0 + tl.erf(total * 0.7071067811865476))
    where = batch * ob + column * oc + _pixel_offsets(pixel, oy, ox, width, FLAT)[None, :]
    tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _gradients_kernel(
    grad, features, keys, biases, values, out, packed,
    gb, gc, gy, gx, fb, fc, fy, fx, kb, kt, bb, bt, vb, vt, ob, oc, oy, ox,
    C, T, pixels, width, segments, span,
    BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr,
    FLAT: tl.constexpr, HALF: tl.constexpr, EMULATED: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    batch = (program // segments).to(tl.int64)
    first = (program % segments) * span
    channel, token = tl.arange(0, BLOCK_C), tl.arange(0, BLOCK_T)
    column = channel[:, None].to(tl.int64)
    k, b, v, exists = _load_tokens(
        keys, biases, values, batch, kb, kt, bb, bt, vb, vt, C, T, BLOCK_C, BLOCK_T
    )
    to_k = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    to_v = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    to_b = tl.zeros([BLOCK_T], tl.float32)
    for start in range(first, tl.minimum(first + span, pixels), BLOCK_N):
        pixel = start + tl.arange(0, BLOCK_N)
        inside = (pixel < pixels)[None, :]
        mask = (channel < C)[:, None] & inside
        where = batch * fb + column * fc + _pixel_offsets(pixel, fy, fx, width, FLAT)[None, :]
        tile = tl.load(features + where, mask=mask, other=0.0)
        where = batch * gb + column * gc + _pixel_offsets(pixel, gy, gx, width, FLAT)[None, :]
        slope = tl.load(grad + where, mask=mask, other=0.0)
        weights = tl.where(inside, _weights(k, b, tile, exists, HALF, EMULATED), 0.0)
        read = tl.zeros([BLOCK_T, BLOCK_N], tl.float32)
        read = _product(v, slope, read, HALF, EMULATED)
        logits = weights * (read - tl.sum(weights * read, 0)[None, :])
        wide = slope.to(tl.float32)
        total = _product(tl.trans(k), logits, wide, HALF, EMULATED)
        where = batch * ob + column * oc + _pixel_offsets(pixel, oy, ox, width, FLAT)[None, :]
        tl.store(out + where, total.to(out.dtype.element_ty), mask=mask)
        to_k = _product(logits, tl.trans(tile), to_k, HALF, EMULATED)
        to_v = _product(weights, tl.trans(slope), to_v, HALF, EMULATED)
        to_b += tl.sum(logits, 1)
    row = program.to(tl.int64) * T + token
    where = packed + row[:, None] * (2 * C + 1) + channel[None, :]
    mask = exists[:, None] & (channel < C)[None, :]
    tl.store(where, to_k, mask=mask)
    tl.store(where + C, to_v, mask=mask)
    tl.store(packed + row * (2 * C + 1) + 2 * C, to_b, mask=exists)


def inject(
    features: Tensor,
    keys: Tensor,
    biases: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    gelu: bool = False,
) -> Tensor:
    """Launch the forward kernel: one read and one write of the map.

    With a ``scale`` per channel, the features are multiplied by it before the values join them;
    with ``gelu``, the sum is activated.
    """
    out = torch.empty_like(features)
    batch, channels, height, width = features.shape
    if batch == 0:
        return out
    keys, values = _dense_rows(keys), _dense_rows(values)
    pixels = height * width
    blocks = forward_blocks(features, keys.shape[1])
    tiles = ceil_div(pixels, blocks["BLOCK_N"])
    with on(features.device):
        _inject_kernel[(batch * tiles,)](
            features,
            keys,
            biases,
            values,
            scale,
            out,
            *map_strides(features),
            *keys.stride()[:2],
            *biases.stride(),
            *values.stride()[:2],
            *map_strides(out),
            channels,
            keys.shape[1],
            pixels,
            width,
            tiles,
            **blocks,
            **_mode(features, out),
            SCALE=scale is not None,
            GELU=gelu,
        )
    return out


def inject_gradients(
    grad: Tensor, features: Tensor, keys: Tensor, biases: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    """Launch the backward kernel: two reads and one write of the map, and a small sum.

    Returns:
        The gradient of the features, and those of the keys, values and biases side by side.
    """
    out = torch.empty_like(features)
    batch, channels, height, width = features.shape
    num_tokens = keys.shape[1]
    if batch == 0:
        return out, keys.new_empty((0, num_tokens, 2 * channels + 1), dtype=torch.float32)
    keys, values = _dense_rows(keys), _dense_rows(values)
    pixels = height * width
    blocks = backward_blocks(features, num_tokens)
    segments, span = _segments(batch, pixels, blocks["BLOCK_N"])
    shape = (batch, segments, num_tokens, 2 * channels + 1)
    packed = torch.empty(shape, dtype=torch.float32, device=features.device)
    with on(features.device):
        _gradients_kernel[(batch * segments,)](
            grad,
            features,
            keys,
            biases,
            values,
            out,
            packed,
            *map_strides(grad),
            *map_strides(features),
            *keys.stride()[:2],
            *biases.stride(),
            *values.stride()[:2],
            *map_strides(out),
            channels,
            num_tokens,
            pixels,
            width,
            segments,
            span,
            **blocks,
            **_mode(features, grad, out),
        )
    return out, packed.sum(1)


def forward_blocks(features: Tensor, num_tokens: int) -> dict[str, int]:
    """The launch options of the forward kernel."""
    return _blocks(features, num_tokens, entries=8192, widest=256, num_stages=2)


def backward_blocks(features: Tensor, num_tokens: int) -> dict[str, int]:
    """The launch options of the backward kernel, which holds twice as many tiles."""
    stages = 2 if features.dtype == torch.bfloat16 else 1
    return _blocks(features, num_tokens, entries=4096, widest=64, num_stages=stages)


def _blocks(
    features: Tensor, num_tokens: int, *, entries: int, widest: int, num_stages: int
) -> dict[str, int]:
    """Sizes of a tile that holds all channels of its pixels, and how many warps share it."""
    channels, pixels = features.shape[1], features.shape[2] * features.shape[3]
    # products need 16 rows and columns
    block_c = max(16, power_of_two(channels))
    block_t = max(16, power_of_two(num_tokens))
    if features.dtype != torch.bfloat16:
        # operands of 4 bytes, in three products, fill the registers twice as fast
        entries //= 2
    block_n = max(16, min(widest, power_of_two(pixels), entries // max(block_c, block_t)))
    return {
        "BLOCK_C": block_c,
        "BLOCK_T": block_t,
        "BLOCK_N": block_n,
        "num_warps": 8 if block_c == 256 else 4,
        "num_stages": num_stages,
        # stated, for Triton is about to change what it does unless told
        "enable_fp_fusion": True,
    }


def _segments(batch: int, pixels: int, block_n: int) -> tuple[int, int]:
    """Into how many runs of pixels an image is cut, and how many pixels a run has."""
    tiles = ceil_div(pixels, block_n)
    per_segment = ceil_div(tiles, min(tiles, ceil_div(_PROGRAMS, batch)))
    return ceil_div(tiles, per_segment), per_segment * block_n


def _mode(features: Tensor, *others: Tensor) -> dict[str, bool]:
    return {
        "FLAT": all(is_flat(x) for x in (features, *others)),
        "HALF": features.dtype == torch.bfloat16,
        "EMULATED": bool(triton.knobs.runtime.interpret),
    }


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(2) == 1 or x.shape[2] == 1 else x.contiguous()
