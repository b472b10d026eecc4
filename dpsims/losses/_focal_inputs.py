"""What the focal losses check before the formula."""

from __future__ import annotations

import torch
from torch import Tensor

from dpsims._checks import (
    check_int,
    check_label_values,
    check_number,
    check_tensor,
    values_are_readable,
)
from dpsims.errors import DTypeError, InputError


def check_focal_options(
    owner: str, gamma: object, label_smoothing: object, ignore_index: object
) -> None:
    """Raise unless the options that every focal loss shares are in range."""
    check_number(owner, "gamma", gamma, minimum=0)
    check_number(owner, "label_smoothing", label_smoothing, minimum=0, below=1)
    if ignore_index is not None:
        check_int(owner, "ignore_index", ignore_index, minimum=None)


def check_labels(
    owner: str, labels: object, logits: Tensor, num_classes: int, ignore_index: int | None
) -> None:
    """Raise unless ``labels`` is a label map for ``logits`` with ids in ``[0, num_classes)``."""
    batch, channels, height, width = logits.shape
    if isinstance(labels, Tensor) and labels.ndim == 4 and not labels.is_floating_point():
        fix = "squeeze dim 1" if labels.shape[1] == 1 else "take the argmax of a one-hot map"
        msg = f"{owner}: labels must have shape (B={batch}, H={height}, W={width}); "
        msg += f"got {tuple(labels.shape)} ({fix})"
        raise InputError(msg)
    sizes = {"B": batch, "H": height, "W": width}
    check_tensor(owner, "labels", labels, "B H W", kind="integer", like=logits, **sizes)
    assert isinstance(labels, Tensor)
    if (
        num_classes == channels != ignore_index
        and values_are_readable(labels)
        and bool((labels.long() == channels).any())
    ):
        msg = f"{owner}: labels must be in [0, {channels}), one id per channel; got {channels} "
        msg += "(logits need K + 1 channels for K classes, the fake class last)"
        raise InputError(msg)
    check_label_values(owner, "labels", labels, num_classes, ignore_index)


def check_gan_logits(
    owner: str,
    name: str,
    logits: object,
    labels: object,
    num_classes: int,
    ignore_index: int | None,
) -> None:
    """Raise unless ``logits`` have a channel per class and one more, and ``labels`` fit them."""
    check_tensor(owner, name, logits, "B C H W")
    assert isinstance(logits, Tensor)
    channels = num_classes + 1
    if logits.shape[1] != channels:
        msg = f"{owner}: {name} must have num_classes + 1 = {channels} channels, the fake "
        msg += f"class last; got {logits.shape[1]}"
        raise InputError(msg)
    check_labels(owner, labels, logits, num_classes, ignore_index)


def check_class_weights(owner: str, class_weights: object, logits: Tensor) -> None:
    """Raise unless ``class_weights`` is one fixed, finite, non-negative number per channel."""
    check_tensor(
        owner, "class_weights", class_weights, "C", kind="any", like=logits, C=logits.shape[1]
    )
    assert isinstance(class_weights, Tensor)
    if class_weights.dtype is torch.bool or class_weights.is_complex():
        msg = f"{owner}: class_weights must be real numbers; got {class_weights.dtype}"
        raise DTypeError(msg)
    if class_weights.requires_grad:
        msg = f"{owner}: class_weights must be constants; got a tensor that requires grad"
        raise DTypeError(msg)
    if not values_are_readable(class_weights):
        return
    bad = ~(class_weights.isfinite() & (class_weights >= 0))
    if bool(bad.any()):
        index = int(bad.nonzero()[0])
        msg = f"{owner}: class_weights must be finite and >= 0; "
        msg += f"got {float(class_weights[index]):g} at {index}"
        raise InputError(msg)
