"""Discriminators for any GAN: small trained heads on the maps of a pre-trained backbone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange, reduce
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims._checks import (
    check_bool,
    check_choice,
    check_int,
    check_ints,
    check_label_values,
    check_tensor,
    invalid_labels,
)
from dpsims.errors import DTypeError, InputError
from dpsims.nn.backbone import ConditionedBackbone
from dpsims.nn.mixing import CrossChannelMixing, CrossScaleMixing
from dpsims.nn.spectral import spectral_normalize_

_OWNER = "ProjectedDiscriminator"
_SLOPE = 0.2
Classes = Integer[Tensor, " B"] | Float[Tensor, "B K"]


class _Head(nn.Module):
    """Two 3x3 convolutions and a linear score, of every position or of their mean."""

    def __init__(self, channels: int, width: int, num_classes: int, pooled: bool) -> None:
        super().__init__()
        self.pooled = pooled
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1),
            nn.LeakyReLU(_SLOPE, inplace=True),
            nn.Conv2d(width, width, 3, padding=1),
            nn.LeakyReLU(_SLOPE, inplace=True),
        )
        self.score = nn.Linear(width, 1) if pooled else nn.Conv2d(width, 1, 1)
        # a linear layer rather than an embedding, so that spectral normalisation reaches it
        self.classes = nn.Linear(num_classes, width, bias=False) if num_classes else None

    def forward(self, features: Tensor, classes: Tensor | None) -> Tensor:
        features = self.body(features)
        if self.pooled:
            features = reduce(features, "b c h w -> b c", "mean")
        logits: Tensor = self.score(features)
        if self.classes is None or classes is None:
            return logits
        direction = self.classes(classes.to(features.dtype))
        if not self.pooled:
            direction = rearrange(direction, "b c -> b c 1 1")
        return logits + (direction * features).sum(dim=1, keepdim=True)


class ProjectedDiscriminator(nn.Module):
    r"""Tell real from fake images by the features of a pre-trained network.

    One small trained head looks at each map of the backbone. With classes, each head adds the
    inner product of its features with a learned vector of the image's class (a projection
    discriminator).

    Args:
        backbone: The conditioned backbone, frozen or not.
        num_classes: Number ``K`` of image classes; 0 for none.
        heads: ``"patch"`` judges every position of a map, ``"global"`` the whole image.
        head_channels: Width of the heads.
        mixing: ``"none"`` uses the conditioned maps as they are. ``"channels"`` mixes their
            channels by :class:`CrossChannelMixing`, ``"scales"`` then also their scales by
            :class:`CrossScaleMixing`, as in Projected GAN.
        mixing_channels: Width of the finest mixed map.
        mixing_expand: Whether the width of mixed maps doubles from level to level.
        levels: Which levels get a head, fine to coarse from 0. ``None`` means all.
        spectral_norm: Spectral normalisation of every layer of the heads.
    Shape:
        - images ``(B, 3, H, W)``; class_ids ``(B,)``, integer ids in ``[0, K)``, or ``(B, K)``,
          one weight per class (one-hot or soft)
        - output: one tensor per level, ``(B, 1, h_l, w_l)`` with ``"patch"``, ``(B, 1)`` with
          ``"global"``
    Raises:
        InputError: An option out of range; ``class_ids`` without ``num_classes``; (eagerly on CPU)
            an id out of range; images of the wrong shape or too small.
        DTypeError: An argument of the wrong type; with ``num_classes``, no ``class_ids``.

    Note:
        Units: logits, real is positive. An id out of range makes its logits NaN on other devices
        than the CPU. The list goes into :class:`dpsims.losses.AdversarialLoss` as it is. The
        frozen network is neither in ``parameters()`` nor in the ``state_dict``; the heads and the
        random weights of the mixing are. Cost: the backbone, and two 3x3 convolutions per level.
        Gradients: as those of :class:`ConditionedBackbone`.
    Source:
        The features: Berrada et al., CVPR 2024, Sec. 3.1, whose discriminator names classes of
        pixels (:class:`UNetDecoder`); heads on several maps and the mixing: Sauer et al., NeurIPS
        2021, Secs. 3.1-3.2; classes: Miyato and Koyama, ICLR 2018, Eq. (4). Theirs -> ours: phi ->
        the body of a head, psi -> score, V -> classes. Not in the papers: the layout of a head.

    Example:
        >>> backbone = ConditionedBackbone("test_resnet", pretrained=False)
        >>> discriminator = ProjectedDiscriminator(backbone, num_classes=10)
        >>> logits = discriminator(torch.randn(2, 3, 64, 64), torch.tensor([3, 7]))
        >>> [tuple(level.shape) for level in logits]
        [(2, 1, 16, 16), (2, 1, 8, 8), (2, 1, 4, 4), (2, 1, 2, 2)]
    """

    def __init__(
        self,
        backbone: ConditionedBackbone,
        *,
        num_classes: int = 0,
        heads: Literal["patch", "global"] = "patch",
        head_channels: int = 128,
        mixing: Literal["none", "channels", "scales"] = "none",
        mixing_channels: int = 64,
        mixing_expand: bool = True,
        levels: Sequence[int] | None = None,
        spectral_norm: bool = True,
    ) -> None:
        super().__init__()
        if not isinstance(backbone, ConditionedBackbone):
            got = type(backbone).__name__
            msg = f"{_OWNER}: backbone must be a ConditionedBackbone; got {got}"
            raise DTypeError(msg)
        check_int(_OWNER, "num_classes", num_classes, minimum=0)
        check_choice(_OWNER, "heads", heads, ("patch", "global"))
        check_int(_OWNER, "head_channels", head_channels)
        check_choice(_OWNER, "mixing", mixing, ("none", "channels", "scales"))
        check_int(_OWNER, "mixing_channels", mixing_channels)
        check_bool(_OWNER, "mixing_expand", mixing_expand)
        check_bool(_OWNER, "spectral_norm", spectral_norm)
        self.num_classes = num_classes
        self.levels = _check_levels(levels, len(backbone.channels))
        self.backbone = backbone
        channels = list(backbone.channels)
        self.mixing = nn.Sequential()
        if mixing != "none":
            across_channels = CrossChannelMixing(
                channels, out_channels=mixing_channels, expand=mixing_expand
            )
            self.mixing.append(across_channels)
            channels = across_channels.channels
        if mixing == "scales":
            across_scales = CrossScaleMixing(channels)
            self.mixing.append(across_scales)
            channels = across_scales.channels
        self.heads = nn.ModuleList(
            _Head(channels[level], head_channels, num_classes, heads == "global")
            for level in self.levels
        )
        if spectral_norm:
            spectral_normalize_(self.heads)

    def forward(
        self, images: Float[Tensor, "B 3 H W"], class_ids: Classes | None = None
    ) -> list[Float[Tensor, "B 1 ..."]]:
        """Logits of every level, fine to coarse."""
        check_tensor(_OWNER, "images", images, "B C H W", C=3)
        classes = self._class_weights(class_ids, images)
        features: list[Tensor] = self.mixing(self.backbone(images))
        return [
            head(features[level], classes)
            for head, level in zip(self.heads, self.levels, strict=True)
        ]

    def _class_weights(self, class_ids: object, images: Tensor) -> Tensor | None:
        """One weight per image and class; NaN where an id is out of range."""
        if not self.num_classes:
            if class_ids is not None:
                got = type(class_ids).__name__
                msg = f"{_OWNER}: class_ids must be None with num_classes=0; got {got}"
                raise InputError(msg)
            return None
        batch, count = images.shape[0], self.num_classes
        name = "class_ids"
        if isinstance(class_ids, Tensor) and class_ids.is_floating_point() and class_ids.ndim > 1:
            check_tensor(_OWNER, name, class_ids, "B K", like=images, B=batch, K=count)
            return class_ids
        check_tensor(_OWNER, name, class_ids, "B", kind="integer", like=images, B=batch)
        assert isinstance(class_ids, Tensor)
        check_label_values(_OWNER, name, class_ids, count, None)
        bad = invalid_labels(class_ids, count, None)
        every = torch.arange(count, device=class_ids.device)
        weights = (class_ids.long()[:, None] == every).to(images.dtype)
        return torch.where(bad[:, None], torch.nan, weights)

    def extra_repr(self) -> str:
        """The settings, as ``repr`` shows them."""
        return f"num_classes={self.num_classes}, levels={list(self.levels)}"


def _check_levels(levels: Sequence[int] | None, count: int) -> tuple[int, ...]:
    if levels is None:
        return tuple(range(count))
    check_ints(_OWNER, "levels", levels, minimum=0)
    if list(levels) != sorted(set(levels)) or max(levels) >= count:
        msg = f"{_OWNER}: levels must rise and be below {count}; got {list(levels)}"
        raise InputError(msg)
    return tuple(levels)
