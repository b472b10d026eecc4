"""Batch normalisation, over one process or many, whose statistics no bad batch can poison."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from dpsims._checks import (
    check_bool,
    check_choice,
    check_int,
    check_number,
    check_tensor,
    values_are_readable,
)
from dpsims.errors import InputError
from dpsims.nn._buffers import WideBuffers
from dpsims.nn._group_moments import AllReduceSum, group_moments, world_size
from dpsims.nn._instance_norm import InstanceNorm2d
from dpsims.ops.spade_tail.api import ChannelStatistics, channel_moments

_NORMS = ("batch", "sync_batch", "instance", "none")
_ADVICE = 'use a larger batch, larger maps or norm="instance"'


class BatchNorm2d(WideBuffers, nn.BatchNorm2d):
    r"""Normalise every channel by its mean and variance over the batch and the map.

    As :class:`torch.nn.BatchNorm2d`, with its buffer names, so ``update_bn`` and its checkpoints
    work. Different in four points: a batch with a NaN or infinite moment leaves the running
    statistics alone (the output still shows it); they stay in float32 when the model is cast to
    half precision; ``sync=True`` shares the moments between processes on any backend, CPU
    included; input and module may differ in dtype.

    Args:
        channels: Width ``C`` of the maps.
        affine: Whether to learn a scale (starts at 1) and a shift (starts at 0) per channel.
        momentum: Share of the newest batch in the running statistics. ``None`` means the plain
            average of all batches.
        eps: Added to the variance.
        sync: Whether all processes of the default group normalise as one batch, weighted by their
            sizes. Without a group, or in a group of one, this changes nothing.

    Shape:
        - features ``(B, C, H, W)``; output the same, in the same dtype and memory format
        - ``repeats``, a second argument of the call, says how often each value occurs: maps before
          a nearest-neighbour upsampling by 2, with ``repeats=4``, give the values and the recorded
          statistics of the upsampled maps

    Raises:
        InputError: A setting out of range; features of another width; in training a batch of
            fewer than two values per channel.
        DTypeError: Not a floating-point tensor.

    Note:
        Units: the output is in standard deviations of its channel, before the learned scale.
        Training uses and records batch statistics, evaluation uses the recorded ones. The recorded
        variance is the unbiased one. With ``sync=True`` one collective runs in each direction, so
        every process must call the module equally often; a process may hold an empty batch.
        Gradients: any order. Moments are taken in float32 or better.

    Source:
        Ioffe and Szegedy, 2015. In DP-SIMS: the norm of SPADE, of the label-map encoder and of the
        backbone's features (there without scale and shift).

    Example:
        >>> norm = BatchNorm2d(3, affine=False)
        >>> out = norm(torch.randn(4, 3, 8, 8) * 5 + 2)
        >>> bool(out.mean().abs() < 1e-5), out.std().item().__round__(2)
        (True, 1.0)
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(
        self,
        channels: int,
        *,
        affine: bool = True,
        momentum: float | None = 0.1,
        eps: float = 1e-5,
        sync: bool = False,
    ) -> None:
        check_int("BatchNorm2d", "channels", channels)
        check_bool("BatchNorm2d", "affine", affine)
        check_bool("BatchNorm2d", "sync", sync)
        check_number("BatchNorm2d", "eps", eps, above=0)
        if momentum is not None:
            check_number("BatchNorm2d", "momentum", momentum, minimum=0, maximum=1)
        super().__init__(channels, eps=eps, momentum=momentum, affine=affine)
        self.sync = sync
        # make_norm puts the name of the block here, so that errors speak of what the user built
        self._owner = "BatchNorm2d"

    def forward(
        self, features: Float[Tensor, "B C H W"], repeats: int = 1
    ) -> Float[Tensor, "B C H W"]:
        """Normalise the maps; see the class."""
        check_tensor(self._owner, "features", features, "B C H W", C=self.num_features)
        check_int(self._owner, "repeats", repeats)
        dtype = torch.promote_types(features.dtype, torch.float32)
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if not self.training:
            mean, var = self.running_mean.to(dtype), self.running_var.to(dtype)
            return F.batch_norm(features, mean, var, weight, bias, eps=self.eps)
        if self.reduces:
            return self._forward_sync(features, weight, bias, repeats)
        count = features.numel() // self.num_features
        _check_moments_exist(self._owner, features, count)
        # momentum 1 turns the scratch buffers into this batch's moments
        moments = features.new_zeros((2, self.num_features), dtype=dtype)
        mean, var = moments.unbind()
        out = F.batch_norm(
            features, mean, var, weight, bias, training=True, momentum=1.0, eps=self.eps
        )
        if repeats > 1:
            # the recorded variance is unbiased, and so depends on the number of values. Not in
            # place: the backward pass holds the buffer
            moments = torch.stack((mean, var * ((count - 1) * repeats / (count * repeats - 1))))
        self._record(moments)
        return out

    @torch.no_grad()
    def statistics(
        self, features: Float[Tensor, "B C H W"], *, upsample: int = 1
    ) -> ChannelStatistics:
        """What the maps would be normalised by, for :func:`dpsims.ops.spade_tail.spade_tail`.

        In training these are the moments of the batch, or of all processes' batches, and they are
        recorded, as a call of the module would.

        Args:
            features: Maps to normalise.
            upsample: Factor by which the maps will be repeated in height and width: it changes
                the unbiased variance that is recorded.
        """
        check_tensor(self._owner, "features", features, "B C H W", C=self.num_features)
        check_int(self._owner, "upsample", upsample)
        if not self.training:
            return ChannelStatistics(self.running_mean, self.running_var, self.eps)
        if self.reduces:
            total, mean, var = group_moments(features)
            if values_are_readable(total):
                _check_moments_exist(self._owner, features, int(total) * upsample**2)
            found = ChannelStatistics(mean, var, self.eps, total, AllReduceSum.apply)
        else:
            count = features.numel() // self.num_features
            _check_moments_exist(self._owner, features, count * upsample**2)
            found = ChannelStatistics(*channel_moments(features), self.eps, count)
        assert found.num_values is not None
        repeated = found.num_values * upsample**2
        self._record(torch.stack((found.mean, found.var * (repeated / (repeated - 1)))))
        return found

    @property
    def reduces(self) -> bool:
        """Whether a call would ask other processes for their moments."""
        return self.training and self.sync and world_size() > 1

    def _forward_sync(
        self, features: Tensor, weight: Tensor | None, bias: Tensor | None, repeats: int
    ) -> Tensor:
        maps = features.to(torch.promote_types(features.dtype, torch.float32))
        count, mean, var = group_moments(maps)
        if values_are_readable(count):
            _check_moments_exist(self._owner, features, int(count))
        total = count * repeats
        self._record(torch.stack((mean, var * total / (total - 1))))
        scale = torch.rsqrt(var + self.eps)
        out = (maps - mean.view(-1, 1, 1)) * scale.view(-1, 1, 1)
        if weight is not None:
            out = out * weight.view(-1, 1, 1)
        if bias is not None:
            out = out + bias.view(-1, 1, 1)
        return out.to(features.dtype)

    @torch.no_grad()
    def _record(self, moments: Tensor) -> None:
        """Fold one batch into the running statistics, unless a moment is not finite."""
        moments = moments.to(self.running_mean.dtype)
        finite = moments.isfinite().all()
        self.num_batches_tracked.add_(finite)
        share: Any = self.momentum
        if share is None:
            share = self.num_batches_tracked.clamp(min=1).to(moments.dtype).reciprocal()
        for running, new in zip((self.running_mean, self.running_var), moments, strict=True):
            running.lerp_(torch.where(finite, new, running), share)

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"{super().extra_repr()}, sync={self.sync}"


def make_norm(owner: str, channels: int, norm: str, *, affine: bool = False) -> nn.Module:
    """Build the normalisation that a block was asked for.

    Args:
        owner: The block's public name, used in every error.
        channels: Width ``C`` of the maps.
        norm: ``"batch"``; ``"sync_batch"``, which is the same over all processes; ``"instance"``;
            or ``"none"``.
        affine: Whether to learn a scale and a shift per channel.

    Raises:
        InputError: ``norm`` is none of these, or ``channels`` is below 1.
    """
    check_int(owner, "channels", channels)
    check_choice(owner, "norm", norm, _NORMS)
    if norm == "none":
        return nn.Identity()
    if norm == "instance":
        return InstanceNorm2d(owner, channels, affine=affine)
    layer = BatchNorm2d(channels, affine=affine, sync=norm == "sync_batch")
    layer._owner = owner
    return layer


def _check_moments_exist(owner: str, features: Tensor, count: int) -> None:
    if count > 1:
        return
    msg = (
        f"{owner}: features must hold at least two values per channel in training ({_ADVICE}); "
        f"got {tuple(features.shape)}"
    )
    raise InputError(msg)
