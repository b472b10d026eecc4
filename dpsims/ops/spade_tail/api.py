"""The tail of a SPADE: normalise by channel, modulate by pixel, activate."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from dpsims._checks import check_int, check_number, check_tensor
from dpsims.errors import DTypeError
from dpsims.ops.spade_tail import _autograd, _closed_form, _library, _reference
from dpsims.ops.spade_tail._choice import resolve_for


class ChannelStatistics(NamedTuple):
    """What :func:`spade_tail` normalises by.

    Attributes:
        mean: Mean of every channel, ``(C,)``.
        var: Biased variance of every channel, ``(C,)``.
        eps: Added to the variance.
        num_values: How many values of ``features`` every mean was taken over, those of other
            processes included: the gradient then flows through mean and variance to the features.
            ``None`` means fixed numbers, such as running statistics.
        all_reduce: Sum of a tensor over all processes, differentiable, where the mean was taken
            over several; the backward calls it once, with two numbers per channel.

    Source:
        Ioffe and Szegedy, 2015.

    Example:
        >>> statistics = ChannelStatistics(torch.zeros(3), torch.ones(3))
        >>> statistics.eps, statistics.num_values
        (1e-05, None)
    """

    mean: Tensor
    var: Tensor
    eps: float = 1e-5
    num_values: int | Tensor | None = None
    all_reduce: Callable[[Tensor], Tensor] | None = None


def channel_moments(
    features: Float[Tensor, "B C H W"], *, impl: str = "auto"
) -> tuple[Float[Tensor, " C"], Float[Tensor, " C"]]:
    """Mean and biased variance of every channel, without a gradient.

    :func:`spade_tail` has the gradient that goes through them: give them to it with their
    ``num_values``.

    Args:
        features: Maps of any memory format; an empty batch gives zeros.
        impl: As in :func:`spade_tail`.

    Shape:
        - features ``(B, C, H, W)``; outputs ``(C,)``, float64 for float64 maps, else float32

    Raises:
        InputError: A wrong rank, or an ``impl`` that cannot run.
        DTypeError: Not a floating-point tensor.

    Note:
        Units: of the features and of their square. Cost: one read; sums are made around a value
        near the mean, so that large means do not cancel, and always in the same order.

    Source:
        Not from the paper.

    Example:
        >>> mean, var = channel_moments(torch.tensor([1.0, 3.0]).view(1, 1, 1, 2))
        >>> mean.item(), var.item()
        (2.0, 1.0)
    """
    check_tensor("channel_moments", "features", features, "B C H W")
    features = features.detach()
    if features.numel() == 0:
        dtype = torch.promote_types(features.dtype, torch.float32)
        mean, var = features.new_zeros((2, features.shape[1]), dtype=dtype).unbind()
        return mean, var
    resolved = resolve_for(impl, features)
    if resolved == "fused":
        return _library.moments(features)
    plain = features.device.type == "cpu" and not torch.compiler.is_compiling()
    return (_closed_form if plain and resolved == "closed_form" else _reference).moments(features)


def spade_tail(
    features: Float[Tensor, "B C h w"],
    modulation: Float[Tensor, "B C2 H W"],
    statistics: ChannelStatistics | None = None,
    *,
    slope: float = 1.0,
    upsample: int = 1,
    impl: str = "auto",
) -> Float[Tensor, "B C H W"]:
    r"""Normalise features, scale and shift every pixel, and apply a LeakyReLU.

    :math:`y = \mathrm{leaky\_relu}\big((x - \mu_c) / \sqrt{\sigma_c^2 + \epsilon}\,(1 + \gamma) +
    \beta\big)`, with :math:`\gamma` and :math:`\beta` the two halves of ``modulation``.

    Args:
        features: Maps to normalise.
        modulation: ``gamma`` in the first half of the channels, ``beta`` in the second: one
            convolution's output, read where it is.
        statistics: Moments to normalise by. ``None`` leaves the features as they are.
        slope: Slope of the LeakyReLU below 0, in ``[0, 1]``; 1 means no activation.
        upsample: Factor by which the features are repeated in height and width, to nearest, as
            they are read. Moments are not changed by it.
        impl: ``"reference"`` is the equation in plain torch; ``"closed_form"`` works in place,
            with a gradient by formula; ``"fused"`` is Triton's kernels; ``"auto"`` is as in
            :func:`resolve_spade_tail_impl`.

    Shape:
        - features ``(B, C, h, w)``; modulation ``(B, 2 C, h * upsample, w * upsample)``
        - output ``(B, C, h * upsample, w * upsample)``, in the dtype and, unless ``"reference"``,
          the memory format of the features

    Raises:
        InputError: Shapes or devices differ, a setting is out of range, or ``impl`` cannot run.
        DTypeError: Not floating-point tensors.

    Note:
        Units: ``gamma`` and ``beta`` are in standard deviations of a channel; an activation of
        ``slope`` 0 is a ReLU. Arithmetic is in float32 or better. Cost of ``"fused"``, in
        reads and writes of maps of the output's size: 4, and 1 more for the moments; backward 9
        where they are of the batch; an activation adds one bit per value, kept for the backward.
        Gradients: any order; forward mode with ``"reference"`` only.

    Source:
        Park et al., CVPR 2019, Eq. 1, in the place that OASIS (Schönfeld et al., ICLR 2021) and
        DP-SIMS (Berrada et al., CVPR 2024, Sec. A.1) give it.

    Example:
        >>> features, modulation = torch.randn(2, 3, 4, 4), torch.zeros(2, 6, 8, 8)
        >>> spade_tail(features, modulation, upsample=2).shape
        torch.Size([2, 3, 8, 8])
    """
    _check(features, modulation, statistics, slope, upsample)
    resolved = resolve_for(impl, features, modulation, size=features.numel())
    if statistics is None:
        mean = var = num_values = all_reduce = None
        eps = 0.0
    else:
        mean, var, eps, num_values, all_reduce = statistics
        dtype = torch.promote_types(features.dtype, torch.float32)
        mean, var = mean.to(dtype), var.to(dtype)
    if resolved != "reference":
        scalars = (float(eps), float(slope), upsample)
        maps = (features, modulation, mean, var, num_values, all_reduce)
        return _autograd.tail(*maps, *scalars, fused=resolved == "fused")
    if num_values is not None:
        # the values that are there have no graph
        mean, var = _reference.moments(features, num_values, all_reduce)
    return _reference.apply(features, modulation, mean, var, eps, slope, upsample)


def _check(
    features: Tensor,
    modulation: Tensor,
    statistics: ChannelStatistics | None,
    slope: float,
    upsample: int,
) -> None:
    owner = "spade_tail"
    check_number(owner, "slope", slope, minimum=0, maximum=1)
    check_int(owner, "upsample", upsample)
    check_tensor(owner, "features", features, "B C H W")
    b, c, h, w = features.shape
    h, w = h * upsample, w * upsample
    check_tensor(
        owner, "modulation", modulation, "B C2 H W", like=features, B=b, C2=2 * c, H=h, W=w
    )
    if statistics is None:
        return
    if not isinstance(statistics, ChannelStatistics):
        msg = f"{owner}: statistics must be ChannelStatistics; got {type(statistics).__name__}"
        raise DTypeError(msg)
    check_number(owner, "eps", statistics.eps, minimum=0)
    for name, value in (("mean", statistics.mean), ("var", statistics.var)):
        check_tensor(owner, name, value, "C", like=features, C=c)
