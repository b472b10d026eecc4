"""The pixel-wise focal loss of a discriminator that names the class of every pixel."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Float, Integer
from torch import Tensor

from dpsims._checks import check_bool, check_choice, check_int, check_tensor
from dpsims.errors import InputError
from dpsims.losses._focal_gradient import pixel_focal, pixel_focal_reference
from dpsims.losses._focal_inputs import (
    check_class_weights,
    check_focal_options,
    check_labels,
    class_targets,
    loss_dtype,
    one_target,
    reduce_pixels,
)
from dpsims.losses.class_weights import class_balance_weights

Reduction = Literal["mean", "valid_mean", "sum", "none"]


def pixel_focal_loss(
    logits: Float[Tensor, "B C H W"],
    labels: Integer[Tensor, "B H W"],
    *,
    gamma: float = 2.0,
    class_weights: Float[Tensor, " C"] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    impl: Literal["auto", "reference"] = "auto",
) -> Tensor:
    r"""Cross-entropy of every pixel, turned down where the right class is already likely.

    A pixel with class probabilities :math:`p` costs
    :math:`-w \sum_c t_c (1 - p_c)^\gamma \log p_c`, where :math:`t` is its (smoothed) target and
    :math:`w` the weight of its labelled class.

    Args:
        logits: One channel per class, the fake class last.
        labels: Class ids in ``[0, C)``; use ``C - 1`` everywhere to ask for the fake class.
        gamma: Focusing exponent, at least 0. 0 is the cross-entropy.
        class_weights: One weight per channel, finite and not negative. ``None`` means 1. The
            logits of a pixel of weight 0 count no more than those of an ignored one.
        label_smoothing: Share of the target, in ``[0, 1)``, that is spread evenly over all ``C``
            channels. The pixel keeps the weight of its labelled class.
        ignore_index: Id of pixels that cost nothing, whatever their logits (NaN included); it may
            be a class. ``None`` means that every pixel has a label.
        reduction: ``"mean"`` divides by ``B * H * W``, ignored pixels included, and so does not
            depend on how a batch is split; ``"valid_mean"`` divides by the number of pixels that
            are not ignored; ``"sum"``; ``"none"`` returns the loss of every pixel.
        impl: ``"auto"`` has its gradient in closed form. ``"reference"`` is the equation in plain
            torch: slower, and its gradient is NaN where ``p`` rounds to 1 and ``0 < gamma < 1``.
    Shape:
        - logits ``(B, C, H, W)``; labels ``(B, H, W)``, uint8, int16, int32 or int64
        - output a scalar, or ``(B, H, W)`` with ``reduction="none"``; float64 for float64 logits,
          else float32
    Raises:
        InputError: Shapes or devices differ; an option is out of range; ``class_weights`` has the
            wrong length or a negative or infinite entry; (eagerly on CPU) an id is out of range.
        DTypeError: ``labels`` is not an integer map; ``class_weights`` requires a gradient.

    Note:
        Units: nats. An id out of range makes its pixel NaN on other devices than the CPU. All
        pixels ignored, or an empty batch: exactly 0, with zero gradient. Finite logits of any size
        give finite gradients. Cost: ``O(B C H W)``; in plain eager mode the gradient is the one
        map of the logits' size that is held. Gradients: any order.
    Source:
        Berrada et al., CVPR 2024, Sec. 3.3, Eqs. (3)-(4), whose sum over pixels is
        ``reduction="sum"`` divided by ``B``. The paper gives no value for its smoothing.
        Theirs -> ours: alpha -> class_weights, 1 - epsilon -> 1 - label_smoothing, C + 1 -> C.

    Example:
        >>> import torch
        >>> logits, labels = torch.randn(2, 4, 8, 8), torch.randint(0, 4, (2, 8, 8))
        >>> loss = pixel_focal_loss(logits, labels, gamma=0.0)
        >>> torch.allclose(loss, torch.nn.functional.cross_entropy(logits, labels))
        True
    """
    owner = "pixel_focal_loss"
    check_focal_options(owner, gamma, label_smoothing, ignore_index)
    check_choice(owner, "reduction", reduction, ("mean", "valid_mean", "sum", "none"))
    check_choice(owner, "impl", impl, ("auto", "reference"))
    check_tensor(owner, "logits", logits, "B C H W")
    num_classes = logits.shape[1]
    check_labels(owner, labels, logits, num_classes, ignore_index)
    if class_weights is not None:
        check_class_weights(owner, class_weights, logits)
    targets = class_targets(labels, num_classes, class_weights, ignore_index, logits.dtype)
    form = pixel_focal_reference if impl == "reference" else pixel_focal
    loss = form(logits, targets.ids, targets.weights, gamma, label_smoothing)
    return reduce_pixels(loss, targets.valid, reduction)


class PixelFocalTerms(NamedTuple):
    """The two terms of the discriminator's loss; it minimises their sum.

    Attributes:
        real: Cost of the real images: name each pixel's class.
        fake: Cost of the fake images: call each pixel fake.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.3, Eq. (3).
    """

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]


class PixelFocalLoss:
    """The pixel-wise GAN loss: both players' objective over ``K`` classes and one fake class.

    Args:
        num_classes: Number ``K`` of semantic classes. Logits have ``K + 1`` channels, fake last.
        gamma: Focusing exponent (paper: 2).
        balanced: Weigh classes by :func:`class_balance_weights` of the labels at hand, except for
            the discriminator's fake term. ``False`` means weight 1.
        label_smoothing: Smoothing of the discriminator's real term only.
        ignore_index: Id of pixels without a label. Their real term and their part in the
            generator's loss are 0. It may be a class; ``None`` means that every pixel has a label.
        mask_fake: Leave unlabelled pixels out of the fake term as well. By default they count: a
            fake pixel is fake whatever the map says.
        reduction: ``"mean"``, ``"valid_mean"`` or ``"sum"``, as in :func:`pixel_focal_loss`.
        sync: Count classes over all processes, as in :func:`class_balance_weights`.
    Shape:
        - logits ``(B, K + 1, H, W)``; labels ``(B, H, W)``, integer ids in ``[0, K)``
        - output a scalar
    Raises:
        InputError: An option is out of range; logits have another number of channels than
            ``K + 1``; otherwise as :func:`pixel_focal_loss`.
        DTypeError: An option or input has the wrong type.

    Note:
        Units: nats. Cost, gradients and extreme values: as :func:`pixel_focal_loss`. With
        ``"mean"`` and ``sync=True`` the average over equal shards is the loss of the whole batch.
    Source:
        Berrada et al., CVPR 2024, Sec. 3.3, Eqs. (3)-(4). The paper gives no value for its
        smoothing, and OASIS, whose weights it keeps, takes the mean over pixels.
        Theirs -> ours: C -> K, alpha -> class weights, x -> real, g -> fake.

    Example:
        >>> import torch
        >>> loss = PixelFocalLoss(num_classes=3)
        >>> labels = torch.randint(0, 3, (2, 8, 8))
        >>> real_logits, fake_logits = torch.randn(2, 2, 4, 8, 8)
        >>> bool(loss.discriminator(real_logits, fake_logits, labels) > 0)
        True
        >>> bool(loss.generator(fake_logits, labels) > 0)
        True
    """

    def __init__(
        self,
        num_classes: int,
        *,
        gamma: float = 2.0,
        balanced: bool = True,
        label_smoothing: float = 0.0,
        ignore_index: int | None = 255,
        mask_fake: bool = False,
        reduction: Literal["mean", "valid_mean", "sum"] = "mean",
        sync: bool = False,
    ) -> None:
        owner = "PixelFocalLoss"
        check_int(owner, "num_classes", num_classes)
        check_focal_options(owner, gamma, label_smoothing, ignore_index)
        check_choice(owner, "reduction", reduction, ("mean", "valid_mean", "sum"))
        for name, flag in (("balanced", balanced), ("mask_fake", mask_fake), ("sync", sync)):
            check_bool(owner, name, flag)
        self.num_classes = num_classes
        self.gamma = gamma
        self.balanced = balanced
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.mask_fake = mask_fake
        self.reduction: Reduction = reduction
        self.sync = sync

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"PixelFocalLoss({options})"

    def discriminator(
        self,
        real_logits: Float[Tensor, "B K_plus_1 H W"],
        fake_logits: Float[Tensor, "B K_plus_1 H W"],
        labels: Integer[Tensor, "B H W"],
    ) -> Float[Tensor, ""]:
        """What the discriminator minimises: the sum of :meth:`discriminator_terms`."""
        terms = self.discriminator_terms(real_logits, fake_logits, labels)
        return terms.real + terms.fake

    def discriminator_terms(
        self,
        real_logits: Float[Tensor, "B K_plus_1 H W"],
        fake_logits: Float[Tensor, "B K_plus_1 H W"],
        labels: Integer[Tensor, "B H W"],
        *,
        class_weights: Float[Tensor, " K"] | None = None,
    ) -> PixelFocalTerms:
        """The loss as its real and fake term; ``class_weights`` replace those of ``labels``."""
        owner = "PixelFocalLoss.discriminator"
        self._check(owner, "real_logits", real_logits, labels)
        self._check(owner, "fake_logits", fake_logits, labels)
        real = self._name_classes(real_logits, labels, self.label_smoothing, class_weights)
        ignored = self.ignore_index if self.mask_fake else None
        targets = one_target(labels, self.num_classes, ignored, fake_logits.dtype)
        loss = pixel_focal(fake_logits, targets.ids, targets.weights, self.gamma, 0.0)
        return PixelFocalTerms(real, reduce_pixels(loss, targets.valid, self.reduction))

    def generator(
        self,
        fake_logits: Float[Tensor, "B K_plus_1 H W"],
        labels: Integer[Tensor, "B H W"],
        *,
        class_weights: Float[Tensor, " K"] | None = None,
    ) -> Float[Tensor, ""]:
        """What the generator minimises: that pixels are named by their label's class."""
        self._check("PixelFocalLoss.generator", "fake_logits", fake_logits, labels)
        return self._name_classes(fake_logits, labels, 0.0, class_weights)

    def _name_classes(
        self, logits: Tensor, labels: Tensor, smoothing: float, class_weights: Tensor | None
    ) -> Tensor:
        ignored, dtype = self.ignore_index, loss_dtype(logits.dtype)
        if class_weights is not None:
            check_tensor("PixelFocalLoss", "class_weights", class_weights, "K", K=self.num_classes)
        elif self.balanced:
            class_weights = class_balance_weights(
                labels, self.num_classes, ignore_index=ignored, sync=self.sync, dtype=dtype
            )
        targets = class_targets(labels, self.num_classes, class_weights, ignored, logits.dtype)
        loss = pixel_focal(logits, targets.ids, targets.weights, self.gamma, smoothing)
        return reduce_pixels(loss, targets.valid, self.reduction)

    def _check(self, owner: str, name: str, logits: object, labels: object) -> None:
        check_tensor(owner, name, logits, "B C H W")
        assert isinstance(logits, Tensor)
        channels = self.num_classes + 1
        if logits.shape[1] != channels:
            msg = f"{owner}: {name} must have num_classes + 1 = {channels} channels, the fake "
            msg += f"class last; got {logits.shape[1]}"
            raise InputError(msg)
        check_labels(owner, labels, logits, self.num_classes, self.ignore_index)
