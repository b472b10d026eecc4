"""Differentiable augmentation of images and their label maps, for training a discriminator."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Integer
from torch import Tensor

from dpsims._checks import check_bool, check_generator, check_int, check_number, check_tensor
from dpsims.data._shifts import hole, pick, sources, steps
from dpsims.errors import DTypeError, InputError


class AugmentParams(NamedTuple):
    """What happens to every image of a batch, at any size.

    Attributes:
        flip: ``(B,)``, whether the image is mirrored.
        color: ``(3, B)``, brightness, saturation and contrast, each a uniform draw in [0, 1).
        shift: ``(2, B)``, the same for the vertical and horizontal shift.
        hole: ``(2, B)``, the same for the vertical and horizontal centre of the cutout.

    Source:
        Zhao et al., NeurIPS 2020 (DiffAugment), Sec. 3.

    Example:
        >>> DiffAugment(flip=True).sample(2).color.shape
        torch.Size([3, 2])
    """

    flip: Bool[Tensor, " B"]
    color: Float[Tensor, "3 B"]
    shift: Float[Tensor, "2 B"]
    hole: Float[Tensor, "2 B"]


class AugmentedBatch(NamedTuple):
    """Augmented images and, where given, their label maps.

    Attributes:
        images: ``(B, C, H, W)``.
        labels: ``(B, H, W)``, or ``None``.

    Source:
        Zhao et al., NeurIPS 2020 (DiffAugment), Sec. 3.

    Example:
        >>> out = DiffAugment()(torch.rand(2, 3, 16, 16))
        >>> out.images.shape, out.labels
        (torch.Size([2, 3, 16, 16]), None)
    """

    images: Float[Tensor, "B C H W"]
    labels: Integer[Tensor, "B H W"] | None


class DiffAugment:
    r"""Change images at random, the same way for real, fake and label maps, differentiably.

    Real and fake images are both augmented before the discriminator sees them, in its step and in
    the generator's, so that few training images last longer and the generator still learns the
    plain images. Every image of the batch draws its own change:

    - flip: mirror left and right, with probability 1/2;
    - brightness: :math:`x + b`, :math:`b \in [-0.5, 0.5]`;
    - saturation: :math:`m + s (x - m)` with the pixel's mean over channels,
      :math:`s \in [0, 2]`;
    - contrast: :math:`m + c (x - m)` with the image's mean, :math:`c \in [0.5, 1.5]`;
    - translation by whole pixels, filled with 0;
    - cutout: a square around a random pixel becomes 0, cropped at the border.

    Label maps are flipped, moved and cut as the images are; what has no image any more becomes
    ``ignore_index``.

    Args:
        color: Whether to change brightness, saturation and contrast.
        translation: Largest shift, as a share of the height and of the width; 0 turns it off.
        cutout: Side of the square, as a share of the height and of the width; 0 turns it off.
        flip: Whether to mirror.
        ignore_index: Id of label pixels without an image; ``None`` if there are none.
    Shape:
        - images ``(B, C, H, W)``; labels ``(B, H, W)``, uint8, int16, int32 or int64; output the
          same shapes and dtypes
    Raises:
        InputError: An option is out of range; shapes or devices differ; labels are to be moved or
            cut and ``ignore_index`` is ``None`` or does not fit their dtype.
        DTypeError: An option or input has the wrong type.

    Note:
        Units: image values, meant for [-1, 1]; nothing is clipped. The colour is computed in
        float32 or better. Calling it draws new parameters; to change several batches alike (a real
        and a fake one, images at two resolutions), draw them once with :meth:`sample` and use
        :meth:`apply`. Recompute instance offsets after it, do not augment them.
        Cost: a few passes over the images. Gradients: any order, exact, 0 where cut away.
    Source:
        Zhao et al., "Differentiable Augmentation for Data-Efficient GAN Training", NeurIPS 2020,
        Sec. 3, whose policy "color, translation, cutout" is the default. Not used by DP-SIMS. Not
        in the paper: label maps and the flip.

    Example:
        >>> augment = DiffAugment(color=False, flip=True)
        >>> labels = torch.randint(0, 3, (2, 16, 16))
        >>> images = labels[:, None].float() + 1  # never 0
        >>> out = augment(images, labels, generator=torch.Generator().manual_seed(0))
        >>> torch.equal(out.labels == 255, out.images[:, 0] == 0)
        True
        >>> params = augment.sample(2)
        >>> real, fake = augment.apply(params, images), augment.apply(params, -images)
        >>> torch.equal(real, -fake)
        True
    """

    def __init__(
        self,
        *,
        color: bool = True,
        translation: float = 0.125,
        cutout: float = 0.5,
        flip: bool = False,
        ignore_index: int | None = 255,
    ) -> None:
        check_bool("DiffAugment", "color", color)
        check_number("DiffAugment", "translation", translation, minimum=0, maximum=1)
        check_number("DiffAugment", "cutout", cutout, minimum=0, maximum=1)
        check_bool("DiffAugment", "flip", flip)
        if ignore_index is not None:
            check_int("DiffAugment", "ignore_index", ignore_index, minimum=None)
        self.color = color
        self.translation = translation
        self.cutout = cutout
        self.flip = flip
        self.ignore_index = ignore_index

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"DiffAugment({options})"

    def __call__(
        self,
        images: Float[Tensor, "B C H W"],
        labels: Integer[Tensor, "B H W"] | None = None,
        *,
        generator: torch.Generator | None = None,
    ) -> AugmentedBatch:
        """Draw parameters and change one batch."""
        check_tensor("DiffAugment", "images", images, "B C H W")
        if labels is not None:
            batch, _, height, width = images.shape
            self._check_labels("DiffAugment", labels, images, B=batch, H=height, W=width)
        check_generator("DiffAugment", "generator", generator)
        params = self.sample(len(images), device=images.device, generator=generator)
        moved = None if labels is None else self._move(params, labels[:, None], self.ignore_index)
        changed = self._move(params, self._recolor(params, images), 0)
        return AugmentedBatch(changed, None if moved is None else moved[:, 0])

    def sample(
        self,
        batch_size: int,
        *,
        device: torch.device | str | None = None,
        generator: torch.Generator | None = None,
    ) -> AugmentParams:
        """Draw what happens to every image of a batch; options that are off draw too.

        Args:
            batch_size: Number ``B`` of images.
            device: Where the parameters go. ``None`` means the generator's device, or the CPU.
            generator: Source of the draws, on any device. ``None`` means torch's default one.
        """
        owner = "DiffAugment.sample"
        check_int(owner, "batch_size", batch_size, minimum=0)
        check_generator(owner, "generator", generator)
        source = device if generator is None else generator.device
        draws = torch.rand(8, batch_size, generator=generator, device=source)
        draws = draws if device is None else draws.to(device)
        return AugmentParams(draws[0] < 0.5, draws[1:4], draws[4:6], draws[6:8])

    def apply(
        self, params: AugmentParams, images: Float[Tensor, "B C H W"]
    ) -> Float[Tensor, "B C H W"]:
        """Change images as ``params`` say."""
        owner = "DiffAugment.apply"
        _check_params(owner, params)
        check_tensor(owner, "images", images, "B C H W", like=params.flip, B=len(params.flip))
        return self._move(params, self._recolor(params, images), 0)

    def apply_labels(
        self, params: AugmentParams, labels: Integer[Tensor, "B H W"]
    ) -> Integer[Tensor, "B H W"]:
        """Change label maps as ``params`` say; of images at another resolution, in proportion."""
        owner = "DiffAugment.apply_labels"
        _check_params(owner, params)
        self._check_labels(owner, labels, params.flip, B=len(params.flip))
        return self._move(params, labels[:, None], self.ignore_index)[:, 0]

    def _recolor(self, params: AugmentParams, images: Tensor) -> Tensor:
        if not self.color:
            return images
        dtype = torch.promote_types(images.dtype, torch.float32)
        brightness, saturation, contrast = params.color.to(dtype)[..., None, None, None]
        wide = images.to(dtype) + (brightness - 0.5)
        mean = wide.mean(dim=1, keepdim=True)
        wide = mean + 2 * saturation * (wide - mean)
        mean = wide.mean(dim=(1, 2, 3), keepdim=True)
        return (mean + (0.5 + contrast) * (wide - mean)).to(images.dtype)

    def _move(self, params: AugmentParams, maps: Tensor, fill: int | None) -> Tensor:
        """Flip, shift and cut ``(B, C, H, W)``."""
        height, width = maps.shape[2:]
        down, right = (
            steps(draws, int(size * self.translation + 0.5))
            for draws, size in zip(params.shift, (height, width), strict=True)
        )
        rows, inside_rows = sources(height, down)
        columns, inside_columns = sources(width, right)
        if self.flip:
            columns = torch.where(params.flip[:, None], width - 1 - columns, columns)
        if self.flip or self.translation:
            maps = pick(maps, rows, columns)
        keep = inside_rows[:, :, None] & inside_columns[:, None, :]
        if self.cutout:
            cut_rows, cut_columns = (
                hole(size, self.cutout, draws)
                for draws, size in zip(params.hole, (height, width), strict=True)
            )
            keep = keep & ~(cut_rows[:, :, None] & cut_columns[:, None, :])
        # where, not a product: what is cut away may be infinite
        return maps if fill is None else torch.where(keep[:, None], maps, fill)

    def _check_labels(self, owner: str, labels: object, like: Tensor, **sizes: int) -> None:
        check_tensor(owner, "labels", labels, "B H W", kind="integer", like=like, **sizes)
        assert isinstance(labels, Tensor)
        moves = self.translation > 0 or self.cutout > 0
        if moves and self.ignore_index is None:
            msg = f"{owner}: ignore_index must be an id where labels are moved or cut; got None"
            raise InputError(msg)
        limits = torch.iinfo(labels.dtype)
        if moves and not limits.min <= (self.ignore_index or 0) <= limits.max:
            msg = f"{owner}: ignore_index must fit labels of dtype {labels.dtype}; "
            raise InputError(msg + f"got {self.ignore_index}")


def _check_params(owner: str, params: object) -> None:
    if not isinstance(params, AugmentParams):
        msg = f"{owner}: params must be AugmentParams, from sample(); got {type(params).__name__}"
        raise DTypeError(msg)
