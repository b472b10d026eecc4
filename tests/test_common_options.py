"""What holds for every option of every public callable: a bad one is refused at once, by name."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from rules_table import PARTS, WITHOUT_TENSORS, frechet_metric

from dpsims import data, losses, metrics, nn as parts
from dpsims.errors import BackboneError, DTypeError, InputError
from dpsims.ops.attention import attention, inject_tokens

NAN, INF = math.nan, math.inf
NOT_A_NUMBER = {"true": True, "text": "3", "none": None, "list": [1], "tensor": torch.ones(40, 40)}
NOT_AN_INT = {**NOT_A_NUMBER, "float": 1.5, "whole-float": 1.0, "nan": NAN, "inf": INF}
NOT_FINITE = {"nan": NAN, "inf": INF, "minus-inf": -INF}

# bad values of every kind of option
INT = {**NOT_AN_INT, "zero": 0, "negative": -1}
INT_FROM_0 = {**NOT_AN_INT, "negative": -1}
ANY_INT = NOT_AN_INT
POSITIVE = {**NOT_A_NUMBER, **NOT_FINITE, "zero": 0.0, "negative": -0.5}
FROM_0 = {**NOT_A_NUMBER, **NOT_FINITE, "negative": -0.5}
BELOW_1 = {**FROM_0, "one": 1.0}
UP_TO_1 = {**FROM_0, "two": 2.0}
BOOL = {"one": 1, "zero": 0, "text": "yes", "none": None, "tensor": torch.tensor(True)}
CHOICE = {"unknown": "no such", "long": "x" * 2000, "none": None, "int": 3, "list": ["batch"]}
INTS = {
    "empty": [],
    "zero": [0],
    "true": [True],
    "float": [1.5],
    "int": 3,
    "text": "12",
    "none": None,
}
GENERATOR = {"int": 3, "text": "x"}


def or_none(bad: dict[str, Any]) -> dict[str, Any]:
    return {text: value for text, value in bad.items() if value is not None}


@dataclass(frozen=True)
class Options:
    """The options of one callable, and how to call it with one of them changed."""

    name: str
    call: Callable[..., Any]
    bad: dict[str, dict[str, Any]]
    also: tuple[str, ...] = ()


def with_inputs(name: str, case: str = "") -> Callable[..., Any]:
    part = next(p for p in PARTS if (p.name, p.case) == (name, case))
    return lambda **options: part.make()(**(part.inputs() | options))


def with_sizes(make: Callable[..., Any], **sizes: Any) -> Callable[..., Any]:
    return lambda **options: make(**(sizes | options))


IGNORE = {"ignore_index": or_none(ANY_INT)}
SPADE_OPTIONS = {
    "cond_channels": INT,
    "hidden_channels": or_none(INT),
    "kernel_size": {**INT, "even": 2},
    "norm": CHOICE,
    **IGNORE,
}
ATTENTION = {"attn_dim": or_none(INT), "impl": {**CHOICE, "fused": "fused"}}
FOCAL = {"gamma": FROM_0, "label_smoothing": BELOW_1, **IGNORE}

OPTIONS = (
    Options("sphere_normalize", with_inputs("sphere_normalize"), {"radius": or_none(POSITIVE)}),
    Options(
        "NoiseMapper",
        with_sizes(parts.NoiseMapper, latent_dim=3, token_dim=2),
        {
            "latent_dim": INT,
            "token_dim": INT,
            "num_tokens": INT,
            "depth": INT,
            "radius": or_none(POSITIVE),
        },
    ),
    Options(
        "CrossAttentionNoiseInjector",
        with_sizes(parts.CrossAttentionNoiseInjector, channels=4, token_dim=3),
        {"channels": INT, "token_dim": INT, "attn_dim": or_none(INT), "impl": CHOICE},
        also=("attention",),
    ),
    Options(
        "SelfAttention2d",
        with_sizes(parts.SelfAttention2d, channels=4),
        {"channels": INT, **ATTENTION},
        also=("attention",),
    ),
    Options("attention", with_inputs("attention"), {"impl": {**CHOICE, "fused": "fused"}}),
    Options("inject_tokens", with_inputs("inject_tokens"), {"impl": {**CHOICE, "fused": "fused"}}),
    Options(
        "SPADE",
        with_sizes(parts.SPADE, channels=2, cond_channels=2, hidden_channels=2),
        {"channels": INT, **SPADE_OPTIONS},
    ),
    Options(
        "SPADEResBlock",
        with_sizes(
            parts.SPADEResBlock, in_channels=2, out_channels=3, cond_channels=2, hidden_channels=2
        ),
        {"in_channels": INT, "out_channels": INT, **SPADE_OPTIONS},
        also=("SPADE",),
    ),
    Options("joined_conv2d", with_inputs("joined_conv2d"), IGNORE),
    Options(
        "LabelConv2d",
        with_sizes(parts.LabelConv2d, num_classes=3, out_channels=2),
        {
            "num_classes": {**INT, "more-than-int16": 2**15 - 1},
            "out_channels": INT,
            "kernel_size": INT,
            "stride": INT,
            "extra_channels": INT_FROM_0,
            "bias": BOOL,
            **IGNORE,
        },
    ),
    Options(
        "resize_labels",
        with_inputs("resize_labels"),
        {"size": {**INTS, "one": [3], "three": [3, 3, 3]}},
    ),
    Options(
        "LabelMapPyramid",
        with_sizes(
            parts.LabelMapPyramid,
            num_classes=3,
            channels=2,
            token_dim=3,
            num_levels=2,
            image_size=8,
        ),
        {
            "num_classes": INT,
            "channels": INT,
            "token_dim": INT,
            "num_levels": INT,
            "image_size": {**INT, "odd": 7},
            "attention_size": INT_FROM_0,
            "extra_channels": INT_FROM_0,
            "norm": CHOICE,
            "self_attention": BOOL,
            "cross_attention": BOOL,
            **ATTENTION,
            **IGNORE,
        },
        also=("LabelConv2d", "CrossAttentionNoiseInjector", "SelfAttention2d", "attention"),
    ),
    Options(
        "FeatureConditioner",
        with_sizes(parts.FeatureConditioner, channels=2),
        {"channels": INT, "nonlinearity": CHOICE, "norm": CHOICE},
    ),
    Options(
        "BatchNorm2d",
        with_sizes(parts.BatchNorm2d, channels=2),
        {
            "channels": INT,
            "affine": BOOL,
            "momentum": or_none(UP_TO_1),
            "eps": POSITIVE,
            "sync": BOOL,
        },
    ),
    Options(
        "ConditionedBackbone",
        with_sizes(parts.ConditionedBackbone, model="test_resnet", pretrained=False),
        {
            "model": {"unknown": "no_such_model", "none": None, "int": 3},
            "pretrained": BOOL,
            "out_indices": {
                "empty": [],
                "float": [1.5],
                "true": [True],
                "int": 3,
                "text": "12",
                "too-low": [-9],
                "too-high": [99],
                "twice": [1, 1],
                "unsorted": [2, 1],
            },
            "num_levels": {**INT, "too-many": 50},
            "weights": {"int": 3, "list": []},
            "value_range": {
                "reversed": (1, -1),
                "equal": (1, 1),
                "nan": (NAN, 1),
                "inf": (-1, INF),
                "one": (1,),
                "int": 3,
                "text": "01",
                "none": None,
            },
            "nonlinearity": CHOICE,
            "norm": CHOICE,
            "frozen": BOOL,
            "input_size": {**or_none(INTS), "one": [64]},
        },
        also=("FeatureConditioner",),
    ),
    Options(
        "UNetDecoder",
        with_sizes(
            parts.UNetDecoder,
            channels=[2],
            reductions=[4],
            num_outputs=3,
            full_res_channels=2,
            head_channels=2,
        ),
        {
            "channels": INTS,
            "reductions": {**INTS, "longer": [4, 8]},
            "num_outputs": INT,
            "full_res_channels": INT,
            "head_channels": INT,
            "checkpoint": BOOL,
            "widths": {**or_none(INTS), "longer": [2, 2]},
        },
    ),
    Options(
        "CrossChannelMixing",
        with_sizes(parts.CrossChannelMixing, channels=[2], out_channels=2),
        {"channels": INTS, "out_channels": INT, "expand": BOOL},
    ),
    Options(
        "CrossScaleMixing", with_sizes(parts.CrossScaleMixing, channels=[2]), {"channels": INTS}
    ),
    Options(
        "ProjectedDiscriminator",
        with_sizes(
            parts.ProjectedDiscriminator,
            backbone=parts.ConditionedBackbone("test_resnet", pretrained=False),
            head_channels=2,
        ),
        {
            "backbone": {"int": 3, "none": None, "text": "x", "module": torch.nn.Identity()},
            "num_classes": INT_FROM_0,
            "heads": CHOICE,
            "head_channels": INT,
            "mixing": CHOICE,
            "mixing_channels": INT,
            "mixing_expand": BOOL,
            "levels": {
                **or_none(INTS),
                "zero": [0, 0],
                "too-high": [4],
                "unsorted": [2, 1],
            },
            "spectral_norm": BOOL,
        },
    ),
    Options(
        "refresh_spectral_norm_",
        with_sizes(parts.refresh_spectral_norm_, module=torch.nn.Linear(2, 2)),
        {"module": {"int": 3, "none": None}, "iterations": INT},
    ),
    Options(
        "spectral_normalize_",
        lambda **options: parts.spectral_normalize_(
            **({"module": torch.nn.Linear(2, 2)} | options)
        ),
        {
            "module": {"int": 3, "none": None},
            "skip": {"ints": [3], "int": 3, "none": None},
            "generator": GENERATOR,
        },
    ),
    Options(
        "fold_spectral_norm_", parts.fold_spectral_norm_, {"module": {"int": 3, "none": None}}
    ),
    Options(
        "prepare_for_inference",
        parts.prepare_for_inference,
        {"module": {"int": 3, "none": None}},
    ),
    Options(
        "effective_weight",
        parts.effective_weight,
        {"layer": {"int": 3, "none": None, "no-weight": torch.nn.ReLU()}},
    ),
    Options(
        "pixel_focal_loss",
        with_inputs("pixel_focal_loss"),
        {**FOCAL, "reduction": CHOICE, "impl": CHOICE, "inplace": BOOL},
    ),
    Options(
        "PixelFocalLoss",
        with_sizes(losses.PixelFocalLoss, num_classes=3),
        {
            "num_classes": INT,
            "balanced": BOOL,
            "mask_fake": BOOL,
            "reduction": CHOICE,
            "sync": BOOL,
            "impl": CHOICE,
            "inplace": BOOL,
            **FOCAL,
        },
    ),
    Options(
        "AdversarialLoss",
        losses.AdversarialLoss,
        {
            "kind": CHOICE,
            "label_smoothing": {**BELOW_1, "with-hinge": 0.1},
            "r1_weight": FROM_0,
            "r1_interval": INT,
            "pixel_loss": {"int": 3, "text": "x", "with-hinge": losses.PixelFocalLoss(2)},
        },
    ),
    Options(
        "r1_penalty",
        lambda **options: losses.r1_penalty(
            **(
                {"logits": torch.zeros(2), "images": torch.zeros(2, 1, 2, 2, requires_grad=True)}
                | options
            )
        ),
        {
            "logits": {
                "int": 3,
                "none": None,
                "empty": [],
                "not-of-the-images": torch.zeros(2),
                "batch": torch.zeros(3),
                "scalar": torch.zeros(()),
            },
            "weight": FROM_0,
        },
    ),
    Options(
        "feature_matching_loss",
        with_inputs("feature_matching_loss"),
        {
            "paired": BOOL,
            "level_weights": {
                "int": 3,
                "text": "12",
                "short": [1.0],
                "negative": [1.0, -1.0],
                "nan": [NAN, 1.0],
                "true": [True, 1.0],
            },
        },
    ),
    Options(
        "info_nce",
        with_inputs("info_nce"),
        {"temperature": POSITIVE, "normalize": BOOL, "reduction": CHOICE},
    ),
    Options(
        "PatchInfoNCE",
        with_sizes(losses.PatchInfoNCE, channels=[2], embed_dim=2, num_conv_blocks=1),
        {
            "channels": INTS,
            "embed_dim": INT,
            "num_patches": INT,
            "num_negatives": INT,
            "temperature": POSITIVE,
            "normalize": BOOL,
            "num_conv_blocks": INT_FROM_0,
        },
    ),
    Options("PatchInfoNCE", with_inputs("PatchInfoNCE"), {"generator": GENERATOR}),
    Options("diversity_ratio", with_inputs("diversity_ratio"), {"norm": CHOICE}),
    Options(
        "hinge_diversity_loss",
        with_inputs("hinge_diversity_loss"),
        {"threshold": FROM_0, "norm": CHOICE},
    ),
    Options(
        "diversity_threshold",
        with_inputs("diversity_threshold"),
        {"norm": CHOICE, "as_printed": BOOL},
    ),
    Options(
        "class_balance_weights",
        with_inputs("class_balance_weights"),
        {
            "num_classes": INT,
            "sync": BOOL,
            "dtype": {"half": torch.float16, "int": torch.int64, "text": "float32", "none": None},
            **IGNORE,
        },
    ),
    Options(
        "label_mix",
        with_inputs("label_mix"),
        {"num_classes": INT, "generator": GENERATOR, **IGNORE},
    ),
    Options("DiffAugment", with_inputs("DiffAugment"), {"generator": GENERATOR}),
    Options(
        "DiffAugment",
        data.DiffAugment,
        {"color": BOOL, "translation": UP_TO_1, "cutout": UP_TO_1, "flip": BOOL, **IGNORE},
    ),
    Options(
        "DiffAugment.sample",
        with_sizes(data.DiffAugment().sample, batch_size=2),
        {"batch_size": INT_FROM_0, "generator": GENERATOR},
    ),
    Options(
        "DiffAugment.apply",
        with_sizes(data.DiffAugment().apply, images=torch.zeros(2, 3, 4, 4)),
        {"params": {"int": 3, "none": None, "tuple": (1, 2)}},
    ),
    Options(
        "instance_offsets",
        with_inputs("instance_offsets"),
        {"background": ANY_INT, "normalize": BOOL},
    ),
    Options("image_sampling_weights", with_inputs("image_sampling_weights"), {"empty": CHOICE}),
    Options(
        "ClassBalancedSampler",
        with_sizes(data.ClassBalancedSampler, weights=torch.ones(5), rank=0, world_size=2),
        {
            "num_samples": or_none(INT),
            "seed": ANY_INT,
            "rank": INT_FROM_0 | {"too-high": 2},
            "world_size": INT,
            "auto_epoch": BOOL,
        },
    ),
    Options(
        "class_presence",
        with_sizes(
            data.class_presence, dataset=[torch.zeros(2, 2, dtype=torch.long)], num_classes=3
        ),
        {
            "dataset": {"empty": [], "int": 3, "none": None},
            "num_classes": INT,
            "ignore_index": ANY_INT,
            "labels_of": {"int": 3},
            "cache": {"int": 3},
            "fingerprint": {"int": 3},
            "save_every": INT,
            "progress": {"int": 3},
            "workers": INT_FROM_0,
        },
    ),
    Options(
        "LabelSpec",
        with_sizes(data.LabelSpec, num_classes=2),
        {
            "num_classes": {**INT, "huge": 10**9},
            "ignore_index": ANY_INT,
            "id_map": {"empty": {}, "list": [1], "text-key": {"1": 1}, "out-of-range": {1: 7}},
            "names": {"text": "ab", "short": ["a"], "ints": [1, 2]},
            "palette": {"int": 3, "short": [(0, 0, 0)], "range": [(0, 0, 0), (0, 0, 256)]},
        },
    ),
    Options(
        "pairwise_diversity",
        with_inputs("pairwise_diversity"),
        {"distance": {"int": 3, "none": None, "text": "l1"}},
    ),
    Options(
        "noise_sensitivity",
        with_sizes(
            metrics.noise_sensitivity,
            generator=torch.nn.Identity(),
            render=lambda _: torch.zeros(1, 3, 2, 2),
        ),
        {
            "generator": {"int": 3, "function": len},
            "render": {"int": 3, "none": None},
            "num_noises": {**INT, "one": 1},
            "layers": {"unknown": ["no such"]},
            "distance": {"int": 3, "none": None, "text": "l1"},
        },
    ),
    Options(
        "conditioning_report",
        with_sizes(
            metrics.conditioning_report,
            backbone=parts.ConditionedBackbone("test_resnet", pretrained=False),
            images=torch.zeros(1, 3, 32, 32),
        ),
        {
            "backbone": {"int": 3, "none": None, "other-module": torch.nn.Identity()},
            "images": {"int": 3, "none": None, "gray": torch.zeros(1, 1, 32, 32)},
        },
    ),
    Options("lpips_distance", metrics.lpips_distance, {"net": CHOICE, "weights": {"int": 3}}),
    Options("frechet_distance", with_inputs("frechet_distance"), {"warn_rank": BOOL}),
    Options(
        "FrechetFeatureDistance",
        with_sizes(
            metrics.FrechetFeatureDistance,
            extractor=torch.nn.Flatten(),
            name="pixels",
            num_features=12,
        ),
        {
            "extractor": {"int": 3, "none": None, "function": len},
            "name": {"empty": "", "int": 3, "none": None},
            "num_features": INT,
            "warn_rank": BOOL,
        },
    ),
    Options(
        "FrechetFeatureDistance.update",
        lambda **options: frechet_metric().update(
            **({"images": torch.zeros(2, 3, 2, 2), "real": True} | options)
        ),
        {"real": BOOL},
    ),
    Options(
        "SegmentationConsistency",
        with_sizes(metrics.SegmentationConsistency, num_classes=3),
        {"num_classes": {**INT, "one": 1}, "ignore_index": ANY_INT},
    ),
)


def _cases() -> list[Any]:
    return [
        pytest.param(row, option, value, id=f"{row.name}-{option}-{text}")
        for row in OPTIONS
        for option, values in row.bad.items()
        for text, value in values.items()
    ]


@pytest.mark.parametrize(("row", "option", "value"), _cases())
def test_a_bad_option_is_refused_by_name(row, option, value):
    with pytest.raises((InputError, DTypeError, BackboneError)) as caught:
        row.call(**{option: value})
    text = str(caught.value)
    owner = "|".join(map(re.escape, (row.name, *row.also)))
    assert re.match(rf"({owner}): [^;]*\b{option}\b[^;]* must .+; got .+", text, re.DOTALL), text
    assert len(text) < 500


def test_every_option_of_every_public_callable_is_in_a_table():
    tensors = {(p.name.partition(".")[0], arg.name) for p in PARTS for arg in p.args}
    tested = {(row.name, option) for row in OPTIONS for option in row.bad}
    missing = []
    operators = {"attention": attention, "inject_tokens": inject_tokens}
    homes = dict(operators)
    for package in (parts, losses, data, metrics):
        homes |= vars(package)
    for name in {p.name.partition(".")[0] for p in PARTS} | set(WITHOUT_TENSORS):
        value = operators.get(name, homes[name])
        if isinstance(value, type) and issubclass(value, tuple):
            continue
        missing += [
            (name, option)
            for option in inspect.signature(value).parameters
            if (name, option) not in tensors | tested
        ]
    assert missing == []
