"""LabelMix: judge an image mixed from real and fake classes as its two sources were judged."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dpsims._checks import (
    check_generator,
    check_int,
    check_label_values,
    check_tensor,
    invalid_labels,
    values_are_readable,
)
from dpsims.errors import DTypeError, InputError


class LabelMix(NamedTuple):
    """Mixed images and where they are real.

    Attributes:
        images: ``(B, C, H, W)``; every class is wholly real or wholly fake.
        mask: ``(B, 1, H, W)``, 1 where ``images`` is real and 0 where it is fake.

    Source:
        Schönfeld et al., ICLR 2021 (OASIS), Sec. 3.2.

    Example:
        >>> LabelMix(torch.ones(2, 3, 4, 4), torch.ones(2, 1, 4, 4)).mask.shape
        torch.Size([2, 1, 4, 4])
    """

    images: Float[Tensor, "B C H W"]
    mask: Float[Tensor, "B 1 H W"]


def label_mix(
    real: Float[Tensor, "B C H W"],
    fake: Float[Tensor, "B C H W"],
    labels: Integer[Tensor, "B H W"],
    *,
    num_classes: int,
    ignore_index: int | None = 255,
    generator: torch.Generator | None = None,
) -> LabelMix:
    """Mix real and fake images along the borders of their label map.

    One fair coin per class, for the whole batch, decides whether that class is taken from ``real``
    or from ``fake``. The coins are independent; unlabelled pixels have a coin of their own.

    Args:
        real: Real images.
        fake: Images generated for the same label maps. Gradients flow through to both.
        labels: Class ids of both.
        num_classes: Number ``K`` of classes.
        ignore_index: Id of pixels without a label, or ``None``.
        generator: Source of the coins, on any device. ``None`` means torch's default one.
    Shape:
        - real, fake ``(B, C, H, W)``, one dtype; labels ``(B, H, W)``, integer
    Returns:
        The mixed images ``(B, C, H, W)`` and the mask ``(B, 1, H, W)`` in the dtype of ``real``.

    Raises:
        InputError: Shapes or devices differ, or (eagerly on CPU) an id is out of range.
        DTypeError: Images are not floating point or their dtypes differ; ``labels`` is not an
            integer map; ``generator`` is not a generator.

    Note:
        Units: those of the images; the mask is 0 or 1.
        Pixels whose id is out of range turn NaN on other devices than the CPU.
        Cost: ``O(B C H W)``. Gradients: any order.
    Source:
        Schönfeld et al., ICLR 2021 (OASIS), Sec. 3.2. Not used by DP-SIMS itself.
        Theirs -> ours: M -> mask, x -> real, x-hat -> fake.

    Example:
        >>> labels = torch.tensor([[[0, 0, 1, 2]]])
        >>> real, fake = torch.ones(1, 3, 1, 4), torch.zeros(1, 3, 1, 4)
        >>> mixed = label_mix(real, fake, labels, num_classes=3)
        >>> torch.equal(mixed.images, mixed.mask.expand(1, 3, 1, 4))
        True
    """
    _check_mix("label_mix", real, fake, labels, num_classes, ignore_index, generator)
    device = labels.device if generator is None else generator.device
    # one more coin for unlabelled pixels
    coins = torch.randint(2, (num_classes + 1,), generator=generator, device=device)
    ids = labels.long()
    bad = invalid_labels(ids, num_classes, ignore_index)
    if ignore_index is not None:
        ids = torch.where(ids == ignore_index, num_classes, ids)
    mask = coins.to(real)[torch.where(bad, num_classes, ids)]
    mask = torch.where(bad, torch.nan, mask).unsqueeze(1)
    return LabelMix(_select(mask, real, fake), mask)


def _check_mix(
    owner: str,
    real: Tensor,
    fake: Tensor,
    labels: Tensor,
    num_classes: int,
    ignore_index: int | None,
    generator: object,
) -> None:
    check_tensor(owner, "real", real, "B C H W")
    b, c, h, w = real.shape
    check_tensor(owner, "fake", fake, "B C H W", like=real, B=b, C=c, H=h, W=w)
    check_tensor(owner, "labels", labels, "B H W", kind="integer", like=real, B=b, H=h, W=w)
    check_int(owner, "num_classes", num_classes)
    if ignore_index is not None:
        check_int(owner, "ignore_index", ignore_index, minimum=None)
    if fake.dtype != real.dtype:
        msg = f"{owner}: fake must have the dtype of real ({real.dtype}); got {fake.dtype}"
        raise DTypeError(msg)
    check_generator(owner, "generator", generator)
    check_label_values(owner, "labels", labels, num_classes, ignore_index)


def label_mix_loss(
    mixed_logits: Float[Tensor, "B C H W"],
    real_logits: Float[Tensor, "B C H W"],
    fake_logits: Float[Tensor, "B C H W"],
    mask: Float[Tensor, "B 1 H W"],
) -> Float[Tensor, ""]:
    """Mean squared distance between the logits of a mix and the mix of the logits.

    Args:
        mixed_logits: The discriminator's logits for the mixed images.
        real_logits: Its logits for the real images.
        fake_logits: Its logits for the fake images. Gradients flow to all three.
        mask: The mask of :func:`label_mix`: 1 where real, 0 where fake.
    Shape:
        - logits ``(B, C, H, W)``; mask ``(B, 1, H, W)``; output a scalar, float32 or float64
    Raises:
        InputError: Shapes or devices differ, or (eagerly on CPU) the mask holds other numbers
            than 0 and 1.
        DTypeError: An input is not floating point.

    Note:
        Units: squared logits; OASIS weighs this term by 10 (ADE-20K, COCO-Stuff) or 5
        (Cityscapes). Cost: ``O(B C H W)``. Gradients: any order.
    Source:
        Schönfeld et al., ICLR 2021 (OASIS), Sec. 3.2, Eq. (4). Not used by DP-SIMS itself.
        Theirs -> ours: L_cons -> this loss without its factor.

    Example:
        >>> real, fake = torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)
        >>> label_mix_loss(real, real, fake, torch.ones(1, 1, 2, 2))  # all real: nothing to pay
        tensor(0.)
    """
    owner = "label_mix_loss"
    check_tensor(owner, "mixed_logits", mixed_logits, "B C H W")
    b, c, h, w = mixed_logits.shape
    for name, logits in (("real_logits", real_logits), ("fake_logits", fake_logits)):
        check_tensor(owner, name, logits, "B C H W", like=mixed_logits, B=b, C=c, H=h, W=w)
    check_tensor(owner, "mask", mask, "B C H W", like=mixed_logits, B=b, C=1, H=h, W=w)
    if values_are_readable(mask) and bool(((mask != 0) & (mask != 1) & ~mask.isnan()).any()):
        msg = f"{owner}: mask must hold 0 and 1 only; got values in "
        msg += f"[{float(mask.min()):g}, {float(mask.max()):g}]"
        raise InputError(msg)
    dtype = torch.promote_types(torch.float32, mixed_logits.dtype)
    target = _select(mask, real_logits, fake_logits).to(dtype)
    squares = (mixed_logits.to(dtype) - target).square()
    # an empty batch costs 0, not 0/0
    return squares.sum() / max(1, squares.numel())


def _select(mask: Tensor, real: Tensor, fake: Tensor) -> Tensor:
    """``real`` where the mask is 1, ``fake`` where it is 0, NaN where it is NaN."""
    # not mask * real + (1 - mask) * fake: an infinite value must not leak from the other side
    chosen = torch.where(mask == 1, real, fake)
    return torch.where(mask.isnan(), torch.nan, chosen)
