"""Every public callable of dpsims that takes tensors: how to call it, and what its tensors are.

``tests/test_common_rules.py`` runs the same checks on every row. A row says in ``exceptions``
which check does not apply to it and why; nothing else is left out.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from typing import Any

import torch
from rules_part import Arg, Part
from torch import Tensor, nn

from dpsims import data, losses, metrics, nn as parts
from dpsims.ops.attention import attention, inject_tokens


def floats(*shape: int, seed: int = 0) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ids(*shape: int, high: int = 3) -> Callable[[], Tensor]:
    """Ids in which every class occurs."""
    return lambda: torch.arange(torch.Size(shape).numel()).mul(7).remainder(high).view(shape)


def given(**values: Any) -> Callable[[], dict[str, Any]]:
    """Inputs by name; callables are called, so that every call gets new tensors."""
    return lambda: {key: make() if callable(make) else make for key, make in values.items()}


def listed(*makers: Callable[[], Tensor]) -> Callable[[], list[Tensor]]:
    return lambda: [make() for make in makers]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def opened(module: nn.Module) -> nn.Module:
    """Open the gates that start at 0, so that every input reaches the output."""
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.rpartition(".")[2] == "gate":
                parameter.fill_(0.7)
    return module


def by_constructor(module: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(1)
        return opened(module())

    return make


def function(value: Callable[..., Any]) -> Callable[[], Callable[..., Any]]:
    return lambda: value


class Bound:
    """A method of a new object, followed by what it left behind."""

    def __init__(self, make: Callable[[], Any], run: Callable[..., Any]):
        self.make, self.run = make, run

    def __call__(self, **inputs: Any) -> Any:
        return self.run(self.make(), **inputs)


@cache
def _network() -> nn.Module:
    torch.manual_seed(1)
    return parts.ConditionedBackbone("test_resnet", pretrained=False, num_levels=3)


def backbone() -> nn.Module:
    # only the first call builds it, and must not draw what later calls do not
    with torch.random.fork_rng():
        return deepcopy(_network())


def projected(**options: Any) -> Callable[[], nn.Module]:
    return by_constructor(
        lambda: parts.ProjectedDiscriminator(
            backbone(), head_channels=4, mixing_channels=3, **options
        )
    )


def sampler(weights: Tensor) -> Tensor:
    return torch.tensor(list(data.ClassBalancedSampler(weights, num_samples=6)))


def frechet_sums(metric: nn.Module, images: Tensor) -> Tensor:
    metric.update(images, real=True)
    return metric.moments.real_features_cov_sum.clone()


def frechet_metric() -> nn.Module:
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return metrics.FrechetFeatureDistance(pool, name="mean color", num_features=3)


def confusion(metric: nn.Module, predicted: Tensor, labels: Tensor) -> Tensor:
    metric.update(predicted, labels)
    return metric.confusion.confmat.clone()


LEVELS = {"kind": "float", "levels": True}
MAP = "B C H W"
READS_VALUES = "reads the values of its input"
NOT_DIFFERENTIABLE = "not differentiable, documented"
RAISES_ON_NAN = "a value that is not finite is an error, documented"
COUNTS = "gives integers"
DETACHED = "detached, documented"
DETACHED_LATENTS = {"gradient-latents_a": DETACHED, "gradient-latents_b": DETACHED}
PICKS = "takes every pixel from one of two inputs"

NN = (
    Part(
        "sphere_normalize",
        function(parts.sphere_normalize),
        given(latents=floats(3, 5)),
        (Arg("latents", "B Z"),),
        sort="function",
        wide=True,
    ),
    Part(
        "NoiseMapper",
        by_constructor(lambda: parts.NoiseMapper(5, 6, num_tokens=2, depth=2)),
        given(latents=floats(3, 5)),
        (Arg("latents", "B Z", fixed="Z"),),
        wide=True,
    ),
    Part(
        "CrossAttentionNoiseInjector",
        by_constructor(lambda: parts.CrossAttentionNoiseInjector(4, 6)),
        given(features=floats(2, 4, 3, 5), tokens=floats(2, 3, 6)),
        (Arg("features", MAP, fixed="C"), Arg("tokens", "B T D", fixed="D")),
    ),
    Part(
        "SelfAttention2d",
        by_constructor(lambda: parts.SelfAttention2d(4)),
        given(features=floats(2, 4, 3, 5)),
        (Arg("features", MAP, fixed="C"),),
    ),
    Part(
        "spade_modulate",
        function(parts.spade_modulate),
        given(
            normalized=floats(2, 3, 4, 5),
            gamma=floats(2, 3, 4, 5, seed=1),
            beta=floats(2, 3, 4, 5, seed=2),
        ),
        (Arg("normalized", MAP), Arg("gamma", MAP), Arg("beta", MAP)),
        sort="function",
    ),
    Part(
        "SPADE",
        by_constructor(lambda: parts.SPADE(4, 3, hidden_channels=5)),
        given(features=floats(2, 4, 6, 5), cond=floats(2, 3, 6, 5)),
        (Arg("features", MAP, fixed="C"), Arg("cond", "B E H W", fixed="E")),
        norm=True,
    ),
    Part(
        "SPADEResBlock",
        by_constructor(lambda: parts.SPADEResBlock(4, 2, 3, hidden_channels=5)),
        given(features=floats(2, 4, 6, 5), cond=floats(2, 3, 6, 5)),
        (Arg("features", MAP, fixed="C"), Arg("cond", "B E H W", fixed="E")),
        norm=True,
    ),
    Part(
        "joined_conv2d",
        function(parts.joined_conv2d),
        given(
            maps=listed(floats(2, 3, 6, 5), floats(2, 4, 2, 2)),
            weight=floats(2, 7, 3, 3, seed=1),
            bias=floats(2, seed=2),
        ),
        (
            Arg("maps", "B c h w", fixed="c", **LEVELS),
            Arg("weight", "O I k k"),
            Arg("bias", "O", optional=True),
        ),
        sort="function",
    ),
    Part(
        "LabelConv2d",
        by_constructor(lambda: parts.LabelConv2d(3, 4, extra_channels=2)),
        given(labels=ids(2, 4, 5), extra=floats(2, 2, 4, 5)),
        (Arg("labels", "B H W", "int"), Arg("extra", "B E H W", fixed="E", optional=True)),
    ),
    Part(
        "LabelConv2d",
        by_constructor(lambda: parts.LabelConv2d(3, 4)),
        given(labels=floats(2, 3, 4, 5)),
        (Arg("labels", "B K H W", fixed="K", ranks=(1,)),),
        case="soft",
        exceptions={"wrong-dtype": "a 4-D map that is not floating point counts as ids"},
    ),
    Part(
        "resize_labels",
        function(parts.resize_labels),
        given(labels=ids(2, 4, 5), size=(3, 7)),
        (Arg("labels", "B H W", "int"),),
        sort="function",
    ),
    Part(
        "LabelMapPyramid",
        by_constructor(
            lambda: parts.LabelMapPyramid(
                3, channels=4, token_dim=5, num_levels=2, image_size=8, extra_channels=2
            )
        ),
        given(labels=ids(2, 8, 6), tokens=floats(2, 3, 5), extra=floats(2, 2, 8, 6)),
        (
            Arg("labels", "B H W", "int"),
            Arg("tokens", "B T D", fixed="D"),
            Arg("extra", "B E H W", fixed="E", optional=True),
        ),
        also=("LabelConv2d",),
        norm=True,
    ),
    Part(
        "FeatureConditioner",
        by_constructor(lambda: parts.FeatureConditioner(4)),
        given(features=floats(2, 4, 3, 5)),
        (Arg("features", "B C h w", fixed="C"),),
        norm=True,
        wide=True,
    ),
    Part(
        "BatchNorm2d",
        by_constructor(lambda: parts.BatchNorm2d(4)),
        given(features=floats(2, 4, 3, 5)),
        (Arg("features", MAP, fixed="C"),),
        norm=True,
        wide=True,
    ),
    Part(
        "ConditionedBackbone",
        backbone,
        given(images=floats(2, 3, 32, 48)),
        (Arg("images", MAP, fixed="C"),),
        also=("FeatureConditioner",),
        norm=True,
    ),
    Part(
        "UNetDecoder",
        by_constructor(
            lambda: parts.UNetDecoder([4, 3], [2, 4], 5, full_res_channels=2, head_channels=4)
        ),
        given(images=floats(2, 3, 7, 6), features=listed(floats(2, 4, 4, 3), floats(2, 3, 2, 2))),
        (Arg("images", MAP, fixed="C"), Arg("features", "B c h w", fixed="c", **LEVELS)),
    ),
    Part(
        "CrossChannelMixing",
        by_constructor(lambda: parts.CrossChannelMixing([4, 3], out_channels=2)),
        given(features=listed(floats(2, 4, 4, 3), floats(2, 3, 2, 2))),
        (Arg("features", "B c h w", fixed="c", **LEVELS),),
    ),
    Part(
        "CrossScaleMixing",
        by_constructor(lambda: parts.CrossScaleMixing([4, 3])),
        given(features=listed(floats(2, 4, 4, 3), floats(2, 3, 2, 2))),
        (Arg("features", "B c h w", fixed="c", **LEVELS),),
    ),
    Part(
        "ProjectedDiscriminator",
        projected(),
        given(images=floats(2, 3, 32, 48)),
        (Arg("images", MAP, fixed="C"),),
        also=("FeatureConditioner",),
        norm=True,
    ),
    Part(
        "ProjectedDiscriminator",
        projected(num_classes=3, heads="global", mixing="scales", levels=[0, 2]),
        given(images=floats(2, 3, 32, 48), class_ids=ids(2)),
        (Arg("images", MAP, fixed="C"), Arg("class_ids", "B", "int")),
        case="classes",
        also=("FeatureConditioner",),
        norm=True,
        exceptions={"channels-last": "gives no maps"},
    ),
    Part(
        "ProjectedDiscriminator",
        projected(num_classes=3, mixing="channels"),
        given(images=floats(2, 3, 32, 48), class_ids=lambda: floats(2, 3)().softmax(1)),
        (Arg("images", MAP, fixed="C"), Arg("class_ids", "B K", fixed="K", ranks=(1,))),
        case="soft-classes",
        also=("FeatureConditioner",),
        norm=True,
        exceptions={"wrong-dtype-class_ids": "what is not floating point counts as ids"},
    ),
)

FOCAL = (Arg("real_logits", MAP, fixed="C"), Arg("fake_logits", MAP, fixed="C"))
LABELS = Arg("labels", "B H W", "int")
PAIR = (Arg("features_a", MAP), Arg("features_b", MAP))
LATENTS = (Arg("latents_a", "B Z"), Arg("latents_b", "B Z"))


def _focal_method(method: str) -> Callable[[], Callable[..., Any]]:
    return lambda: getattr(losses.PixelFocalLoss(3), method)


def penalty(images: Tensor) -> Tensor:
    """The penalty of a small discriminator."""
    if not images.requires_grad:
        images = images.detach().requires_grad_()
    return losses.r1_penalty([images.tanh().sum((1, 2, 3)), images.sigmoid()], images)


def augment_params() -> data.AugmentParams:
    return data.DiffAugment().sample(2, generator=seeded())


def two_outputs() -> dict[str, Tensor]:
    features, latents = floats(2, 3, 4, 5)(), floats(2, 3)()
    return {
        "features_a": features,
        "features_b": features.flip(0),
        "latents_a": latents,
        "latents_b": latents + 1,
    }


LOSSES = (
    Part(
        "pixel_focal_loss",
        function(losses.pixel_focal_loss),
        given(
            logits=floats(2, 4, 3, 5),
            labels=ids(2, 3, 5, high=4),
            class_weights=lambda: floats(4)().abs(),
        ),
        (Arg("logits", MAP), LABELS, Arg("class_weights", "C", "real", optional=True)),
        sort="loss",
        wide=True,
    ),
    Part(
        "PixelFocalLoss.discriminator",
        _focal_method("discriminator"),
        given(
            real_logits=floats(2, 4, 3, 5),
            fake_logits=floats(2, 4, 3, 5, seed=1),
            labels=ids(2, 3, 5),
        ),
        (*FOCAL, LABELS),
        sort="loss",
        wide=True,
    ),
    Part(
        "PixelFocalLoss.generator",
        _focal_method("generator"),
        given(fake_logits=floats(2, 4, 3, 5), labels=ids(2, 3, 5)),
        (FOCAL[1], LABELS),
        sort="loss",
        wide=True,
    ),
    Part(
        "AdversarialLoss.discriminator",
        lambda: losses.AdversarialLoss("hinge").discriminator,
        given(real_logits=floats(2, 5), fake_logits=floats(2, 5, seed=1)),
        (Arg("real_logits", "B N", ranks=()), Arg("fake_logits", "B N", ranks=())),
        sort="loss",
        wide=True,
        exceptions={"mismatch": "two batches, each with a mean of its own"},
    ),
    Part(
        "AdversarialLoss.discriminator",
        lambda: losses.AdversarialLoss("softplus", label_smoothing=0.1).discriminator,
        given(
            real_logits=listed(floats(2, 1, 4, 3), floats(2, 1, 2, 2)),
            fake_logits=listed(floats(2, 1, 4, 3, seed=1), floats(2, 1, 2, 2, seed=1)),
        ),
        (
            Arg("real_logits", MAP, levels=True, ranks=()),
            Arg("fake_logits", MAP, levels=True, ranks=()),
        ),
        sort="loss",
        case="heads",
        wide=True,
        exceptions={
            "mismatch": "every head has a mean of its own",
            "wrong-type": "one tensor is one head",
            "functional": "the table's rule takes one tensor",
        },
    ),
    Part(
        "AdversarialLoss.generator",
        lambda: losses.AdversarialLoss("softplus").generator,
        given(fake_logits=floats(2, 1, 3, 4)),
        (Arg("fake_logits", MAP, ranks=()),),
        sort="loss",
        wide=True,
    ),
    Part(
        "r1_penalty",
        lambda: penalty,
        given(images=floats(2, 3, 4, 5)),
        (Arg("images", MAP),),
        sort="loss",
        exceptions={
            "wrong-type": "refused by the discriminator first; has its own tests",
            "wrong-rank": "as wrong-type",
            "wrong-dtype": "as wrong-type",
            "empty-axis": "as wrong-type",
            "sparse": "as wrong-type",
            "modes": "needs gradients, documented",
            "requires-grad": "has the gradient of the images it is given",
            "functional": "takes a gradient of its own",
        },
    ),
    Part(
        "feature_matching_loss",
        function(losses.feature_matching_loss),
        given(
            fake_features=listed(floats(2, 4, 4, 3), floats(2, 3, 2, 2)),
            real_features=listed(floats(2, 4, 4, 3, seed=1), floats(2, 3, 2, 2, seed=1)),
        ),
        (Arg("fake_features", "B c h w", **LEVELS), Arg("real_features", "B c h w", **LEVELS)),
        sort="loss",
        wide=True,
        exceptions={
            "functional": "the table's rule takes one tensor",
            "gradient-real_features": DETACHED,
        },
    ),
    Part(
        "info_nce",
        function(losses.info_nce),
        given(
            queries=floats(3, 4), positives=floats(3, 4, seed=1), negatives=floats(5, 4, seed=2)
        ),
        (Arg("queries", "B D"), Arg("positives", "B D"), Arg("negatives", "N D")),
        sort="loss",
        wide=True,
    ),
    Part(
        "info_nce",
        function(losses.info_nce),
        given(
            queries=floats(3, 4), positives=floats(3, 4, seed=1), negatives=floats(3, 5, 4, seed=2)
        ),
        (Arg("queries", "B D"), Arg("positives", "B D"), Arg("negatives", "B N D", ranks=(1,))),
        sort="loss",
        case="own-negatives",
        wide=True,
    ),
    Part(
        "PatchInfoNCE",
        by_constructor(
            lambda: losses.PatchInfoNCE(
                [4, 3], embed_dim=5, num_patches=3, num_negatives=4, num_conv_blocks=1
            )
        ),
        given(
            fake_features=listed(floats(2, 4, 4, 3), floats(2, 3, 2, 2)),
            real_features=listed(floats(2, 4, 4, 3, seed=1), floats(2, 3, 2, 2, seed=1)),
            generator=seeded,
        ),
        (
            Arg("fake_features", "B c h w", fixed="c", **LEVELS),
            Arg("real_features", "B c h w", fixed="c", **LEVELS),
        ),
        sort="loss",
        exceptions={"functional": "draws positions", "gradient-real_features": DETACHED},
    ),
    Part(
        "diversity_ratio",
        function(losses.diversity_ratio),
        two_outputs,
        (*PAIR, *LATENTS),
        sort="function",
        wide=True,
        exceptions=DETACHED_LATENTS,
    ),
    Part(
        "hinge_diversity_loss",
        function(losses.hinge_diversity_loss),
        lambda: two_outputs() | {"threshold": 2.0},
        (*PAIR, *LATENTS),
        sort="loss",
        wide=True,
        exceptions=DETACHED_LATENTS,
    ),
    Part(
        "diversity_threshold",
        function(losses.diversity_threshold),
        given(features=floats(3, 2, 4, 5), latents=floats(3, 4)),
        (Arg("features", "B C H W"), Arg("latents", "B Z")),
        sort="function",
        wide=True,
        exceptions={
            "empty-batch": "needs two samples, documented",
            "gradient-features": "a constant, documented",
            "gradient-latents": "a constant, documented",
        },
    ),
    Part(
        "class_balance_weights",
        function(losses.class_balance_weights),
        given(labels=ids(2, 4, 5), num_classes=3),
        (LABELS,),
        sort="function",
    ),
    Part(
        "label_mix",
        function(losses.label_mix),
        given(
            real=floats(2, 3, 4, 5),
            fake=floats(2, 3, 4, 5, seed=1),
            labels=ids(2, 4, 5),
            num_classes=3,
            generator=seeded,
        ),
        (Arg("real", MAP), Arg("fake", MAP), LABELS),
        sort="function",
        wide=True,
        exceptions={"functional": "draws coins", "one-nan": PICKS},
    ),
    Part(
        "label_mix_loss",
        function(losses.label_mix_loss),
        given(
            mixed_logits=floats(2, 3, 4, 5),
            real_logits=floats(2, 3, 4, 5, seed=1),
            fake_logits=floats(2, 3, 4, 5, seed=2),
            mask=lambda: ids(2, 1, 4, 5, high=2)().float(),
        ),
        (
            Arg("mixed_logits", MAP),
            Arg("real_logits", MAP),
            Arg("fake_logits", MAP),
            Arg("mask", "B E H W", "mask", fixed="E"),
        ),
        sort="loss",
        wide=True,
        exceptions={"one-nan": PICKS},
    ),
)

AUGMENT = {"translation": 0.3, "cutout": 0.4, "flip": True}

DATA = (
    Part(
        "DiffAugment",
        lambda: data.DiffAugment(**AUGMENT),
        given(images=floats(2, 3, 6, 5), labels=ids(2, 6, 5), generator=seeded),
        (Arg("images", MAP), Arg("labels", "B H W", "int", optional=True)),
        sort="function",
    ),
    Part(
        "DiffAugment.apply",
        lambda: data.DiffAugment(**AUGMENT).apply,
        given(images=floats(2, 3, 6, 5), params=lambda: augment_params()),
        (Arg("images", "B C H W", fixed="B"),),
        sort="function",
        exceptions={
            "empty-batch": "the parameters are for two images",
            "meta": "the parameters hold values",
        },
    ),
    Part(
        "DiffAugment.apply_labels",
        lambda: data.DiffAugment(**AUGMENT).apply_labels,
        given(labels=ids(2, 6, 5), params=lambda: augment_params()),
        (Arg("labels", "B H W", "int", fixed="B"),),
        sort="function",
        exceptions={
            "empty-batch": "the parameters are for two images",
            "meta": "the parameters hold values",
        },
    ),
    Part(
        "instance_offsets",
        function(data.instance_offsets),
        given(instances=ids(2, 4, 5)),
        (Arg("instances", "B H W", "int"),),
        sort="function",
        exceptions={"meta": READS_VALUES},
    ),
    Part(
        "image_sampling_weights",
        function(data.image_sampling_weights),
        given(presence=lambda: ids(4, 3, high=2)() + 1),
        (Arg("presence", "I K", "real"),),
        sort="function",
        exceptions={"meta": READS_VALUES},
    ),
    Part(
        "ClassBalancedSampler",
        function(sampler),
        given(weights=lambda: floats(5)().abs()),
        (Arg("weights", "I"),),
        sort="function",
        exceptions={
            "meta": READS_VALUES,
            "nan-weights": RAISES_ON_NAN,
            "functional": NOT_DIFFERENTIABLE,
            "float64": COUNTS,
        },
    ),
    Part(
        "LabelSpec.map_ids",
        lambda: data.LabelSpec(3).map_ids,
        given(ids=ids(2, 4, 5)),
        (Arg("ids", "B H W", "int", ranks=(), plain=False),),
        sort="function",
        exceptions={"meta": READS_VALUES, "empty-axis": "any shape is a map of ids"},
    ),
    Part(
        "LabelSpec.colorize",
        lambda: data.LabelSpec(3).colorize,
        given(labels=ids(2, 4, 5)),
        (Arg("labels", "B H W", "int", ranks=(-2, 1)),),
        sort="function",
        exceptions={"meta": READS_VALUES},
    ),
)

METRICS = (
    Part(
        "l1_distance",
        function(metrics.l1_distance),
        given(images_a=floats(2, 3, 4, 5), images_b=floats(2, 3, 4, 5, seed=1)),
        (Arg("images_a", MAP), Arg("images_b", MAP)),
        sort="function",
        wide=True,
    ),
    Part(
        "pairwise_diversity",
        function(metrics.pairwise_diversity),
        given(samples=floats(3, 2, 3, 4, 5), distance=lambda: metrics.l1_distance),
        (Arg("samples", "S B C H W", fixed="C"),),
        sort="function",
        also=("l1_distance",),
    ),
    Part(
        "frechet_distance",
        function(metrics.frechet_distance),
        given(features_a=floats(5, 3), features_b=floats(6, 3, seed=1), warn_rank=False),
        (Arg("features_a", "N D"), Arg("features_b", "M D")),
        sort="function",
        exceptions={
            "meta": READS_VALUES,
            "device-features_a": READS_VALUES,
            "nan-features_a": RAISES_ON_NAN,
            "nan-features_b": RAISES_ON_NAN,
            "functional": NOT_DIFFERENTIABLE,
        },
    ),
    Part(
        "FrechetFeatureDistance.update",
        lambda: Bound(frechet_metric, frechet_sums),
        given(images=lambda: floats(2, 3, 4, 5)().tanh()),
        (Arg("images", MAP, fixed="C"),),
        sort="function",
        exceptions={
            "meta": READS_VALUES,
            "nan-images": RAISES_ON_NAN,
            "functional": NOT_DIFFERENTIABLE,
        },
    ),
    Part(
        "SegmentationConsistency.update",
        lambda: Bound(lambda: metrics.SegmentationConsistency(3), confusion),
        given(predicted=ids(2, 4, 5), labels=ids(2, 4, 5)),
        (Arg("predicted", "B H W", "int"), LABELS),
        sort="function",
        exceptions={"meta": READS_VALUES},
    ),
)

OPS = (
    Part(
        "attention",
        function(attention),
        given(q=floats(2, 5, 4), k=floats(2, 3, 4, seed=1), v=floats(2, 3, 4, seed=2)),
        (Arg("q", "B N d", ranks=(-1, 2)), Arg("k", "B T d"), Arg("v", "B T d")),
        sort="function",
    ),
    Part(
        "attention",
        function(attention),
        given(q=floats(2, 2, 5, 4), k=floats(2, 2, 3, 4, seed=1), v=floats(2, 2, 3, 4, seed=2)),
        (Arg("q", "B h N d", ranks=(1,)), Arg("k", "B h T d"), Arg("v", "B h T d")),
        sort="function",
        case="heads",
    ),
    Part(
        "inject_tokens",
        function(inject_tokens),
        given(
            features=floats(2, 4, 3, 5),
            keys=floats(2, 3, 4, seed=1),
            biases=floats(2, 3, seed=2),
            values=floats(2, 3, 4, seed=3),
        ),
        (Arg("features", MAP), Arg("keys", "B T C"), Arg("biases", "B T"), Arg("values", "B T C")),
        sort="function",
    ),
)

PARTS = (*NN, *LOSSES, *DATA, *METRICS, *OPS)

# public names that no row of the table can hold
WITHOUT_TENSORS = {
    "AdversarialTerms": "a NamedTuple of results",
    "AugmentParams": "a NamedTuple of results",
    "AugmentedBatch": "a NamedTuple of results",
    "ConditioningLevel": "a NamedTuple of results",
    "ConditioningReport": "a NamedTuple of results",
    "FeatureStatistics": "a NamedTuple of results",
    "LabelMix": "a NamedTuple of results",
    "PixelFocalTerms": "a NamedTuple of results",
    "NoiseGate": "a NamedTuple of results",
    "NoiseScale": "a NamedTuple of results",
    "NoiseSensitivity": "a NamedTuple of results",
    "SegmentationScores": "a NamedTuple of results",
    "class_presence": "takes a data set; a bad item is a DataError that names it",
    "conditioning_report": "gives plain numbers; has its own tests",
    "effective_weight": "takes a layer",
    "fold_spectral_norm_": "takes a module",
    "lpips_distance": "takes the path of a weight file; the module it builds has its own tests",
    "noise_sensitivity": "takes a module and a callable",
    "prepare_for_inference": "takes a module",
    "refresh_spectral_norm_": "takes a module",
    "spectral_normalize_": "takes a module",
}
