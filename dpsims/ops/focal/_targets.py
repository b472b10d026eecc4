"""What every pixel should be called, how much it counts, and how pixels become one number."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dpsims._checks import invalid_labels

Reduction = Literal["mean", "valid_mean", "sum", "none"]


class FocalSpec(NamedTuple):
    """The options of a focal loss; plain numbers only, so that an operator can take them.

    Attributes:
        gamma: Focusing exponent.
        smoothing: Target mass that is spread evenly over all channels.
        ignore_index: Id of pixels that cost nothing, or ``None``.
        num_classes: Labels lie in ``[0, num_classes)``.
        target: The class that every pixel should be called, whatever its label, at weight 1;
            ``None`` means the label's.
        reduction: How pixels become the loss.
    """

    gamma: float
    smoothing: float
    ignore_index: int | None
    num_classes: int
    target: int | None
    reduction: str


class Targets(NamedTuple):
    """What every pixel should be called and how much it counts.

    Attributes:
        ids: int64 ``(B, 1, H, W)``, safe to index with.
        weights: ``(B, 1, H, W)``: 0 where ignored, NaN where the label was out of range.
        valid: bool ``(B, 1, H, W)``, false where ignored.
    """

    ids: Tensor
    weights: Tensor
    valid: Tensor


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that the loss of logits of ``dtype`` is computed and returned in."""
    return torch.promote_types(dtype, torch.float32)


def focal_targets(
    labels: Tensor, class_weights: Tensor | None, spec: FocalSpec, dtype: torch.dtype
) -> Targets:
    """The targets of ``labels`` for logits of ``dtype``.

    ``class_weights`` has an entry for every id in ``[0, spec.num_classes)``; ``None`` means 1.
    """
    ids = labels.long().unsqueeze(1)
    valid = _valid(ids, spec.ignore_index)
    if spec.target is not None:
        return Targets(torch.full_like(ids, spec.target), valid.to(loss_dtype(dtype)), valid)
    bad = invalid_labels(ids, spec.num_classes, spec.ignore_index)
    ids = torch.where(bad | ~valid, 0, ids)
    if class_weights is None:
        weights = torch.ones_like(ids, dtype=loss_dtype(dtype))
    else:
        weights = class_weights.to(loss_dtype(dtype))[ids]
    weights = torch.where(valid, weights, 0.0)
    return Targets(ids, torch.where(bad, torch.nan, weights), valid)


def _valid(ids: Tensor, ignore_index: int | None) -> Tensor:
    if ignore_index is None:
        return torch.ones_like(ids, dtype=torch.bool)
    return ids != ignore_index


def reduce_pixels(loss: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """Reduce a ``(B, 1, H, W)`` map; an empty denominator counts as 1."""
    if reduction == "none":
        return loss.squeeze(1)
    return loss.sum() / divisor(valid, reduction)


def divisor(valid: Tensor, reduction: str) -> Tensor | int:
    """What the sum over all pixels is divided by."""
    if reduction == "mean":
        return max(1, valid.numel())
    if reduction == "valid_mean":
        return valid.sum().clamp(min=1)
    return 1


def pixel_upstream(upstream: Tensor, valid: Tensor, reduction: str) -> Tensor:
    """The gradient of every pixel's loss, ``(B, 1, H, W)``, from that of the reduced loss."""
    if reduction == "none":
        return upstream.unsqueeze(1)
    return (upstream / divisor(valid, reduction)).expand(valid.shape)
