"""Both players' losses, for discriminators of any shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Integer
from torch import Tensor

from dpsims._checks import check_choice, check_int, check_number
from dpsims.errors import DTypeError, InputError
from dpsims.losses._adversarial_terms import (
    Kind,
    check_logits,
    fake_term,
    generator_term,
    real_term,
)
from dpsims.losses.focal import PixelFocalLoss
from dpsims.losses.gradient_penalty import r1_penalty

Logits = Float[Tensor, "..."] | Sequence[Float[Tensor, "..."]]


class AdversarialTerms(NamedTuple):
    """The terms of the discriminator's loss; it minimises their sum.

    Attributes:
        real: Cost of the real images.
        fake: Cost of the fake images.
        r1: The gradient penalty, with its weight; 0 where it was not asked for.

    Source:
        Goodfellow et al., NeurIPS 2014, Eq. (1); the penalty: Mescheder et al., ICML 2018,
        Eq. (9).

    Example:
        >>> terms = AdversarialLoss("hinge").discriminator_terms(torch.ones(4), torch.zeros(4))
        >>> [float(term) for term in terms]
        [0.0, 1.0, 0.0]
    """

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]
    r1: Float[Tensor, ""]


class AdversarialLoss:
    r"""The GAN loss of both players, for any discriminator.

    Args:
        kind: ``"hinge"``: D pays :math:`\max(0, 1 - x)` for real and :math:`\max(0, 1 + x)` for
            fake logits, G pays :math:`-x`. ``"softplus"``: the non-saturating loss, D pays
            :math:`\log(1 + e^{-x})` for real and :math:`\log(1 + e^{x})` for fake logits, G pays
            :math:`\log(1 + e^{-x})`. ``"pixel"``: ``pixel_loss``, with label maps.
        label_smoothing: One-sided smoothing of ``"softplus"``, in ``[0, 1)``: real images should
            be real with probability ``1 - label_smoothing``. Other kinds take 0 only.
        r1_weight: Weight of :func:`r1_penalty` in the discriminator's loss; 0 leaves it out. Not
            with ``"pixel"``.
        r1_interval: How many steps one penalty stands for (lazy regularisation): it is multiplied
            by this number, and ``real_images`` may be left out on the steps between.
        pixel_loss: The loss that ``"pixel"`` stands for; ``None`` for the other kinds.
    Shape:
        - logits: a tensor of any shape, or a list of them, one per head; with ``"pixel"`` one
          tensor ``(B, K + 1, H, W)``, labels ``(B, H, W)``; output a scalar, float32 or float64
    Raises:
        InputError: An option is out of range or belongs to another kind; no head, or different
            numbers of heads; ``labels`` without ``"pixel"``, or missing with it; ``real_images``
            missing where R1 needs them; otherwise as :func:`r1_penalty` and
            :class:`PixelFocalLoss`.
        DTypeError: An option or input has the wrong type.

    Note:
        Units: hinge in logits, softplus in nats. Every head counts the same, whatever its size:
        the loss is the mean over heads of the mean over all logits of the head. It does not depend
        on how a batch is split. Cost: ``O(logits)``. Finite logits of any size give a finite loss
        and gradient. Gradients: any order.
    Source:
        Hinge: Lim and Ye, 2017; Miyato et al., ICLR 2018, Eqs. (16)-(17). Softplus: Goodfellow et
        al., NeurIPS 2014, Sec. 3. Smoothing: Salimans et al., NeurIPS 2016, Sec. 3.4. Pixel:
        Berrada et al., CVPR 2024, Eqs. (3)-(4). Not in the papers: the mean over heads.

    Example:
        >>> loss = AdversarialLoss("hinge")
        >>> real_logits = [torch.full((2, 1, 8, 8), 2.0), torch.full((2, 1, 4, 4), 1.0)]
        >>> fake_logits = [torch.full((2, 1, 8, 8), -1.0), torch.full((2, 1, 4, 4), 0.0)]
        >>> loss.discriminator(real_logits, fake_logits), loss.generator(fake_logits)
        (tensor(0.5000), tensor(0.5000))
    """

    def __init__(
        self,
        kind: Kind = "hinge",
        *,
        label_smoothing: float = 0.0,
        r1_weight: float = 0.0,
        r1_interval: int = 1,
        pixel_loss: PixelFocalLoss | None = None,
    ) -> None:
        owner = "AdversarialLoss"
        check_choice(owner, "kind", kind, ("hinge", "softplus", "pixel"))
        check_number(owner, "label_smoothing", label_smoothing, minimum=0, below=1)
        check_number(owner, "r1_weight", r1_weight, minimum=0)
        check_int(owner, "r1_interval", r1_interval)
        if pixel_loss is not None and not isinstance(pixel_loss, PixelFocalLoss):
            msg = f"{owner}: pixel_loss must be a PixelFocalLoss; got {type(pixel_loss).__name__}"
            raise DTypeError(msg)
        if (pixel_loss is None) == (kind == "pixel"):
            rule = "be a PixelFocalLoss" if kind == "pixel" else "be None"
            msg = f"{owner}: pixel_loss must {rule} with kind={kind!r}; got {pixel_loss!r:.80}"
            raise InputError(msg)
        if label_smoothing and kind != "softplus":
            where = " (give it to pixel_loss)" if kind == "pixel" else ""
            msg = f"{owner}: label_smoothing must be 0 with kind={kind!r}{where}; "
            raise InputError(msg + f"got {label_smoothing}")
        if r1_weight and kind == "pixel":
            msg = f"{owner}: r1_weight must be 0 with kind='pixel'; got {r1_weight}"
            raise InputError(msg)
        self.kind: Kind = kind
        self.label_smoothing = label_smoothing
        self.r1_weight = r1_weight
        self.r1_interval = r1_interval
        self.pixel_loss = pixel_loss

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"AdversarialLoss({options})"

    def discriminator(
        self,
        real_logits: Logits,
        fake_logits: Logits,
        *,
        labels: Integer[Tensor, "B H W"] | None = None,
        real_images: Float[Tensor, "B C H W"] | None = None,
    ) -> Float[Tensor, ""]:
        """What the discriminator minimises: the sum of :meth:`discriminator_terms`."""
        terms = self.discriminator_terms(
            real_logits, fake_logits, labels=labels, real_images=real_images
        )
        return terms.real + terms.fake + terms.r1

    def discriminator_terms(
        self,
        real_logits: Logits,
        fake_logits: Logits,
        *,
        labels: Integer[Tensor, "B H W"] | None = None,
        real_images: Float[Tensor, "B C H W"] | None = None,
    ) -> AdversarialTerms:
        """The loss as its real term, its fake term and the gradient penalty."""
        owner = "AdversarialLoss.discriminator"
        self._check_labels(owner, labels)
        if self.pixel_loss is not None:
            terms = self.pixel_loss.discriminator_terms(real_logits, fake_logits, labels)  # type: ignore[arg-type]
            return AdversarialTerms(terms.real, terms.fake, torch.zeros_like(terms.real))
        real_heads = check_logits(owner, "real_logits", real_logits)
        fake_heads = check_logits(owner, "fake_logits", fake_logits, like=real_heads[0])
        if len(real_heads) != len(fake_heads):
            msg = f"{owner}: fake_logits must hold {len(real_heads)} heads, as real_logits; "
            raise InputError(msg + f"got {len(fake_heads)}")
        real = real_term(self.kind, real_heads, self.label_smoothing)
        fake = fake_term(self.kind, fake_heads)
        penalty = torch.zeros_like(real.detach())
        if self.r1_weight and real_images is not None:
            weight = self.r1_weight * self.r1_interval
            penalty = r1_penalty(real_logits, real_images, weight=weight)
        elif self.r1_weight and self.r1_interval == 1:
            msg = f"{owner}: real_images must be given on every step with r1_weight="
            raise InputError(msg + f"{self.r1_weight} and r1_interval=1; got None")
        return AdversarialTerms(real, fake, penalty)

    def generator(
        self, fake_logits: Logits, *, labels: Integer[Tensor, "B H W"] | None = None
    ) -> Float[Tensor, ""]:
        """What the generator minimises: that its images are taken for real ones."""
        owner = "AdversarialLoss.generator"
        self._check_labels(owner, labels)
        if self.pixel_loss is not None:
            return self.pixel_loss.generator(fake_logits, labels)  # type: ignore[arg-type]
        return generator_term(self.kind, check_logits(owner, "fake_logits", fake_logits))

    def _check_labels(self, owner: str, labels: object) -> None:
        if (labels is None) == (self.kind == "pixel"):
            rule = "be given" if self.kind == "pixel" else "be None"
            got = "None" if labels is None else type(labels).__name__
            msg = f"{owner}: labels must {rule} with kind={self.kind!r}; got {got}"
            raise InputError(msg)
