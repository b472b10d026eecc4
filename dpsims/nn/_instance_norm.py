"""Instance normalisation that takes every legal size."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dpsims._checks import check_tensor
from dpsims.errors import InputError


class InstanceNorm2d(nn.Module):
    """Normalise every channel of every image by itself; the same in training and evaluation."""

    def __init__(self, owner: str, channels: int, *, affine: bool, eps: float = 1e-5) -> None:
        super().__init__()
        self._owner = owner
        self.channels, self.eps = channels, eps
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, features: Tensor) -> Tensor:
        check_tensor(self._owner, "features", features, "B C H W", C=self.channels)
        if self.training and features.shape[2:].numel() == 1:
            msg = (
                f"{self._owner}: features must hold at least two pixels per image in training "
                f'(use larger maps or norm="batch"); got {tuple(features.shape)}'
            )
            raise InputError(msg)
        # one group a channel; F.group_norm and F.instance_norm refuse sizes that are legal here
        out = torch.group_norm(features, self.channels, eps=self.eps)
        if self.weight is None or self.bias is None:
            return out.to(features.dtype)
        dtype = torch.promote_types(features.dtype, torch.float32)
        scale, shift = self.weight.to(dtype), self.bias.to(dtype)
        return (out * scale.view(-1, 1, 1) + shift.view(-1, 1, 1)).to(features.dtype)
