"""Modules of the generator and the discriminator, each usable alone."""

from dpsims.nn.attention import (
    CrossAttentionNoiseInjector as CrossAttentionNoiseInjector,
    SelfAttention2d as SelfAttention2d,
)
from dpsims.nn.backbone import ConditionedBackbone as ConditionedBackbone
from dpsims.nn.conditioning import FeatureConditioner as FeatureConditioner
from dpsims.nn.decoder import UNetDecoder as UNetDecoder
from dpsims.nn.heads import ProjectedDiscriminator as ProjectedDiscriminator
from dpsims.nn.inference import prepare_for_inference as prepare_for_inference
from dpsims.nn.joined import joined_conv2d as joined_conv2d
from dpsims.nn.labels import LabelConv2d as LabelConv2d, resize_labels as resize_labels
from dpsims.nn.mixing import (
    CrossChannelMixing as CrossChannelMixing,
    CrossScaleMixing as CrossScaleMixing,
)
from dpsims.nn.noise import NoiseMapper as NoiseMapper, sphere_normalize as sphere_normalize
from dpsims.nn.norm import BatchNorm2d as BatchNorm2d
from dpsims.nn.pyramid import LabelMapPyramid as LabelMapPyramid
from dpsims.nn.spade import SPADE as SPADE, spade_modulate as spade_modulate
from dpsims.nn.spade_block import SPADEResBlock as SPADEResBlock
from dpsims.nn.spectral import (
    effective_weight as effective_weight,
    fold_spectral_norm_ as fold_spectral_norm_,
    refresh_spectral_norm_ as refresh_spectral_norm_,
    spectral_normalize_ as spectral_normalize_,
)
