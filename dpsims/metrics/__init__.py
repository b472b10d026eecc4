"""Measures of generated images, thin over torchmetrics and lpips, and looks inside a model."""

from dpsims.metrics.conditioning import (
    ConditioningLevel as ConditioningLevel,
    ConditioningReport as ConditioningReport,
    FeatureStatistics as FeatureStatistics,
    conditioning_report as conditioning_report,
)
from dpsims.metrics.diversity import (
    l1_distance as l1_distance,
    lpips_distance as lpips_distance,
    pairwise_diversity as pairwise_diversity,
)
from dpsims.metrics.frechet import (
    FrechetFeatureDistance as FrechetFeatureDistance,
    frechet_distance as frechet_distance,
)
from dpsims.metrics.noise import (
    NoiseGate as NoiseGate,
    NoiseScale as NoiseScale,
    NoiseSensitivity as NoiseSensitivity,
    noise_sensitivity as noise_sensitivity,
)
from dpsims.metrics.segmentation import (
    SegmentationConsistency as SegmentationConsistency,
    SegmentationScores as SegmentationScores,
)
