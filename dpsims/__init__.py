"""GAN building blocks after DP-SIMS (Berrada et al., CVPR 2024). Unofficial.

Every public name is available here and is loaded on first use, so ``import dpsims`` costs nothing:
``dpsims.ConditionedBackbone`` is ``dpsims.nn.ConditionedBackbone``.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "dpsims.nn": (
        "BatchNorm2d",
        "ConditionedBackbone",
        "CrossAttentionNoiseInjector",
        "CrossChannelMixing",
        "CrossScaleMixing",
        "FeatureConditioner",
        "LabelConv2d",
        "LabelMapPyramid",
        "NoiseMapper",
        "ProjectedDiscriminator",
        "SPADE",
        "SPADEResBlock",
        "SelfAttention2d",
        "UNetDecoder",
        "effective_weight",
        "fold_spectral_norm_",
        "joined_conv2d",
        "prepare_for_inference",
        "refresh_spectral_norm_",
        "resize_labels",
        "spade_modulate",
        "spectral_normalize_",
        "sphere_normalize",
    ),
    "dpsims.losses": (
        "AdversarialLoss",
        "AdversarialTerms",
        "LabelMix",
        "PatchInfoNCE",
        "PixelFocalLoss",
        "PixelFocalTerms",
        "class_balance_weights",
        "diversity_ratio",
        "diversity_threshold",
        "feature_matching_loss",
        "hinge_diversity_loss",
        "info_nce",
        "label_mix",
        "label_mix_loss",
        "pixel_focal_loss",
        "r1_penalty",
    ),
    "dpsims.data": (
        "AugmentParams",
        "AugmentedBatch",
        "ClassBalancedSampler",
        "DiffAugment",
        "LabelSpec",
        "class_presence",
        "image_sampling_weights",
        "instance_offsets",
    ),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
_SUBPACKAGES = ("compat", "data", "errors", "losses", "metrics", "nn", "ops")

__all__ = ["__version__", *_HOME_OF, *_SUBPACKAGES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(importlib.import_module(_HOME_OF[name]), name)
    if name in _SUBPACKAGES:
        return importlib.import_module(f"dpsims.{name}")
    msg = f"module 'dpsims' has no attribute {name!r}"
    raise AttributeError(msg)


def __dir__() -> list[str]:
    return sorted(__all__)
