"""The SPADE tail as operators of torch, which compilers and CUDA graphs take whole.

Their schemas are the contract: Triton kernels fill it on CUDA, plain torch on the CPU, and the
fake kernels give the layouts of the results. None is differentiable by itself: `_autograd` joins
them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dpsims.ops._launch import triton_kernel
from dpsims.ops.spade_tail import _closed_form
from dpsims.ops.spade_tail._layout import empty_result, empty_signs, pack_signs, unpack_signs
from dpsims.ops.spade_tail._reference import normalize, per_channel, summed, upsampled


@torch.library.custom_op("dpsims::spade_moments", mutates_args=(), device_types="cpu")
def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of every channel, in float32 or better."""
    mean, var = _closed_form.moments(features)
    return mean, var


@torch.library.custom_op("dpsims::spade_apply", mutates_args=(), device_types="cpu")
def apply(
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
    save_signs: bool,
) -> tuple[Tensor, Tensor]:
    """Output, and one bit per value that says whether it was positive before the activation."""
    normalized = upsampled(_normalized(features, mean, var, eps), upsample)
    gamma, beta = modulation.to(normalized.dtype).chunk(2, dim=1)
    out = torch.addcmul(beta, normalized, 1 + gamma)
    positive = out > 0
    result = empty_result(features, upsample).copy_(torch.where(positive, out, out * slope))
    if save_signs:
        return result, pack_signs(positive, features, upsample)
    return result, features.new_empty(0, dtype=torch.uint8)


@torch.library.custom_op("dpsims::spade_modulate", mutates_args=(), device_types="cpu")
def modulate(features: Tensor, modulation: Tensor, slope: float, upsample: int) -> Tensor:
    """The tail of folded weights: a whole scale, and a shift unless there is none."""
    wide = upsampled(_normalized(features, None, None, 0.0), upsample)
    channels = features.shape[1]
    out = wide * modulation[:, :channels].to(wide.dtype)
    if modulation.shape[1] > channels:
        out = out + modulation[:, channels:].to(wide.dtype)
    return empty_result(features, upsample).copy_(torch.where(out > 0, out, out * slope))


@torch.library.custom_op("dpsims::spade_sums", mutates_args=(), device_types="cpu")
def sums(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float,
    upsample: int,
) -> Tensor:
    """Per channel, the sum of the gradient by the normalised features, plain and times them."""
    normalized = _normalized(features, mean, var, eps)
    inner, _ = _inner(grad, features, modulation, signs, slope, upsample)
    return torch.stack((inner.sum((0, 2, 3)), (inner * normalized).sum((0, 2, 3))))


@torch.library.custom_op("dpsims::spade_gradients", mutates_args=(), device_types="cpu")
def gradients(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    shares: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of features and modulation; ``shares`` are the sums of all, per value."""
    normalized = _normalized(features, mean, var, eps)
    inner, grad = _inner(grad, features, modulation, signs, slope, upsample)
    if shares is not None:
        inner = inner - per_channel(shares[0]) - normalized * per_channel(shares[1])
    if var is not None:
        inner = inner * per_channel(torch.rsqrt(var + eps))
    both = torch.cat((grad * upsampled(normalized, upsample), grad), dim=1)
    return torch.empty_like(features).copy_(inner), torch.empty_like(modulation).copy_(both)


@moments.register_fake
def _(features: Tensor) -> tuple[Tensor, Tensor]:
    dtype = torch.promote_types(features.dtype, torch.float32)
    mean = features.new_empty(features.shape[1], dtype=dtype)
    return mean, torch.empty_like(mean)


@apply.register_fake
def _(
    features: Tensor,
    modulation: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
    save_signs: bool,
) -> tuple[Tensor, Tensor]:
    signs = features.new_empty(0, dtype=torch.uint8)
    return empty_result(features, upsample), (
        empty_signs(features, upsample) if save_signs else signs
    )


@modulate.register_fake
def _(
    features: Tensor,
    modulation: Tensor,
    slope: float,
    upsample: int,
) -> Tensor:
    return empty_result(features, upsample)


@sums.register_fake
def _(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    mean: Tensor,
    var: Tensor,
    eps: float,
    slope: float,
    upsample: int,
) -> Tensor:
    dtype = torch.promote_types(features.dtype, torch.float32)
    return features.new_empty((2, features.shape[1]), dtype=dtype)


@gradients.register_fake
def _(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    shares: Tensor | None,
    eps: float,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(features), torch.empty_like(modulation)


_KERNELS = "dpsims.ops.spade_tail._triton"
moments.register_kernel("cuda")(triton_kernel(_KERNELS, "moments"))
apply.register_kernel("cuda")(triton_kernel(_KERNELS, "apply"))
modulate.register_kernel("cuda")(triton_kernel(_KERNELS, "modulate"))
sums.register_kernel("cuda")(triton_kernel(_KERNELS, "sums"))
gradients.register_kernel("cuda")(triton_kernel(_KERNELS, "gradients"))


def _normalized(features: Tensor, mean: Tensor | None, var: Tensor | None, eps: float) -> Tensor:
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return wide if mean is None or var is None else normalize(wide, mean, var, eps)


def _inner(
    grad: Tensor,
    features: Tensor,
    modulation: Tensor,
    signs: Tensor,
    slope: float,
    upsample: int,
) -> tuple[Tensor, Tensor]:
    """Gradients by the normalised features and by what goes into the activation."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    grad = grad.to(dtype)
    if slope != 1:
        grad = torch.where(unpack_signs(signs, features, upsample), grad, grad * slope)
    gamma = modulation[:, : features.shape[1]].to(dtype)
    return summed(grad * (1 + gamma), upsample), grad
