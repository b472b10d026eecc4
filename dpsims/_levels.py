"""The check of a list of feature maps, one per level of a backbone."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from dpsims._checks import check_tensor
from dpsims.errors import DTypeError, InputError


def check_levels(
    owner: str,
    name: str,
    maps: object,
    channels: Sequence[int],
    *,
    like: Tensor | None = None,
    ordered: bool = False,
) -> None:
    """Raise unless ``maps`` lists one feature map ``(B, C, H, W)`` per width in ``channels``.

    All share the batch size and device of ``like``, by default the first map. With ``ordered``, no
    map may be larger than the one before it.

    Raises:
        DTypeError: Not a list or tuple of floating-point tensors.
        InputError: Another number of maps, a wrong shape, device or order.
    """
    if not isinstance(maps, list | tuple):
        msg = f"{owner}: {name} must be a list of feature maps; got {type(maps).__name__}"
        raise DTypeError(msg)
    if len(maps) != len(channels):
        msg = f"{owner}: {name} must hold {len(channels)} maps, one per level; got {len(maps)}"
        raise InputError(msg)
    for level, (value, width) in enumerate(zip(maps, channels, strict=True)):
        if like is None:
            check_tensor(owner, f"{name}[{level}]", value, "B C H W", C=width)
            like = value
        else:
            check_tensor(
                owner, f"{name}[{level}]", value, "B C H W", like=like, B=like.shape[0], C=width
            )
    found = [tuple(value.shape[-2:]) for value in maps]
    if ordered and any(
        a < b for fine, coarse in pairwise(found) for a, b in zip(fine, coarse, strict=True)
    ):
        msg = f"{owner}: {name} must run from fine to coarse; got sizes {found}"
        raise InputError(msg)
