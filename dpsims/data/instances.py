"""Instance maps as two channels of offsets."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from dpsims._checks import check_bool, check_int, check_tensor


def instance_offsets(
    instances: Int[Tensor, "B H W"], *, background: int = 0, normalize: bool = True
) -> Float[Tensor, "B 2 H W"]:
    r"""Turn instance ids into the offset of every pixel to its object's centre of mass.

    An instance is a set of pixels of one image with one id, connected or not. Its centre of mass
    may lie outside of it.

    Args:
        instances: Instance id of every pixel. Equal ids in two images are two instances.
        background: Id of the pixels that belong to no object; their offset is 0.
        normalize: Divide vertical offsets by ``H`` and horizontal ones by ``W``, so that values
            lie in (-1, 1) at any size. ``False`` gives pixels.

    Shape:
        - instances ``(B, H, W)``, uint8, int16, int32 or int64; output ``(B, 2, H, W)``, float32,
          channel 0 vertical (down is positive), channel 1 horizontal (right is positive)

    Raises:
        InputError: ``instances`` has another rank, or no pixels.
        DTypeError: ``instances`` does not hold integer ids, or an option has another type.

    Note:
        Units: fractions of the map's height and width, or pixels; pixel centres lie at integers.
        Cost: a few passes over the map; ids spread wider than the map has pixels are sorted first.
        Centres are exact sums divided in float64. Not differentiable. Compute after every flip,
        crop and resize, not before: the centre of what is visible moves.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1, "vertical and horizontal offset maps of every
        foreground pixel w.r.t. its object center of mass", after Cheng et al., Panoptic-DeepLab,
        CVPR 2020. Sign (centre minus pixel) and unit are not in the paper; Panoptic-DeepLab uses
        this sign and pixels.

    Example:
        >>> offsets = instance_offsets(torch.tensor([[[5, 5, 5, 0]]]), normalize=False)
        >>> offsets[0, 1]  # one step right, none, one step left; background
        tensor([[ 1.,  0., -1.,  0.]])
    """
    check_tensor("instance_offsets", "instances", instances, "B H W", kind="integer")
    check_int("instance_offsets", "background", background, minimum=None)
    check_bool("instance_offsets", "normalize", normalize)
    batch, height, width = instances.shape
    ids = instances.long()
    slot, num_slots = _numbered(ids)
    image = torch.arange(batch, device=ids.device).view(-1, 1, 1)
    slot = (slot + image * num_slots).flatten()

    def summed(values: Tensor) -> Tensor:
        sums = values.new_zeros(batch * num_slots)
        return sums.index_add_(0, slot, values.expand(ids.shape).flatten())

    rows = torch.arange(height, device=ids.device).view(1, -1, 1)
    columns = torch.arange(width, device=ids.device).view(1, 1, -1)
    counts = summed(torch.ones_like(rows)).clamp_(min=1)
    offsets = []
    for position, size in ((rows, height), (columns, width)):
        center = (summed(position).double() / counts)[slot].view(ids.shape)
        offset = (center - position) / (size if normalize else 1)
        offsets.append(offset.float().masked_fill_(ids == background, 0.0))
    return torch.stack(offsets, dim=1)


def _numbered(ids: Tensor) -> tuple[Tensor, int]:
    """Small numbers, from 0, that tell the ids apart, and how many there may be."""
    if ids.numel() == 0:
        return ids, 0
    low, high = (int(end) for end in ids.aminmax())
    if high - low < ids[0].numel():
        return ids - low, high - low + 1
    distinct, numbers = torch.unique(ids, return_inverse=True)
    return numbers, len(distinct)
