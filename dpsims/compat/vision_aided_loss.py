"""The discriminator of vision-aided GAN, by its documented signature, on parts of dpsims."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims._checks import check_tensor
from dpsims.compat._options import check_flag, refuse_unknown
from dpsims.compat._vision_models import MODELS as MODELS, Vision, choose_models
from dpsims.data.augment import DiffAugment
from dpsims.errors import InputError
from dpsims.losses._adversarial_terms import Kind, fake_term, generator_term, real_term
from dpsims.nn.backbone import ConditionedBackbone
from dpsims.nn.heads import ProjectedDiscriminator

_OWNER = "vision_aided_loss.Discriminator"
_SMOOTHING = 0.1


class _Loss(NamedTuple):
    kind: Kind
    label_smoothing: float


_LOSSES = {
    "sigmoid": _Loss("softplus", 0.0),
    "sigmoid_s": _Loss("softplus", _SMOOTHING),
    "hinge": _Loss("hinge", 0.0),
}
_LOSSES |= {f"multilevel_{name}": loss for name, loss in _LOSSES.items()}


class Discriminator(nn.Module):
    """Drop-in for ``vision_aided_loss.Discriminator``.

    ``from dpsims.compat import vision_aided_loss`` in place of ``import vision_aided_loss`` is all
    that changes in a script that follows the README.

    Args:
        cv_type: Names of models, joined by ``"+"``: ``clip``, ``dino``, ``swin``, ``vgg`` or, not
            in the original, ``dinov2``, ``convnext``, ``efficientnet`` and any timm name; see
            :data:`MODELS`. The original's ``det_coco``, ``seg_ade``, ``face_seg`` and
            ``face_normals`` are not in timm and raise.
        output_type: ``"conv_multi_level"`` puts a head on four levels, ``"conv"`` on the last one;
            several are joined by ``"+"``. ``None`` means the former for ``clip`` and ``dino``, the
            latter for all others. The original offers it for these two only.
        diffaug: Whether images pass through :class:`dpsims.data.DiffAugment`, which draws from
            torch's default generator.
        num_classes: Number ``K`` of image classes, 0 for none (a projection discriminator).
        loss_type: ``"sigmoid"``, ``"sigmoid_s"`` (with label smoothing) or ``"hinge"``.
            ``"multilevel_"`` in front of it is accepted and not needed: each takes any number of
            levels. ``None`` returns logits.
        device: Where the modules go.
        pretrained: As in :class:`dpsims.nn.ConditionedBackbone`.
        weights: As in :class:`dpsims.nn.ConditionedBackbone`; for several models a list.
        nonlinearity: As there. ``"sigmoid"`` with ``norm="batch"`` is the conditioning of DP-SIMS;
            the original has none.
        norm: As there.
        **options: None is supported; each one raises.

    Attributes:
        cv_ensemble: The backbones. Frozen for good: ``requires_grad_(False)`` on them is not
            needed and ``requires_grad_(True)`` changes nothing.
        decoder: The trained heads.

    Shape:
        - images ``(B, 3, H, W)`` in [-1, 1]; labels ``(B,)`` integer ids or ``(B, K)`` one-hot
        - output a scalar, so that both ``loss.backward()`` and ``loss.mean()`` work; with
          ``loss_type=None`` one list of logits per model
    Raises:
        InputError: An option that is not supported, or out of range; not exactly one of
            ``for_real`` and ``for_G`` with a loss, any of them without.
        DTypeError: An argument of the wrong type.
        BackboneError: As :class:`dpsims.nn.ConditionedBackbone`.

    Note:
        Units: hinge in logits, sigmoid in nats. The sum over models of the mean over levels of the
        mean over logits. Label smoothing is one-sided, with targets of 0.9 for real images.
        Differences: runs on today's timm, without CLIP's package; the original's Swin (MoBY) and
        anti-aliased VGG weights are replaced by timm's; heads are those of
        :class:`dpsims.nn.ProjectedDiscriminator`, so checkpoints of the original do not load.
    Source:
        Kumari et al., "Ensembling Off-the-shelf Models for GAN Training", CVPR 2022, and the
        project's README. Written from the paper and the documented signature, not from the code.

    Example:
        >>> discr = Discriminator(cv_type="test_vit", loss_type="sigmoid_s", pretrained=False)
        >>> _ = discr.cv_ensemble.requires_grad_(False)
        >>> real, fake = torch.randn(2, 2, 3, 64, 64)
        >>> lossD = discr(real, for_real=True) + discr(fake, for_real=False)
        >>> lossD.backward()
        >>> lossG = discr(fake, for_G=True)
        >>> lossG.shape
        torch.Size([])
    """

    def __init__(
        self,
        cv_type: str,
        *,
        output_type: str | None = None,
        diffaug: bool = True,
        num_classes: int = 0,
        loss_type: str | None = None,
        device: str | torch.device = "cpu",
        pretrained: bool = True,
        weights: str | os.PathLike[str] | Sequence[str | os.PathLike[str] | None] | None = None,
        nonlinearity: str = "identity",
        norm: str = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        keywords = ("cv_type", "output_type", "diffaug", "num_classes", "loss_type", "device")
        refuse_unknown(
            _OWNER, options, (*keywords, "pretrained", "weights", "nonlinearity", "norm")
        )
        models = choose_models(_OWNER, cv_type, output_type)
        self.augment = DiffAugment() if check_flag(_OWNER, "diffaug", diffaug) else None
        self.loss, self.loss_type = _read_loss(loss_type), loss_type
        self.members = nn.ModuleList(
            ProjectedDiscriminator(
                _backbone(model, pretrained, source, nonlinearity, norm), num_classes=num_classes
            )
            for model, source in zip(models, _read_weights(weights, len(models)), strict=True)
        )
        self.to(device)

    @property
    def _each(self) -> list[ProjectedDiscriminator]:
        return [cast("ProjectedDiscriminator", member) for member in self.members]

    @property
    def cv_ensemble(self) -> nn.ModuleList:
        """The frozen backbones."""
        return nn.ModuleList(member.backbone for member in self._each)

    @property
    def decoder(self) -> nn.ModuleList:
        """The trained heads."""
        return nn.ModuleList(member.heads for member in self._each)

    def forward(
        self,
        images: Float[Tensor, "B 3 H W"],
        labels: Integer[Tensor, " B"] | Float[Tensor, "B K"] | None = None,
        *,
        for_real: bool | None = None,
        for_G: bool = False,  # noqa: N803
    ) -> Tensor | list[list[Tensor]]:
        """The loss of real images, of fake images, or of the generator; or the logits."""
        check_tensor(_OWNER, "images", images, "B C H W", C=3)
        for_generator = check_flag(_OWNER, "for_G", for_G)
        if for_real is not None:
            for_real = check_flag(_OWNER, "for_real", for_real)
        if (for_real is not None) + for_generator != (self.loss is not None):
            rule = "be True or False, or for_G True, not both" if self.loss else "be left out"
            got = f"for_real={for_real}, for_G={for_generator}"
            msg = f"{_OWNER}: for_real must {rule}, with loss_type={self.loss_type!r}; got {got}"
            raise InputError(msg)
        if self.augment is not None:
            images = self.augment(images).images
        logits = [member(images, labels) for member in self._each]
        if self.loss is None:
            return logits
        if for_generator:
            costs = [generator_term(self.loss.kind, heads) for heads in logits]
        elif for_real:
            kind, smoothing = self.loss
            costs = [real_term(kind, heads, smoothing) for heads in logits]
        else:
            costs = [fake_term(self.loss.kind, heads) for heads in logits]
        return torch.stack(costs).sum()


def _read_loss(loss_type: object) -> _Loss | None:
    if loss_type is None:
        return None
    if not isinstance(loss_type, str) or loss_type not in _LOSSES:
        listed = ", ".join(_LOSSES)
        msg = f"{_OWNER}: loss_type must be None (for logits) or one of {listed}"
        raise InputError(f"{msg}; got {loss_type!r:.80}")
    return _LOSSES[loss_type]


def _read_weights(weights: object, count: int) -> list[Any]:
    """One source of weights per model."""
    if weights is None:
        return [None] * count
    given = list(weights) if isinstance(weights, list | tuple) else [weights]
    if len(given) != count:
        msg = f"{_OWNER}: weights must be a list of {count}, one per model; got {len(given)}"
        raise InputError(msg)
    return given


def _backbone(
    model: Vision, pretrained: bool, weights: Any, nonlinearity: str, norm: str
) -> ConditionedBackbone:
    return ConditionedBackbone(
        model.name,
        pretrained=pretrained,
        weights=weights,
        num_levels=4 if model.multi_level else 1,
        nonlinearity=nonlinearity,
        norm=norm,
        input_size=model.input_size,
    )
