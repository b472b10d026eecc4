"""The injection of an injector that is folded with the norm and the activation behind it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dpsims.ops.attention import _library, _reference
from dpsims.ops.attention.injection import (
    deciding_dtype,
    has_triton_for,
    resolve_injection_impl,
)


def inject_folded(
    features: Tensor,
    keys: Tensor,
    biases: Tensor,
    values: Tensor,
    scale: Tensor | None = None,
    *,
    gelu: bool = False,
) -> Tensor:
    """``gelu(features * scale + read)``, in one kernel where there is one.

    It is for inference: what needs a gradient goes the plain way.

    Args:
        features: Feature map ``(B, C, H, W)``.
        keys: ``(B, T, C)``, compared with the features as they are.
        biases: ``(B, T)``.
        values: ``(B, T, C)``, added as they are.
        scale: ``(C,)``; ``None`` means 1.
        gelu: Whether the sum is activated.
    """
    given = [x for x in (features, keys, biases, values, scale) if x is not None]
    wanted = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    resolved = resolve_injection_impl(
        device_type=features.device.type,
        dtype=deciding_dtype(*given),
        channels=features.shape[1],
        num_tokens=keys.shape[1],
        has_triton=has_triton_for(features.device.type),
    )
    if resolved.impl == "fused" and not wanted:
        return _library.inject_folded(features, keys, biases, values, scale, gelu)
    with _reference.without_autocast(features.device):
        out = _reference.inject(features, keys, biases, values, scale)
    return F.gelu(out) if gelu else out
