"""Reading and choosing training data: label ids, class statistics, samplers, instance maps."""

from dpsims.data.augment import (
    AugmentedBatch as AugmentedBatch,
    AugmentParams as AugmentParams,
    DiffAugment as DiffAugment,
)
from dpsims.data.instances import instance_offsets as instance_offsets
from dpsims.data.label_spec import LabelSpec as LabelSpec
from dpsims.data.presence import class_presence as class_presence
from dpsims.data.sampler import ClassBalancedSampler as ClassBalancedSampler
from dpsims.data.weights import image_sampling_weights as image_sampling_weights
