"""The generators in the plain way: one-hot labels, three convolutions a SPADE, sigma every time.

Each has the weights of one of the reference generators and computes the same function. The
arithmetic is that of the published SPADE and OASIS code: the labels become a one-hot map at full
size, that map and the noise are joined and resized for every SPADE, every SPADE normalises by
itself and convolves three times, and spectral norms are divided out in every forward pass.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpsims.errors import InputError
from dpsims.nn import SPADE, LabelConv2d, SPADEResBlock
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.nn.labels import resize_labels
from dpsims.nn.norm import BatchNorm2d
from dpsims_reference.generator import Generator
from dpsims_reference.networks import GeneratorOutput, ImageGenerator
from dpsims_reference.oasis import OasisGenerator

_SLOPE = 0.2


def naive_generator(generator: ImageGenerator) -> nn.Module:
    """The naive twin of a reference generator, with copies of its weights and statistics.

    Args:
        generator: Of either architecture, with batch norms.

    Raises:
        InputError: Another generator or norm.
    """
    if isinstance(generator, OasisGenerator):
        return NaiveOasisGenerator(generator).train(generator.training)
    if isinstance(generator, Generator) and generator.mapper is not None:
        return NaiveGenerator(generator).train(generator.training)
    msg = f"naive_generator: generator must be one of the two with noise; got {type(generator)}"
    raise InputError(msg)


def one_hot(labels: Tensor, num_classes: int, dtype: torch.dtype) -> Tensor:
    """``(B, K, H, W)`` of zeros and ones."""
    shape = (labels.shape[0], num_classes, *labels.shape[1:])
    zeros = torch.zeros(shape, dtype=dtype, device=labels.device)
    return zeros.scatter_(1, labels.long()[:, None], 1.0)


class NaiveOasisGenerator(nn.Module):
    """OASIS's generator; see the module."""

    def __init__(self, generator: OasisGenerator) -> None:
        super().__init__()
        self.num_classes = generator.num_classes
        stem = generator.stem
        # the noise comes first in the joined map
        order = [*range(stem.num_classes, stem.weight.shape[1]), *range(stem.num_classes)]
        self.stem = _Conv(stem, columns=order, padding=1)
        self.blocks = nn.ModuleList(map(_Block, _blocks(generator)))
        self.to_rgb = _Conv(generator.to_rgb)

    def forward(
        self,
        labels: Tensor,
        latents: Tensor,
        extra: Tensor | None = None,
        noise: Tensor | None = None,  # noqa: ARG002  the trainer's call
    ) -> GeneratorOutput:
        """Images and features."""
        noise_map = latents[:, :, None, None].expand(-1, -1, *labels.shape[1:])
        parts = [noise_map] if extra is None else [noise_map, extra]
        cond = torch.cat([*parts, one_hot(labels, self.num_classes, latents.dtype)], 1)
        step = 2 ** (len(self.blocks) - 1)
        size = [side // step for side in labels.shape[1:]]
        features = self.stem(F.interpolate(cond, size=size))
        for number, block in enumerate(self.blocks):
            if number:
                features = F.interpolate(features, scale_factor=2)
            features = block(features, cond)
        features = F.leaky_relu(features, _SLOPE)
        return GeneratorOutput(torch.tanh(self.to_rgb(features)), features)


class NaiveGenerator(nn.Module):
    """The DP-SIMS generator; see the module. Attention holds its weights."""

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.mapper = copy.deepcopy(generator.mapper)
        self.pyramid = copy.deepcopy(generator.pyramid)
        first: Any = self.pyramid.convs[0]
        self.pyramid.convs[0] = _LabelConv(first)
        for module in self.pyramid.modules():
            if isinstance(module, CrossAttentionNoiseInjector | SelfAttention2d):
                module.impl = "reference"
        self.stem = _LabelConv(generator.stem)
        self.blocks = nn.ModuleList(map(_Block, _blocks(generator)))
        self.to_rgb = _Conv(generator.to_rgb)

    def forward(
        self,
        labels: Tensor,
        latents: Tensor,
        extra: Tensor | None = None,
        noise: Tensor | None = None,  # noqa: ARG002  the trainer's call
    ) -> GeneratorOutput:
        """Images and features."""
        assert self.mapper is not None
        levels = self.pyramid(labels, self.mapper(latents), extra)
        coarsest = levels[-1]
        size = coarsest.shape[-2:]
        small = None if extra is None else F.adaptive_avg_pool2d(extra, size)
        features = self.stem(resize_labels(labels, size), small)
        for block, level in zip(self.blocks, reversed(levels), strict=True):
            size = level.shape[-2:]
            if features.shape[-2:] != size:
                features = F.interpolate(features, size=size)
            whole = F.interpolate(coarsest, size=size, mode="bilinear")
            features = block(features, torch.cat((level, whole), 1))
        features = F.leaky_relu(features, _SLOPE)
        return GeneratorOutput(self.to_rgb(features), features)


def _blocks(generator: nn.Module) -> list[SPADEResBlock]:
    return [module for module in generator.modules() if isinstance(module, SPADEResBlock)]


class _Conv(nn.Module):
    """A convolution that divides by its spectral norm in every forward pass, if it has one."""

    u: Tensor | None
    v: Tensor | None

    def __init__(
        self,
        layer: Any,
        *,
        rows: slice = slice(None),
        columns: list[int] | None = None,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        normed = hasattr(layer, "parametrizations")
        chain: Any = layer.parametrizations.weight if normed else None
        weight = (chain.original if normed else layer.weight).detach()
        if normed:
            norm = chain[0]
            # a part of the rows has a smaller norm; with v longer it gives the whole's
            whole, part = (
                (w.flatten(1) @ norm.v.to(w.dtype)).norm() for w in (weight, weight[rows])
            )
        self.register_buffer("u", norm.u[rows].clone() if normed else None)
        self.register_buffer("v", norm.v * (whole / part) if normed else None)
        if columns is not None:
            weight = weight[:, columns]
        self.weight = nn.Parameter(weight[rows].clone())
        bias = layer.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach()[rows].clone())
        self.padding = layer.padding if padding is None else padding

    def forward(self, maps: Tensor) -> Tensor:
        weight = self.weight
        if self.v is not None:
            matrix = weight.flatten(1)
            v = self._step(matrix.detach()) if self.training else self.v.to(weight.dtype)
            weight = weight / torch.linalg.vector_norm(matrix @ v)
        return F.conv2d(maps, weight, self.bias, padding=self.padding)

    def _step(self, matrix: Tensor) -> Tensor:
        assert self.u is not None
        v = F.normalize(matrix.mT @ self.u, dim=0)
        self.u.copy_(F.normalize(matrix @ v, dim=0))
        self.v = v
        return v


class _LabelConv(nn.Module):
    """The dense convolution of the one-hot map."""

    def __init__(self, layer: LabelConv2d) -> None:
        super().__init__()
        self.num_classes = layer.num_classes
        self.conv = _Conv(layer, padding=layer.kernel_size // 2)

    def forward(self, labels: Tensor, extra: Tensor | None = None) -> Tensor:
        maps = one_hot(labels, self.num_classes, self.conv.weight.dtype)
        return self.conv(maps if extra is None else torch.cat((maps, extra), 1))


class _Spade(nn.Module):
    """Normalise, then three convolutions of the resized map."""

    def __init__(self, spade: SPADE, norm: nn.Module) -> None:
        super().__init__()
        if not isinstance(norm, BatchNorm2d):
            msg = f"naive_generator: generator must have batch norms; got {type(norm).__name__}"
            raise InputError(msg)
        self.norm = nn.BatchNorm2d(spade.channels, affine=False)
        self.norm.running_mean = norm.running_mean.detach().clone()
        self.norm.running_var = norm.running_var.detach().clone()
        self.shared = None if spade.hidden is None else _Conv(spade.hidden)
        self.gamma = _Conv(spade.modulation, rows=slice(spade.channels))
        self.beta = _Conv(spade.modulation, rows=slice(spade.channels, None))

    def forward(self, features: Tensor, cond: Tensor) -> Tensor:
        normalized = self.norm(features)
        cond = F.interpolate(cond, size=features.shape[-2:])
        if self.shared is not None:
            cond = F.relu(self.shared(cond))
        return normalized * (1 + self.gamma(cond)) + self.beta(cond)


class _Block(nn.Module):
    """A residual block with a norm in each of its SPADEs."""

    def __init__(self, block: SPADEResBlock) -> None:
        super().__init__()
        self.spade_0 = _Spade(block.spade_0, block.norm_0)
        self.conv_0 = _Conv(block.conv_0)
        self.spade_1 = _Spade(block.spade_1, block.norm_1)
        self.conv_1 = _Conv(block.conv_1)
        self.spade_s: _Spade | None = None
        if block.spade_s is not None and block.conv_s is not None:
            self.spade_s = _Spade(block.spade_s, block.norm_0)
            self.conv_s = _Conv(block.conv_s)

    def forward(self, features: Tensor, cond: Tensor) -> Tensor:
        shortcut = features
        if self.spade_s is not None:
            shortcut = self.conv_s(self.spade_s(features, cond))
        hidden = self.conv_0(F.leaky_relu(self.spade_0(features, cond), _SLOPE))
        return shortcut + self.conv_1(F.leaky_relu(self.spade_1(hidden, cond), _SLOPE))
