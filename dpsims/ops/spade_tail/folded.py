"""The tail of a SPADE whose statistics are folded into its modulation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsims.ops.spade_tail import _library
from dpsims.ops.spade_tail._choice import resolve_for


def is_fused(*maps: Tensor) -> bool:
    """Whether :func:`modulate_folded` takes the kernel for these maps, and so may enlarge them.

    It is for inference: what needs a gradient goes the plain way.
    """
    wanted = torch.is_grad_enabled() and any(value.requires_grad for value in maps)
    # on CPU the answer is no for any size: a small one is answered sooner
    return not wanted and resolve_for("auto", *maps, size=0) == "fused"


def modulate_folded(
    features: Tensor, modulation: Tensor, *, slope: float = 1.0, upsample: int = 1
) -> Tensor:
    """``leaky_relu(features * scale + shift)``, the features enlarged as they are read.

    Args:
        features: Maps ``(B, C, h, w)`` that need no normalisation any more.
        modulation: ``(B, 2 C, H, W)``: scale, which nothing is added to, and shift; or ``C``
            channels of scale alone.
        slope: Of the LeakyReLU below 0; 1 means none.
        upsample: Factor from ``h`` to ``H``, for the kernel only.
    """
    if is_fused(features, modulation):
        return _library.modulate(features, modulation, float(slope), upsample)
    channels = features.shape[1]
    scale = modulation[:, :channels]
    if modulation.shape[1] > channels:
        out = torch.addcmul(modulation[:, channels:], features, scale).to(features.dtype)
    else:
        out = features * scale
    return out if slope == 1 else F.leaky_relu_(out, slope)
