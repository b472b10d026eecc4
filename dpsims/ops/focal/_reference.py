"""The focal loss as the paper writes it."""

from __future__ import annotations

import torch
from torch import Tensor


def pixel_focal_reference(
    logits: Tensor, targets: Tensor, weights: Tensor, gamma: float, smoothing: float
) -> Tensor:
    """Weighted focal loss of every pixel, differentiated by autograd.

    Arguments and result as in :func:`dpsims.ops.focal._closed_form.pixel_focal`.
    """
    logits = torch.where(weights == 0, 0.0, logits).to(weights.dtype)
    log_p = torch.log_softmax(logits, 1)

    def focal(log_p: Tensor) -> Tensor:
        return -((1 - log_p.exp()) ** gamma) * log_p

    value = focal(log_p.gather(1, targets))
    if smoothing:
        value = (1 - smoothing) * value + smoothing * focal(log_p).mean(1, keepdim=True)
    return torch.where(weights == 0, 0.0, weights * value)
