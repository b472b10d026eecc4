"""The networks that the benchmarks run: paper sizes, tiny ones, with awake statistics."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import nn

from benchmarks.cases import random_generator
from dpsims.nn.norm import BatchNorm2d
from dpsims_reference.generator import Generator
from dpsims_reference.networks import ImageGenerator
from dpsims_reference.oasis import OasisGenerator

_PAPER_CHANNELS = (1024, 1024, 1024, 512, 256, 128, 64)


@dataclass(frozen=True)
class Model:
    """A generator by its sizes.

    Attributes:
        name: As tables show it.
        architecture: ``"dp_sims"`` or ``"oasis"``.
        num_classes: Classes.
        height: Of the images.
        width: Of the images.
        channels: Widths of the image branch.
        hidden: Width inside SPADE.
        latent_dim: Width of a latent.
    """

    name: str
    architecture: Literal["dp_sims", "oasis"]
    num_classes: int = 151
    height: int = 256
    width: int = 256
    channels: tuple[int, ...] = _PAPER_CHANNELS
    hidden: int = 128
    latent_dim: int = 64

    def build(self) -> ImageGenerator:
        """The float32 generator on the CPU, in evaluation; the same weights every time."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            generator = self._new()
        awaken(generator)
        return generator.eval()

    def _new(self, *, spectral_norm: bool = True) -> ImageGenerator:
        if self.architecture == "oasis":
            return OasisGenerator(
                self.num_classes,
                channels=self.channels,
                latent_dim=self.latent_dim,
                spade_hidden=self.hidden,
                spectral_norm=spectral_norm,
            )
        # tiny ones get a narrower pyramid and tokens too
        narrow = self.height < 128
        return Generator(
            self.num_classes,
            image_size=(self.height, self.width),
            channels=self.channels,
            pyramid_channels=min(64, 2 * self.channels[-1]),
            attention_size=16 if narrow else 64,
            latent_dim=self.latent_dim,
            token_dim=64 if narrow else 256,
            spade_hidden=self.hidden,
            spectral_norm=spectral_norm,
        )


OASIS = Model("OASIS 256x256", "oasis")
DP_SIMS = Model("DP-SIMS 256x256", "dp_sims")
DP_SIMS_CITYSCAPES = Model("DP-SIMS 256x512", "dp_sims", num_classes=35, width=512)
OASIS_TINY = Model(
    "OASIS 64x64 tiny",
    "oasis",
    height=64,
    width=64,
    channels=tuple(width // 4 for width in _PAPER_CHANNELS),
)
DP_SIMS_TINY = Model(
    "DP-SIMS 64x64 tiny",
    "dp_sims",
    height=64,
    width=64,
    channels=tuple(width // 4 for width in _PAPER_CHANNELS),
)
_SMOKE = Model("OASIS smoke", "oasis", 5, 16, 16, (12, 8, 6, 4), hidden=4, latent_dim=3)
SMOKE = (_SMOKE, replace(_SMOKE, name="DP-SIMS smoke", architecture="dp_sims"))


@torch.no_grad()
def awaken(module: nn.Module) -> None:
    """Draw running statistics and open gates: fresh ones hide what folding gets wrong."""
    rng = random_generator(torch.device("cpu"), 11)
    for part in module.modules():
        if isinstance(part, BatchNorm2d):
            part.running_mean.copy_(0.2 * torch.randn(part.num_features, generator=rng))
            part.running_var.copy_(torch.randn(part.num_features, generator=rng).mul(0.3).exp())
        gate = getattr(part, "gate", None)
        if isinstance(gate, nn.Parameter):
            gate.fill_(0.5)


@functools.cache
def num_weights(model: Model) -> int:
    """Number of parameters, from shapes alone."""
    with torch.device("meta"):
        network = model._new(spectral_norm=False)
    return sum(parameter.numel() for parameter in network.parameters())


@functools.lru_cache(maxsize=1)
def _master(model: Model) -> ImageGenerator:
    return model.build()


def built(model: Model) -> ImageGenerator:
    """A copy of the generator, which the caller may change."""
    return copy.deepcopy(_master(model))
