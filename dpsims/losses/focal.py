"""The pixel-wise focal loss of a discriminator that names the class of every pixel."""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Integer
from torch import Tensor

from dpsims._checks import check_bool, check_choice, check_int, check_tensor
from dpsims.losses._focal_inputs import (
    check_class_weights,
    check_focal_options,
    check_gan_logits,
    check_labels,
)
from dpsims.losses._focal_terms import PixelFocalTerms as PixelFocalTerms
from dpsims.losses.class_weights import class_balance_weights
from dpsims.ops.focal._targets import FocalSpec, Reduction, loss_dtype
from dpsims.ops.focal.api import FOCAL_IMPLS, FocalImpl, focal_loss, resolve_focal_impl


def pixel_focal_loss(
    logits: Float[Tensor, "B C H W"],
    labels: Integer[Tensor, "B H W"],
    *,
    gamma: float = 2.0,
    class_weights: Float[Tensor, " C"] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int | None = 255,
    reduction: Reduction = "mean",
    impl: FocalImpl = "auto",
    inplace: bool = False,
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
        impl: ``"fused"`` takes one pass for the loss and its gradient; ``"closed_form"`` is that
            gradient in plain torch; ``"reference"`` is the equation alone, whose gradient is NaN
            where ``p`` rounds to 1 and ``0 < gamma < 1``. ``"auto"``:
            :func:`~dpsims.ops.focal.resolve_focal_impl`.
        inplace: Let the fused loss write its gradient over ``logits``, to hold no map of its own.
            They are garbage then to whoever else reads them, and there is one backward pass, of
            first order. Without a gradient, and under ``torch.compile``, they are left alone.
    Shape:
        - logits ``(B, C, H, W)``; labels ``(B, H, W)``, uint8, int16, int32 or int64
        - output a scalar, or ``(B, H, W)`` with ``reduction="none"``; float64 for float64 logits,
          else float32
    Raises:
        InputError: Shapes or devices differ; an option is out of range; ``class_weights`` has the
            wrong length or a negative or infinite entry; (eagerly on CPU) an id is out of range;
            ``impl`` or ``inplace`` cannot be had.
        DTypeError: ``labels`` is not an integer map; ``class_weights`` requires a gradient.

    Note:
        Units: nats. An id out of range makes its pixel NaN on other devices than the CPU. All
        pixels ignored, or an empty batch: exactly 0, with zero gradient. Finite logits of any size
        give finite gradients. Cost: ``O(B C H W)``. Fused, the logits are read and their gradient,
        the one map that is held, written once; twice where the loss is multiplied by a number
        other than 1. For float16, ``reduction="none"`` and under ``torch.compile`` the backward
        pass reads the logits again. Nothing waits for the device. Gradients: any order.
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
    check_bool(owner, "inplace", inplace)
    resolve_focal_impl(impl)
    check_tensor(owner, "logits", logits, "B C H W")
    num_classes = logits.shape[1]
    check_labels(owner, labels, logits, num_classes, ignore_index)
    if class_weights is not None:
        check_class_weights(owner, class_weights, logits)
    spec = FocalSpec(gamma, label_smoothing, ignore_index, num_classes, None, reduction)
    return focal_loss(logits, labels, class_weights, spec, impl=impl, inplace=inplace)


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
        impl: As in :func:`pixel_focal_loss`.
        inplace: As in :func:`pixel_focal_loss`.
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
        impl: FocalImpl = "auto",
        inplace: bool = False,
    ) -> None:
        owner = "PixelFocalLoss"
        check_int(owner, "num_classes", num_classes)
        check_focal_options(owner, gamma, label_smoothing, ignore_index)
        check_choice(owner, "reduction", reduction, ("mean", "valid_mean", "sum"))
        flags = {"balanced": balanced, "mask_fake": mask_fake, "sync": sync, "inplace": inplace}
        for name, flag in flags.items():
            check_bool(owner, name, flag)
        check_choice(owner, "impl", impl, FOCAL_IMPLS)
        self.num_classes = num_classes
        self.gamma = gamma
        self.balanced = balanced
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.mask_fake = mask_fake
        self.reduction: Reduction = reduction
        self.sync = sync
        self.impl: FocalImpl = impl
        self.inplace = inplace

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
        fake = self._loss(fake_logits, labels, None, 0.0, ignored, self.num_classes)
        return PixelFocalTerms(real, fake)

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
        return self._loss(logits, labels, class_weights, smoothing, ignored)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        class_weights: Tensor | None,
        smoothing: float,
        ignored: int | None,
        target: int | None = None,
    ) -> Tensor:
        spec = FocalSpec(self.gamma, smoothing, ignored, self.num_classes, target, self.reduction)
        return focal_loss(
            logits, labels, class_weights, spec, impl=self.impl, inplace=self.inplace
        )

    def _check(self, owner: str, name: str, logits: object, labels: object) -> None:
        check_gan_logits(owner, name, logits, labels, self.num_classes, self.ignore_index)
