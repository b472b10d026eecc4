"""Tables 6, 7, 8, S9 and S10: the networks and the losses."""

from __future__ import annotations

from dpsims_reference.experiments.experiment import Dataset, Experiment

TABLE6 = (
    Experiment(
        name="table6/dp_sims",
        change="nothing: the paper's model",
        dataset="ade20k",
        published={"FID": 22.7, "mIoU_MF": 67.8},
    ),
    Experiment(
        name="table6/oasis_discriminator",
        change="OASIS's discriminator instead of ours",
        dataset="ade20k",
        published={"FID": 29.3, "mIoU_MF": 49.0},
        overrides={"discriminator": {"architecture": "oasis"}},
        tiny={"discriminator": {"oasis_channels": 8}},
        note="The losses stay the paper's, so there is no LabelMix.",
    ),
    Experiment(
        name="table6/oasis_generator",
        change="OASIS's generator instead of ours",
        dataset="ade20k",
        published={"FID": 25.6, "mIoU_MF": 63.6},
        overrides={"generator": {"architecture": "oasis"}},
        # without a pyramid, SPADE's own convolutions are all that sees a neighbourhood
        tiny={"generator": {"spade_hidden": 32, "spade_kernel": 3}},
        note="With OASIS's hyperbolic tangent on the output, and the paper's diversity loss.",
    ),
    Experiment(
        name="table6/no_self_attention",
        change="no self-attention in the label pyramid",
        dataset="ade20k",
        published={"FID": 23.7, "mIoU_MF": 65.4},
        overrides={"generator": {"self_attention": False}},
    ),
    Experiment(
        name="table6/no_cross_attention",
        change="noise beside the label map instead of cross-attention",
        dataset="ade20k",
        published={"FID": 23.6, "mIoU_MF": 64.5},
        overrides={"generator": {"injection": "concatenation"}},
        note='"The usual concatenation" is read as OASIS\'s: all of z at every pixel.',
    ),
    Experiment(
        name="table6/no_label_smoothing",
        change="no label smoothing",
        dataset="ade20k",
        published={"FID": 23.0, "mIoU_MF": 66.3},
        overrides={"objective": {"label_smoothing": 0.0}},
    ),
    Experiment(
        name="table6/no_contrastive",
        change="no contrastive loss",
        dataset="ade20k",
        published={"FID": 25.1, "mIoU_MF": 66.0},
        overrides={"objective": {"contrastive_weight": 0.0}},
    ),
)

TABLE7 = tuple(
    Experiment(
        name=f"table7/tau_{temperature}",
        change=f"temperature {temperature} in the contrastive loss",
        dataset="ade20k",
        published={"FID": fid, "mIoU_MF": miou},
        overrides={"objective": {"temperature": temperature}},
    )
    for temperature, fid, miou in (
        (0.07, 25.7, 62.6),
        (0.3, 22.7, 67.8),
        (0.7, 24.1, 66.3),
        (2.0, 26.4, 61.4),
    )
)

_PIXEL_LOSSES = {
    "weighted_ce": ("class-weighted cross-entropy", {"focal_gamma": 0.0, "balanced": True}),
    "focal": ("focal loss without class weights", {"focal_gamma": 2.0, "balanced": False}),
    "weighted_focal": (
        "class-weighted focal loss: the paper's model",
        {"focal_gamma": 2.0, "balanced": True},
    ),
}
_TABLE8: tuple[tuple[str, Dataset, float, float], ...] = (
    ("weighted_ce", "cityscapes", 39.8, 75.9),
    ("focal", "cityscapes", 39.3, 75.0),
    ("weighted_focal", "cityscapes", 38.2, 78.5),
    ("weighted_ce", "ade20k", 23.2, 65.5),
    ("focal", "ade20k", 22.8, 64.7),
    ("weighted_focal", "ade20k", 22.7, 67.8),
)
TABLE8 = tuple(
    Experiment(
        name=f"table8/{loss}_{dataset}",
        change=_PIXEL_LOSSES[loss][0],
        dataset=dataset,
        published={"FID": fid, "mIoU_MF": miou},
        overrides={"objective": _PIXEL_LOSSES[loss][1]},
    )
    for loss, dataset, fid, miou in _TABLE8
)

TABLE_S9 = tuple(
    Experiment(
        name=f"tableS9/weight_{weight:g}",
        change=f"weight {weight:g} of the diversity loss",
        dataset="ade20k",
        published={"FID": fid, "mIoU_MF": miou, "LPIPS": lpips},
        overrides={"objective": {"diversity_weight": weight}},
    )
    for weight, fid, miou, lpips in (
        (0.0, 22.9, 67.7, 1.5e-5),
        (10.0, 22.7, 67.8, 0.47),
        (100.0, 23.3, 67.7, 0.36),
    )
)

TABLE_S10 = (
    Experiment(
        name="tableS10/features",
        change="diversity measured in G's features: the paper's model",
        dataset="ade20k",
        published={"FID": 22.7, "mIoU_MF": 67.8, "LPIPS": 0.47},
        overrides={"objective": {"diversity_space": "features"}},
    ),
    Experiment(
        name="tableS10/image",
        change="diversity measured between the images",
        dataset="ade20k",
        published={"FID": 23.2, "mIoU_MF": 64.2, "LPIPS": 0.09},
        overrides={"objective": {"diversity_space": "image"}},
    ),
)
