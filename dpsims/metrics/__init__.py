"""Measures of generated images, thin layers over torchmetrics and lpips (``dpsims[metrics]``)."""

from dpsims.metrics.diversity import (
    l1_distance as l1_distance,
    lpips_distance as lpips_distance,
    pairwise_diversity as pairwise_diversity,
)
from dpsims.metrics.frechet import (
    FrechetFeatureDistance as FrechetFeatureDistance,
    frechet_distance as frechet_distance,
)
from dpsims.metrics.segmentation import (
    SegmentationConsistency as SegmentationConsistency,
    SegmentationScores as SegmentationScores,
)
