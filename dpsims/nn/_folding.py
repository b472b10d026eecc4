"""Linear maps composed with what stands beside them."""

from __future__ import annotations

from typing import Self, TypeVar

import torch
from torch import Tensor, nn

from dpsims.errors import InputError
from dpsims.nn.labels import LabelConv2d
from dpsims.nn.norm import BatchNorm2d

C = TypeVar("C", nn.Conv2d, LabelConv2d)


class Prepared(nn.Module):
    """Base of parts whose weights are folded: they cannot be trained."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> Self:
        """Refuse training mode."""
        if mode:
            msg = (
                f"{type(self).__name__}: mode must be False, for a part made by "
                "prepare_for_inference cannot be trained; got True"
            )
            raise InputError(msg)
        return super().train(False)


def take_over(part: nn.Module, source: nn.Module) -> None:
    """Make ``part`` hold what ``source`` held, which nobody needs any more."""
    nn.Module.__init__(part)
    part.__dict__.update(source.__dict__)
    part.training = False


def wide(value: Tensor) -> Tensor:
    """In float32 or better, without a graph."""
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))


def norm_as_affine(norm: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Scale and shift per channel of a batch norm in evaluation; ``None`` for other norms."""
    # a subclass may compute something else
    if type(norm) is not BatchNorm2d:
        return None
    scale = torch.rsqrt(wide(norm.running_var) + norm.eps)
    shift = -wide(norm.running_mean) * scale
    if norm.weight is not None:
        scale, shift = scale * wide(norm.weight), shift * wide(norm.weight) + wide(norm.bias)
    return scale, shift


def fold_norm_behind(conv: C, norm: nn.Module) -> nn.Module:
    """Fold a norm into the convolution before it; what is left of the norm."""
    affine = norm_as_affine(norm)
    if affine is None:
        return norm
    scale, shift = affine
    bias = shift if conv.bias is None else shift + scale * wide(conv.bias)
    _assign(conv, wide(conv.weight) * scale.view(-1, 1, 1, 1), bias)
    return nn.Identity()


def fold_norm_before(norm: nn.Module, conv: nn.Conv2d) -> nn.Module:
    """Fold a norm into the 1x1 convolution behind it; what is left of the norm."""
    affine = norm_as_affine(norm)
    if affine is None:
        return norm
    weight = wide(conv.weight)
    # statistics may be wider than weights
    scale, shift = (value.to(weight.dtype) for value in affine)
    bias = weight[:, :, 0, 0] @ shift
    if conv.bias is not None:
        bias = bias + wide(conv.bias)
    _assign(conv, weight * scale.view(1, -1, 1, 1), bias)
    return nn.Identity()


def make_conv(weight: Tensor, bias: Tensor | None, like: Tensor) -> nn.Conv2d:
    """A frozen convolution that keeps the size, with the dtype and layout of a weight."""
    outputs, inputs, kernel, _ = weight.shape
    # on the meta device nothing is drawn
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, device="meta")
    conv.weight, conv.bias = _frozen(weight, like), None
    if bias is not None:
        conv.bias = _frozen(bias, like)
    return conv.eval()


def _assign(conv: nn.Conv2d | LabelConv2d, weight: Tensor, bias: Tensor) -> None:
    old = conv.weight
    conv.weight, conv.bias = _frozen(weight, old), _frozen(bias, old)


def _frozen(value: Tensor, like: Tensor) -> nn.Parameter:
    value = value.detach().to(like.dtype)
    if value.dim() == 4 and not like.is_contiguous():
        value = value.contiguous(memory_format=torch.channels_last)
    else:
        value = value.contiguous()
    return nn.Parameter(value, requires_grad=False)
