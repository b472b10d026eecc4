"""Convolution of a bilinearly enlarged map, from the small map: two products of low rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor
from torch.nn import functional as F

# one more pass over the output costs about as much as this many multiplications per value
_PASS = 16


def is_separable_cheaper(
    channels: int, kernel: int, small: Sequence[int], full: Sequence[int]
) -> bool:
    """Whether :func:`add_upsampled_conv2d` takes less work than enlarging and convolving.

    A function of the sizes alone: multiplications per output channel, and passes over the output.
    """
    (h, w), (height, width) = small, full
    if (h, w) == (height, width):
        return False
    taps = kernel * kernel
    direct = channels * taps * height * width
    products = channels * taps * h * w + h * w * taps * width + h * kernel * height * width
    return products + _PASS * height * width < direct


class Spreading(NamedTuple):
    """What :func:`add_spread` needs of a kernel and of sizes alone."""

    taps: Tensor
    """The kernel as a matrix: a row for every output channel and tap."""
    rows: Tensor
    columns: Tensor


def spreading(weight: Tensor, small: Sequence[int], full: Sequence[int]) -> Spreading:
    """The matrices for a kernel on maps of size ``small`` that are enlarged to ``full``."""
    kernel = weight.shape[2]
    (h, w), (height, width) = small, full
    rows = _tap_matrix(h, height, kernel, weight)
    columns = rows if (h, height) == (w, width) else _tap_matrix(w, width, kernel, weight)
    return Spreading(rearrange(weight, "o c i j -> (o i j) c"), rows, columns)


def add_upsampled_conv2d(out: Tensor, small: Tensor, weight: Tensor) -> Tensor:
    """``out + conv2d(bilinear(small), weight)``, zero padded to the size of ``out``.

    Enlarging is linear in rows and in columns, so every tap of the kernel is a matrix of rows and
    one of columns; a pixel beyond the border is a row or column of zeros.
    """
    # the matrices of a kernel of another dtype are those of the map
    given = spreading(weight.to(small.dtype), small.shape[2:], out.shape[2:])
    return add_spread(out, small, given)


def add_spread(out: Tensor, small: Tensor, given: Spreading) -> Tensor:
    """:func:`add_upsampled_conv2d`, with what does not depend on the maps computed before."""
    flat, rows, columns = given
    (b, _, h, w), (count, height, width) = small.shape, out.shape[1:]
    kernel = rows.shape[0] // h
    # the kernel acts on the small map, one output for each tap
    taps = (flat @ small.flatten(2)).view(b, count, kernel, kernel, h, w)
    if out.is_contiguous():
        lines = rearrange(taps, "b o i j p q -> (b o p i) (q j)") @ columns
        lines = lines.view(b * count, h * kernel, width)
        spread = rows.T.expand(b * count, -1, -1)
        if out.shape[0] != b:
            # one map for several small ones
            return out + torch.bmm(spread, lines).view(b, count, height, width)
        full = torch.baddbmm(out.flatten(0, 1), spread, lines)
        return full.view(b, count, height, width)
    spread = rearrange(taps, "b o i j p q -> (b p i) (q j) o")
    lines = torch.bmm(columns.T.expand(spread.shape[0], -1, -1), spread)
    lines = lines.view(b, h * kernel, width * count)
    spread = rows.T.expand(b, -1, -1)
    if out.shape[0] != b:
        return out + rearrange(torch.bmm(spread, lines), "b y (x o) -> b o y x", o=count)
    full = torch.baddbmm(rearrange(out, "b o y x -> b y (x o)"), spread, lines)
    return rearrange(full, "b y (x o) -> b o y x", o=count)


def _tap_matrix(small: int, full: int, kernel: int, like: Tensor) -> Tensor:
    """Linear enlarging, then each of the kernel's shifts: ``(small * kernel, full)``."""
    wide = torch.promote_types(like.dtype, torch.float32)
    identity = torch.eye(small, dtype=wide, device=like.device)
    matrix = F.interpolate(identity[None], size=full, mode="linear")[0].to(like.dtype)
    if kernel == 1:
        return matrix
    padded = F.pad(matrix, (kernel // 2, kernel // 2))
    # not a view of overlapping rows, which products take one matrix at a time
    return padded.unfold(1, full, 1).flatten(0, 1).contiguous()
