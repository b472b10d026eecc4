"""Convolution of maps that are joined along their channels, each in its cheapest form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from dpsims._checks import check_int, check_label_values, check_tensor
from dpsims.errors import DTypeError, InputError
from dpsims.nn._label_lookup import (
    autocast_like_conv,
    label_codes,
    label_table,
    sum_of_taps,
)
from dpsims.nn._separable import add_upsampled_conv2d, is_separable_cheaper
from dpsims.nn.labels import is_channels_last


def joined_conv2d(
    maps: Sequence[Tensor],
    weight: Float[Tensor, "C Cin k k"],
    bias: Float[Tensor, " C"] | None = None,
    *,
    ignore_index: int | None = 255,
) -> Float[Tensor, "B C H W"]:
    r"""Convolve maps joined along their channels without joining them.

    The numbers are those of :func:`torch.nn.functional.conv2d` with zero padding of ``k // 2`` on
    the concatenation of all maps, where a smaller map is first resized bilinearly and a label map
    is first one-hot encoded. Neither is done: a label map picks columns of the weight, and a small
    map is convolved as it is, then spread by two matrix products, one for columns and one for
    rows, into which the taps of the kernel are folded.

    Args:
        maps: In the order of the weight's input channels: real-valued maps of the full size,
            smaller ones (down to one pixel: a vector that is the same everywhere) and at most one
            label map, whose classes are the channels that the others leave.
        weight: Kernel, square and of odd side.
        bias: Added to every pixel.
        ignore_index: Id of unlabelled pixels, which contribute nothing, or ``None``.

    Shape:
        - maps ``(B, Ci, Hi, Wi)`` or ``(B, H, W)`` integers; weight ``(C, sum Ci, k, k)``; output
          ``(B, C, H, W)`` for the largest height and width

    Raises:
        InputError: No map; two label maps; a label map smaller than another map; different batch
            sizes or devices; channels that do not add up; an even or oblong kernel; on CPU an id
            out of range.
        DTypeError: Not a list of tensors, or a tensor of another kind.

    Note:
        Units: those of the weight. Bad ids: as :class:`dpsims.nn.LabelConv2d`.
        Cost: a small map of ``h x w`` pixels takes about ``k h`` multiplications per output value
        instead of ``Ci k^2``; where that is not cheaper it is resized, a choice by the sizes
        alone. Gradients: as :class:`dpsims.nn.LabelConv2d` with a label map, else any order.

    Source:
        Not in the paper. It computes the first convolution behind the conditioning maps of
        Berrada et al., CVPR 2024, Sec. 3.2 (``h_i`` joined with the upsampled ``h_L``), and of
        OASIS (labels joined with a latent that is the same everywhere).

    Example:
        >>> fine, coarse = torch.randn(2, 3, 32, 64), torch.randn(2, 4, 4, 8)
        >>> weight = torch.randn(8, 7, 3, 3)
        >>> whole = torch.nn.functional.interpolate(coarse, size=(32, 64), mode="bilinear")
        >>> joined = torch.nn.functional.conv2d(torch.cat((fine, whole), 1), weight, padding=1)
        >>> torch.allclose(joined_conv2d((fine, coarse), weight), joined, atol=1e-4)
        True
    """
    owner = "joined_conv2d"
    check_tensor(owner, "weight", weight, "C Cin k k")
    if weight.shape[2] != weight.shape[3] or weight.shape[2] % 2 == 0:
        msg = f"{owner}: weight must be square with an odd side; got {tuple(weight.shape)}"
        raise InputError(msg)
    if bias is not None:
        check_tensor(owner, "bias", bias, "C", like=weight, C=weight.shape[0])
    if ignore_index is not None:
        check_int(owner, "ignore_index", ignore_index, minimum=None)
    check_joined(owner, "maps", maps, weight.shape[1], ignore_index, like=weight)
    return convolve_joined(maps, weight, bias, ignore_index)


def joined_size(maps: Sequence[Tensor]) -> tuple[int, int]:
    """Height and width of the joined map."""
    return max(m.shape[-2] for m in maps), max(m.shape[-1] for m in maps)


def check_joined(
    owner: str, name: str, maps: object, channels: int, ignore_index: int | None, *, like: Tensor
) -> None:
    """Raise unless the maps are on ``like``'s device and join to ``channels`` channels."""
    if not isinstance(maps, list | tuple):
        msg = f"{owner}: {name} must be a list or tuple of maps; got {type(maps).__name__}"
        raise DTypeError(msg)
    if not maps:
        msg = f"{owner}: {name} must hold at least one map; got none"
        raise InputError(msg)
    sizes: dict[str, Any] = {}
    width, labels = 0, None
    for index, value in enumerate(maps):
        is_labels = isinstance(value, Tensor) and value.dim() == 3
        layout = "B H W" if is_labels else "B C H W"
        kind: Literal["integer", "floating"] = "integer" if is_labels else "floating"
        check_tensor(owner, f"{name}[{index}]", value, layout, kind=kind, like=like, **sizes)
        sizes = {"B": value.shape[0]}
        if not is_labels:
            width += value.shape[1]
        elif labels is not None:
            msg = f"{owner}: {name} must hold at most one label map; got another at {index}"
            raise InputError(msg)
        else:
            labels = value
    if (width >= channels) if labels is not None else (width != channels):
        rule = (
            f"have {channels} channels together"
            if labels is None
            else (f"leave some of the {channels} channels to the label map")
        )
        msg = f"{owner}: {name} must {rule}; got {width}"
        raise InputError(msg)
    if labels is not None:
        if tuple(labels.shape[1:]) != joined_size(maps):
            msg = (
                f"{owner}: {name} must hold no map larger than the label map of "
                f"{tuple(labels.shape[1:])}; got {joined_size(maps)}"
            )
            raise InputError(msg)
        check_label_values(owner, name, labels, channels - width, ignore_index)


def convolve_joined(
    maps: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    ignore_index: int | None,
    *,
    base: Tensor | None = None,
    table: Tensor | None = None,
) -> Tensor:
    """:func:`joined_conv2d` of maps that have been checked, added to ``base``.

    ``table`` is that of the whole weight and the bias, for a label map that is the last map.
    """
    out, kernel = base, weight.shape[2]
    size = joined_size(maps if base is None else [base])
    width = sum(m.shape[1] for m in maps if m.dim() == 4)
    whole: list[tuple[Tensor, Tensor]] = []
    small: list[tuple[Tensor, Tensor]] = []
    start = 0
    for value in maps:
        stop = start + (value.shape[1] if value.dim() == 4 else weight.shape[1] - width)
        part = weight[:, start:stop] if len(maps) > 1 else weight
        if value.dim() == 3:
            codes = label_codes(value, stop - start, ignore_index, kernel // 2)
            if table is None or value is not maps[-1]:
                found = sum_of_taps(codes, label_table(part, bias), kernel, 1)
            else:
                # the rows behind those of the last map are the same for every map
                found = sum_of_taps(codes + start, autocast_like_conv(table), kernel, 1)
            found = rearrange(found, "B H W C -> B C H W")
            out = _plus(out, found if is_channels_last(weight) else found.contiguous())
            bias = None
        elif is_separable_cheaper(value.shape[1], kernel, value.shape[2:], size):
            small.append((value, part))
        else:
            whole.append((_resized(value, size), part))
        start = stop
    if whole:
        # all of them at once, as far as possible with the weight as it is
        joined = weight if len(whole) == len(maps) else _cat([part for _, part in whole])
        dense = _cat([value for value, _ in whole])
        out = _plus(out, F.conv2d(dense, joined, bias, padding=kernel // 2))
    assert out is not None
    for value, part in small:
        out = add_upsampled_conv2d(out, value, part)
    return out


def _plus(total: Tensor | None, value: Tensor) -> Tensor:
    return value if total is None else total + value


def _resized(value: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(value.shape[2:]) == size:
        return value
    return F.interpolate(value, size=size, mode="bilinear")


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)
