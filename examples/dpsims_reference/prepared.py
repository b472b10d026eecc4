"""The generators for inference, and many noises for one label map."""

from __future__ import annotations

from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor
from torch.nn import functional as F

from dpsims._checks import check_tensor
from dpsims.errors import InputError
from dpsims.nn import LabelMapPyramid, NoiseMapper, prepare_for_inference
from dpsims.nn.labels import resize_labels
from dpsims_reference.generator import LEAKY_SLOPE, Generator
from dpsims_reference.networks import GeneratorOutput, ImageGenerator
from dpsims_reference.oasis import OasisGenerator


class Condition(NamedTuple):
    """What :class:`PreparedGenerator` knows of label maps before it sees a latent."""

    levels: list[Tensor]
    """Levels of the pyramid that no noise reaches, and what the first other one starts from."""
    features: Tensor
    """The image branch's first features."""
    encoded: list[Tensor | None]
    """For every block of the image branch what its level contributes, if no noise reaches it."""


class PreparedGenerator(ImageGenerator):
    """A :class:`Generator` for inference.

    Called like the generator, it gives the generator's images up to rounding, faster. For many
    noises on one map, :meth:`condition` computes once what does not depend on the latents and
    :meth:`sample` the rest.

    Args:
        generator: Is copied (:func:`dpsims.nn.prepare_for_inference`), not changed.

    Note:
        A condition keeps three maps of SPADE's hidden width for every fine level: 100 MB a map at
        256x256 in float32 and the paper's sizes.

    Source:
        Not in the paper.

    Example:
        >>> generator = Generator(5, image_size=(16, 16), channels=(8, 8, 4), pyramid_channels=4,
        ...                       attention_size=8)
        >>> prepared = PreparedGenerator(generator)
        >>> condition = prepared.condition(torch.zeros(1, 16, 16, dtype=torch.uint8))
        >>> prepared.sample(condition, torch.randn(3, 64)).images.shape
        torch.Size([3, 3, 16, 16])
    """

    def __init__(self, generator: Generator) -> None:
        super().__init__()
        self.latent_dim, self.spatial_noise = generator.latent_dim, generator.spatial_noise
        self.model = cast("Generator", prepare_for_inference(generator))
        self.to_rgb = self.model.to_rgb
        height, width = generator.image_size
        sizes = [(height >> level, width >> level) for level in range(len(self.model.blocks))]
        channels = self.model.pyramid.channels
        block: Any
        for block, size in zip(self.model.blocks, reversed(sizes), strict=True):
            # a block of another class stays as it is
            if hasattr(block, "expect"):
                block.expect([(channels, *size), (channels, *sizes[-1])])
        self.eval()

    @property
    def can_condition(self) -> bool:
        """Whether the latent enters by cross-attention, so that :meth:`condition` works."""
        return self.model.mapper is not None

    def forward(
        self,
        labels: Integer[Tensor, "B H W"],
        latents: Float[Tensor, "B Z"],
        extra: Float[Tensor, "B E H W"] | None = None,
        noise: Float[Tensor, "B S H W"] | None = None,
    ) -> GeneratorOutput:
        """As :class:`Generator`."""
        output: GeneratorOutput = self.model(labels, latents, extra, noise)
        return output

    def condition(
        self,
        labels: Integer[Tensor, "B H W"],
        extra: Float[Tensor, "B E H W"] | None = None,
        noise: Float[Tensor, "B S H W"] | None = None,
    ) -> Condition:
        """What the label maps, and maps beside them, decide alone.

        Raises:
            InputError: The latent joins the label map, and so reaches everything.
        """
        self._mapper()
        beside = [maps for maps in (extra, noise) if maps is not None]
        pyramid: LabelMapPyramid = self.model.pyramid
        levels = pyramid.before_noise(labels, torch.cat(beside, 1) if beside else None)
        height, width = (side // pyramid.step for side in labels.shape[1:])
        size = (height, width)
        small = None if extra is None else F.adaptive_avg_pool2d(extra, size)
        features = self.model.stem(resize_labels(labels, size), small)
        # the image branch runs from coarse to fine
        coarse: list[Tensor | None] = [None] * (len(self.model.blocks) - len(levels) + 1)
        fine = reversed(levels[:-1])
        blocks = list(self.model.blocks)[len(coarse) :]
        encoded = [
            cast("Any", block).encode(level) for block, level in zip(blocks, fine, strict=True)
        ]
        return Condition(levels, features, coarse + encoded)

    def sample(self, condition: Condition, latents: Float[Tensor, "N Z"]) -> GeneratorOutput:
        """An image for every latent: of its own map, or all of the condition's only one.

        Raises:
            InputError: Neither one map nor as many as there are latents.
        """
        check_tensor("PreparedGenerator.sample", "latents", latents, "N Z", Z=self.latent_dim)
        count, maps = len(latents), len(condition.features)
        if maps not in (1, count):
            msg = (
                f"PreparedGenerator.sample: latents must be as many as the condition's {maps} "
                f"maps; got {count}"
            )
            raise InputError(msg)
        *fine, start = condition.levels
        start = start.expand(count, -1, -1, -1)
        levels = self.model.pyramid.after_noise([*fine, start], self._mapper()(latents))
        coarsest, features = levels[-1], condition.features.expand(count, -1, -1, -1)
        for block, level, encoded in zip(
            self.model.blocks, reversed(levels), condition.encoded, strict=True
        ):
            times = level.shape[-2] // features.shape[-2]
            if encoded is None:
                features = block(features, (level, coarsest), upsample=times)
            else:
                features = block(features, coarsest, upsample=times, encoded=encoded)
        features = F.leaky_relu(features, LEAKY_SLOPE)
        return GeneratorOutput(self.to_rgb(features), features)

    def _mapper(self) -> NoiseMapper:
        if self.model.mapper is None:
            msg = (
                "PreparedGenerator.condition: generator must inject its noise by cross-attention; "
                "got one whose latent joins the label map"
            )
            raise InputError(msg)
        return self.model.mapper


def prepare_generator(generator: ImageGenerator) -> ImageGenerator:
    """The fastest form of a generator for inference, called in the same way."""
    if isinstance(generator, Generator):
        return PreparedGenerator(generator)
    prepared: Any = prepare_for_inference(generator)
    for block in prepared.blocks if isinstance(generator, OasisGenerator) else ():
        # a block of another class stays as it is
        if hasattr(block, "expect_labels"):
            block.expect_labels()
    return cast("ImageGenerator", prepared)
