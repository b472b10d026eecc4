"""The phases of a training step on fake tensors, each measured by itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dpsims_reference.config import Config
from dpsims_reference.networks import GeneratorOutput, ImageGenerator, PixelDiscriminator
from dpsims_reference.objective import NoisePair, Objective
from dpsims_reference.planning.live import Meter


class Phase(NamedTuple):
    """One part of a training step.

    Attributes:
        name: What is done.
        half: Whose update needs it, ``"D"`` or ``"G"``.
        frozen: Whether only frozen networks run.
        flops: Floating-point operations of convolutions and matrix products, 2 per multiply-add.
        saved_bytes: What is kept for the backward pass, without weights.
    """

    name: str
    half: str
    frozen: bool
    flops: int
    saved_bytes: int


class _Encoded(NamedTuple):
    """Images as a leaf, and the features that were made from it."""

    images: Tensor
    features: list[Tensor]


class MeasuredStep:
    """What :class:`dpsims_reference.steps.TrainingStep` does, cut into phases.

    Args:
        config: The run.
        generator: G.
        discriminator: D.
        objective: The losses.
        lasting: Tensors that live longer than a step: weights and buffers.

    Attributes:
        phases: What was measured.
        meter: Operations and bytes of everything that a step makes.
        trained: Trained parameters by network.
    """

    def __init__(
        self,
        config: Config,
        generator: ImageGenerator,
        discriminator: PixelDiscriminator,
        objective: Objective,
        lasting: list[Tensor],
    ) -> None:
        self.config = config
        self.generator, self.discriminator = generator, discriminator
        self.objective = objective
        self.phases: list[Phase] = []
        self.meter = Meter()
        self.trained = {
            "generator": _trained(generator),
            "decoder": _trained(discriminator),
            "projector": _trained(objective),
        }
        self._lasting = {tensor.untyped_storage()._cdata for tensor in lasting}

    def run(self, batch: int) -> None:
        """Measure one step with ``batch`` images."""
        with self.meter:
            images, labels, extra = self._batch(batch)
            with self._phase("real images, frozen networks", "D", frozen=True), torch.no_grad():
                real = self.discriminator.encode(images)
                real_maps = self.objective.contrastive_maps(images, real)
            pair, encoded = self._fakes(labels, extra, "D", grad=self.config.optim.reuse_fake)
            self._discriminator_half(images, real, labels, encoded)
            del real
            if not self.config.optim.reuse_fake:
                # the second pair must not be alive beside the first
                del pair, encoded
                pair, encoded = self._fakes(labels, extra, "G", grad=True)
            self._generator_half(pair, encoded, labels, real_maps)

    def _discriminator_half(
        self, images: Tensor, real: list[Tensor], labels: Tensor, encoded: _Encoded
    ) -> None:
        fake_features = [level.detach() for level in encoded.features]
        with self._phase("decoder and loss, forward", "D"):
            real_logits = self.discriminator.decode(images, real)
            fake_logits = self.discriminator.decode(encoded.images.detach(), fake_features)
            loss = self.objective.discriminator_loss(real_logits, fake_logits, labels).total
        with self._phase("decoder and loss, backward", "D", autocast=False):
            loss.backward(inputs=self.trained["decoder"])

    def _generator_half(
        self, pair: NoisePair, encoded: _Encoded, labels: Tensor, real_maps: list[Tensor]
    ) -> None:
        """The graph is cut at the features and at the images, to measure each piece."""
        with self._phase("perceptual network, forward", "G", frozen=True):
            maps = self.objective.contrastive_maps(encoded.images, encoded.features)
        # without a perceptual network the maps are the discriminator's own features
        own = self.objective.perceptual is None
        deep = [*encoded.features, *([] if own else maps)]
        deep_cuts = [_cut(level) for level in deep]
        count = len(encoded.features)
        map_cuts = deep_cuts[: len(maps)] if own else deep_cuts[count:]
        outputs = [*pair.first, *([] if pair.second is pair.first else pair.second)]
        output_cuts = [_cut(output) for output in outputs]
        with self._phase("decoder and losses, forward", "G"):
            loss = self.objective.generator_loss(
                self.discriminator.decode(output_cuts[0], deep_cuts[:count]),
                labels,
                map_cuts,
                real_maps,
                self._cut_pair(pair, output_cuts),
                generator=torch.Generator(),
            ).total
        inputs = [*deep_cuts, *output_cuts, *self.trained["projector"]]
        with self._phase("decoder and losses, backward", "G", autocast=False):
            loss.backward(inputs=inputs)
        del loss
        with self._phase("frozen networks, backward", "G", frozen=True, autocast=False):
            _backward(deep, deep_cuts, [encoded.images])
        output_cuts[0].grad = _sum(output_cuts[0].grad, encoded.images.grad)
        with self._phase("generator, backward", "G", autocast=False):
            _backward(outputs, output_cuts, self.trained["generator"])

    def _cut_pair(self, pair: NoisePair, cuts: list[Tensor]) -> NoisePair:
        first = GeneratorOutput(cuts[0], cuts[1])
        second = first if len(cuts) == 2 else GeneratorOutput(cuts[2], cuts[3])
        if self.config.optim.pairs == "split_batch":
            half = len(cuts[0]) // 2
            second = GeneratorOutput(first.images[half:], first.features[half:])
            first = GeneratorOutput(first.images[:half], first.features[:half])
        return NoisePair(first, second, pair.first_latents, pair.second_latents)

    def _batch(self, batch: int) -> tuple[Tensor, Tensor, Tensor | None]:
        height, width = self.config.data.image_size
        images = torch.zeros(batch, 3, height, width)
        labels = torch.zeros(batch, height, width, dtype=torch.uint8)
        extra = torch.zeros(batch, 2, height, width) if self.config.data.instances else None
        return images, labels, extra

    def _fakes(
        self, labels: Tensor, extra: Tensor | None, half: str, *, grad: bool
    ) -> tuple[NoisePair, _Encoded]:
        with self._phase("fakes", half), torch.set_grad_enabled(grad):
            pair = self._pair(labels, extra, second=grad)
        leaf = pair.first.images.detach().requires_grad_(grad)
        with (
            self._phase("fakes, frozen backbone", half, frozen=True),
            torch.set_grad_enabled(grad),
        ):
            return pair, _Encoded(leaf, self.discriminator.encode(leaf))

    def _pair(self, labels: Tensor, extra: Tensor | None, *, second: bool) -> NoisePair:
        part, batch = self.config.generator, len(labels)
        size = (batch, part.spatial_noise, *labels.shape[-2:])
        noise = torch.zeros(size) if part.spatial_noise else None
        latents = torch.zeros(batch, part.latent_dim)
        output = self.generator(labels, latents, extra, noise)
        if self.config.optim.pairs == "split_batch":
            return NoisePair(output, output, *latents.chunk(2))
        wanted = second and self.config.objective.diversity_weight > 0
        other = self.generator(labels, latents, extra, noise) if wanted else output
        return NoisePair(output, other, latents, latents)

    @contextmanager
    def _phase(
        self, name: str, half: str, *, frozen: bool = False, autocast: bool = True
    ) -> Iterator[None]:
        saved: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._lasting:
                saved[storage._cdata] = storage.nbytes()
            return tensor

        mixed = autocast and self.config.optim.precision == "bf16"
        before = self.meter.flops
        with (
            torch.autograd.graph.saved_tensors_hooks(keep, _same),
            torch.autocast("cpu", torch.bfloat16, enabled=mixed),
        ):
            yield
        flops = self.meter.flops - before
        self.phases.append(Phase(name, half, frozen, flops, sum(saved.values())))


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _cut(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _sum(first: Tensor | None, second: Tensor | None) -> Tensor | None:
    return first if second is None else second if first is None else first + second


def _backward(ends: list[Tensor], cuts: list[Tensor], inputs: list[Tensor]) -> None:
    """Go on from the gradients of ``cuts``, which are detached twins of ``ends``."""
    pairs = [(e, c.grad) for e, c in zip(ends, cuts, strict=True) if c.grad is not None]
    tensors, gradients = zip(*pairs, strict=True)
    torch.autograd.backward(tensors, gradients, inputs=inputs)


def _trained(module: nn.Module) -> list[Tensor]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]
