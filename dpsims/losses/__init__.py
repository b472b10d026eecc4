"""Losses of GAN training: functions, and Modules where there is something to learn."""

from dpsims.losses.adversarial import (
    AdversarialLoss as AdversarialLoss,
    AdversarialTerms as AdversarialTerms,
)
from dpsims.losses.class_weights import class_balance_weights as class_balance_weights
from dpsims.losses.contrastive import PatchInfoNCE as PatchInfoNCE, info_nce as info_nce
from dpsims.losses.diversity import (
    diversity_ratio as diversity_ratio,
    diversity_threshold as diversity_threshold,
    hinge_diversity_loss as hinge_diversity_loss,
)
from dpsims.losses.feature_matching import feature_matching_loss as feature_matching_loss
from dpsims.losses.focal import (
    PixelFocalLoss as PixelFocalLoss,
    PixelFocalTerms as PixelFocalTerms,
    pixel_focal_loss as pixel_focal_loss,
)
from dpsims.losses.gradient_penalty import r1_penalty as r1_penalty
from dpsims.losses.labelmix import (
    LabelMix as LabelMix,
    label_mix as label_mix,
    label_mix_loss as label_mix_loss,
)
