"""Figures of a generator: a quick comparison for a run in progress, and the full protocol."""

from dpsims_reference.evaluation.card import (
    build_card as build_card,
    check_card as check_card,
    read_card as read_card,
)
from dpsims_reference.evaluation.diversity import (
    FeatureDistance as FeatureDistance,
    NamedDistance as NamedDistance,
    feature_diversity as feature_diversity,
    lpips as lpips,
)
from dpsims_reference.evaluation.extractors import (
    FeatureExtractor as FeatureExtractor,
    efficientnet_lite1 as efficientnet_lite1,
)
from dpsims_reference.evaluation.pretrained_extractors import (
    inception_v3 as inception_v3,
    swav_resnet50 as swav_resnet50,
)
from dpsims_reference.evaluation.processes import Process as Process
from dpsims_reference.evaluation.protocol import (
    Instruments as Instruments,
    Measurement as Measurement,
    Protocol as Protocol,
    measure as measure,
)
from dpsims_reference.evaluation.quick import (
    Evaluator as Evaluator,
    evaluate as evaluate,
    format_figures as format_figures,
)
from dpsims_reference.evaluation.segmenter_files import load_segmenter as load_segmenter
from dpsims_reference.evaluation.segmenters import Segmenter as Segmenter
