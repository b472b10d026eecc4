"""What several SPADEs that read the same condition do together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import check_int, check_tensor
from dpsims.errors import InputError
from dpsims.nn.joined import check_joined, convolve_joined, joined_size
from dpsims.nn.norm import BatchNorm2d

Condition = Tensor | Sequence[Tensor]


class Reader(Protocol):
    """What reads a condition."""

    cond_channels: int
    ignore_index: int | None


class Layers(Protocol):
    """The convolutions of a SPADE."""

    hidden: nn.Conv2d | None
    modulation: nn.Conv2d


def check_spade_inputs(
    reader: Reader, owner: str, features: Tensor, channels: int, cond: Condition, upsample: int
) -> None:
    """Raise unless the features and the condition fit each other and the widths."""
    check_tensor(owner, "features", features, "B C H W", C=channels)
    check_int(owner, "upsample", upsample)
    b, h, w = features.shape[0], features.shape[2] * upsample, features.shape[3] * upsample
    if not isinstance(cond, list | tuple):
        width = reader.cond_channels
        check_tensor(owner, "cond", cond, "B C H W", like=features, B=b, C=width, H=h, W=w)
        return
    check_joined(owner, "cond", cond, reader.cond_channels, reader.ignore_index, like=features)
    size = (cond[0].shape[0], *joined_size(cond))
    if size != (b, h, w):
        msg = (
            f"{owner}: cond must have maps of batch size, height and width {(b, h, w)}; got {size}"
        )
        raise InputError(msg)


def modulation_inputs(
    spades: Sequence[Layers], cond: Condition, ignore_index: int | None
) -> list[Tensor]:
    """What each SPADE's ``modulation`` reads or, without hidden layers, what it gives.

    The first convolutions read the same maps, so they run as one.
    """
    layers = [spade.modulation if spade.hidden is None else spade.hidden for spade in spades]
    if isinstance(cond, Tensor) and len(layers) == 1:
        out = layers[0](cond)
    else:
        maps = [cond] if isinstance(cond, Tensor) else cond
        # read once: a parametrized weight is computed at each access
        weight = _cat([layer.weight for layer in layers])
        bias = _cat([layer.bias for layer in layers if layer.bias is not None])
        out = convolve_joined(maps, weight, bias, ignore_index)
    if spades[0].hidden is not None:
        out = F.relu(out)
    return list(out.split([layer.out_channels for layer in layers], 1))


def normalized(norm: nn.Module, features: Tensor, upsample: int) -> Tensor:
    """Normalise features as if they had been enlarged, and enlarge them.

    Repeating every value changes no moment but the unbiased variance.
    """
    if upsample == 1 or features.shape[2:].numel() == 1:
        # of a single pixel there are moments only after enlarging
        out: Tensor = norm(enlarged(features, upsample))
        return out
    if isinstance(norm, BatchNorm2d):
        return enlarged(norm(features, upsample**2), upsample)
    return enlarged(norm(features), upsample)


def enlarged(maps: Tensor, times: int) -> Tensor:
    """Repeat every row and column."""
    if times == 1:
        return maps
    # "nearest" may pick the pixel before for odd factors, by rounding
    height, width = maps.shape[2:]
    # by size: a compiler cannot trace a factor times a size that is free
    return F.interpolate(maps, size=(height * times, width * times), mode="nearest-exact")


def _cat(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
