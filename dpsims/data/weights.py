"""How often each image is drawn: by the rarest class in it."""

from __future__ import annotations

import logging
import warnings
from typing import Literal

import torch
from jaxtyping import Bool, Float64, Shaped
from torch import Tensor

from dpsims._checks import check_choice, check_tensor
from dpsims.data._label_checks import shortened
from dpsims.errors import DTypeError, InputError

_logger = logging.getLogger(__name__)


def image_sampling_weights(
    presence: Bool[Tensor, "I K"] | Shaped[Tensor, "I K"],
    *,
    empty: Literal["most_frequent", "error", "drop"] = "most_frequent",
) -> Float64[Tensor, " I"]:
    r"""Weigh every image by the rarest class in it: :math:`w = f_k^{-1/2}`.

    Args:
        presence: Which class occurs in which image, as from :func:`class_presence`, or how many
            pixels of it (anything above 0 counts as present).
        empty: What to do with images that have no class: give them the weight of the most frequent
            class, with a warning; raise; or give them weight 0, so that they are never drawn.

    Shape:
        - presence ``(I, K)`` for ``I`` images and ``K`` classes; output ``(I,)``, float64, CPU

    Raises:
        InputError: No images or classes, a negative or NaN count, no class in any image, or an
            image without a class where ``empty="error"`` (the message lists up to ten).
        DTypeError: ``presence`` is not a real tensor.

    Warns:
        UserWarning: Some images have no class and ``empty="most_frequent"``; names their number.

    Note:
        Units: relative to one another, at least 1; divide by the sum for probabilities. Classes
        that no image holds count for nothing and are logged. Cost: one pass over ``presence``.

    Source:
        Berrada et al., CVPR 2024, Sec. 4.1. Theirs -> ours: f_c is the mean of a column, k the
        class of an image with the smallest f. Images without a class are not in the paper.

    Example:
        >>> presence = torch.tensor([[True, False], [True, False], [True, False], [True, True]])
        >>> image_sampling_weights(presence)
        tensor([1., 1., 1., 2.], dtype=torch.float64)
    """
    owner = "image_sampling_weights"
    check_choice(owner, "empty", empty, ("most_frequent", "error", "drop"))
    check_tensor(owner, "presence", presence, "I K", kind="any")
    if presence.is_complex():
        msg = f"{owner}: presence must be bool or real counts; got {presence.dtype}"
        raise DTypeError(msg)
    present = _present(presence.detach().cpu())
    images_of = present.sum(dim=0)
    if not bool(images_of.any()):
        msg = f"{owner}: presence must hold at least one class in one image; got none"
        raise InputError(msg)
    absent = (images_of == 0).nonzero().flatten().tolist()
    if absent:
        _logger.warning(
            "%s: %d classes occur in no image: %s", owner, len(absent), shortened(absent)
        )
    class_weights = (images_of.double() / len(present)) ** -0.5
    weights = torch.zeros(len(present), dtype=torch.float64)
    # from frequent to rare, so that the rarest class of an image is written last
    for index in images_of.argsort(descending=True).tolist():
        weights.masked_fill_(present[:, index], class_weights[index].item())
    missing = (~present.any(dim=1)).nonzero().flatten()
    if len(missing):
        weights[missing] = _weight_without_class(missing, float(class_weights.min()), empty)
    return weights


def _present(presence: Tensor) -> Tensor:
    if presence.dtype is torch.bool:
        return presence
    # negated, so that NaN is caught as well
    wrong = ~(presence >= 0)
    if bool(wrong.any()):
        image, index = wrong.nonzero()[0].tolist()
        msg = (
            "image_sampling_weights: presence must be bool, or counts of at least 0; "
            f"got {presence[image, index].item()} at ({image}, {index})"
        )
        raise InputError(msg)
    return presence > 0


def _weight_without_class(missing: Tensor, lowest: float, empty: str) -> float:
    if empty == "drop":
        return 0.0
    if empty == "error":
        msg = (
            "image_sampling_weights: presence must hold a class in every image (or choose another "
            f"empty=); got none in images {shortened(missing.tolist())}"
        )
        raise InputError(msg)
    msg = (
        f"image_sampling_weights: {len(missing)} images have no class and get the weight of the "
        f"most frequent one: {shortened(missing.tolist())}"
    )
    warnings.warn(msg, UserWarning, stacklevel=3)
    return lowest
