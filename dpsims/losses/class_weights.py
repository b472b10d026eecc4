"""Class weights that balance the pixels of one batch."""

from __future__ import annotations

import torch
import torch.distributed as dist
from jaxtyping import Float, Integer
from torch import Tensor

from dpsims._checks import (
    check_bool,
    check_choice,
    check_int,
    check_label_values,
    check_tensor,
    invalid_labels,
)

_OWNER = "class_balance_weights"
_DTYPES = ("torch.float32", "torch.float64")


def class_balance_weights(
    labels: Integer[Tensor, "B H W"],
    num_classes: int,
    *,
    ignore_index: int | None = 255,
    sync: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Float[Tensor, " K"]:
    r"""Weigh every class by how rare its pixels are in the batch.

    The weight of a class is (all pixels of the batch) / (classes present x pixels of the class).
    Absent and ignored classes weigh exactly 0, so the weights of all pixels sum to the number of
    pixels, unlabelled ones included, and the present classes share that sum equally.

    Args:
        labels: Class ids of the batch.
        num_classes: Number ``K`` of classes.
        ignore_index: Id of pixels without a label. It may be one of the ``K`` classes, which then
            weighs 0. ``None`` means that every pixel has a label.
        sync: Count over all processes of ``torch.distributed``'s default group, so that every
            process gets the weights of the whole batch. Without a group it changes nothing.
        dtype: ``torch.float32`` or ``torch.float64``.
    Shape:
        - labels ``(B, H, W)``, uint8, int16, int32 or int64; output ``(K,)`` on the same device
    Raises:
        InputError: Wrong shape, ``num_classes`` below 1, or (eagerly on CPU) an id out of range.
        DTypeError: ``labels`` is not an integer map.

    Note:
        Units: dimensionless. Ids out of range are not read on other devices: there, all weights
        turn NaN. Cost: ``O(B H W)``, one all-reduce of ``K + 2`` integers with ``sync``.
        Gradients: none.
    Source:
        Schönfeld et al., ICLR 2021 (OASIS), kept by Berrada et al., CVPR 2024, Sec. 3.3,
        Eqs. (3)-(4). Theirs -> ours: C -> K, alpha_c -> the weights. OASIS's code divides by the
        number of classes present and counts unlabelled pixels in the numerator; so does this.

    Example:
        >>> labels = torch.tensor([[[0, 0, 0, 2], [0, 0, 0, 255]]])
        >>> class_balance_weights(labels, 3)  # 8 pixels, 2 classes present
        tensor([0.6667, 0.0000, 4.0000])
    """
    _check_arguments(labels, num_classes, ignore_index, sync, dtype)
    check_label_values(_OWNER, "labels", labels, num_classes, ignore_index)
    counts = _count(labels, num_classes, ignore_index)
    if sync and dist.is_available() and dist.is_initialized():
        dist.all_reduce(counts)
    num_pixels, num_bad = counts.sum(), counts[-1]
    counts = counts[:num_classes]
    present = counts > 0
    share = num_pixels.to(dtype) / present.sum().clamp(min=1).to(dtype)
    weights = torch.where(present, share / counts.clamp(min=1).to(dtype), 0.0)
    return torch.where(num_bad > 0, torch.nan, weights)


def _check_arguments(
    labels: object, num_classes: object, ignore_index: object, sync: object, dtype: object
) -> None:
    check_tensor(_OWNER, "labels", labels, "B H W", kind="integer")
    check_int(_OWNER, "num_classes", num_classes)
    if ignore_index is not None:
        check_int(_OWNER, "ignore_index", ignore_index, minimum=None)
    check_bool(_OWNER, "sync", sync)
    check_choice(_OWNER, "dtype", str(dtype), _DTYPES)


def _count(labels: Tensor, num_classes: int, ignore_index: int | None) -> Tensor:
    """Pixels of every class, then of ignored ids, then of ids out of range, as int64."""
    bins = labels.long()
    bad = invalid_labels(bins, num_classes, ignore_index)
    if ignore_index is not None:
        bins = torch.where(bins == ignore_index, num_classes, bins)
    bins = torch.where(bad, num_classes + 1, bins).flatten()
    # bincount's output size depends on the data, which torch.compile cannot trace
    counts = torch.zeros(num_classes + 2, dtype=torch.int64, device=labels.device)
    return counts.scatter_add(0, bins, torch.ones_like(bins))
