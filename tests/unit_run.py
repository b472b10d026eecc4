"""The smallest run that has every part: procedural scenes, a random toy backbone."""

from __future__ import annotations

from dataclasses import replace

from dpsims_reference.config import Config
from dpsims_reference.presets import preset

# what StreetScenes draws
NUM_CLASSES = 12


def unit_config(*, steps: int = 4, **optim) -> Config:
    tiny = preset("tiny")
    return replace(
        tiny,
        generator=replace(
            tiny.generator, channels=(16, 16, 8, 8), pyramid_channels=8, token_dim=16, num_tokens=2
        ),
        discriminator=replace(
            tiny.discriminator,
            backbone="test_efficientnet",
            weights=None,
            pretrained=False,
            widths=(8, 8, 8, 8),
            full_res_channels=8,
            head_channels=8,
        ),
        objective=replace(tiny.objective, num_patches=8, embed_dim=8),
        # a constant rate, so that runs of different lengths begin alike
        optim=replace(tiny.optim, steps=steps, **{"final_lr": 1.0, **optim}),
        data=replace(
            tiny.data, name="scenes", num_classes=NUM_CLASSES, image_size=(32, 32), num_scenes=24
        ),
    )


def small_config(*, steps: int = 4, num_scenes: int = 10, **optim) -> Config:
    """Every part of :func:`unit_config` in fewer layers: for tests of many steps."""
    unit = unit_config(steps=steps, **{"batch_size": 2, **optim})
    return replace(
        unit,
        generator=replace(
            unit.generator, channels=(8, 8, 8), spade_hidden=None, self_attention=False
        ),
        discriminator=replace(unit.discriminator, widths=(4, 4, 4, 4)),
        data=replace(unit.data, num_scenes=num_scenes),
    )
