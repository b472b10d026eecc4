import dataclasses
import json

import pytest
from support import assert_message

from dpsims.errors import InputError
from dpsims_reference.config import Config, OptimConfig
from dpsims_reference.config_json import from_dict, to_dict
from dpsims_reference.presets import PRESETS, preset


@pytest.mark.parametrize("name", PRESETS)
def test_dict_round_trip_through_json(name):
    config = preset(name)
    assert from_dict(Config, json.loads(json.dumps(to_dict(config)))) == config


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"optim": {"learning_rate": 1.0}}, ["config.optim", "learning_rate"]),
        ({"optim": {"lr": "fast"}}, ["config.optim.lr", "'fast'"]),
        ({"optim": {"steps": True}}, ["config.optim.steps", "True"]),
        ({"optim": {"betas": [0.0]}}, ["config.optim.betas", "[0.0]"]),
        ({"optim": {"pairs": "triplets"}}, ["config.optim.pairs", "'triplets'"]),
        ({"optim": 3}, ["config.optim", "int"]),
        ({"nets": {}}, ["config", "nets"]),
    ],
)
def test_bad_values_name_their_key(change, parts):
    with pytest.raises(InputError) as caught:
        from_dict(Config, change)
    assert_message(caught.value, *parts)


def test_a_whole_number_is_a_float():
    assert from_dict(OptimConfig, {"betas": [0, 0.99]}).betas == (0.0, 0.99)


def test_every_setting_is_documented():
    import inspect

    from dpsims_reference import config as module

    for kind in vars(module).values():
        if inspect.isclass(kind) and dataclasses.is_dataclass(kind):
            source = inspect.getsource(kind)
            for field in dataclasses.fields(kind):
                after = source.split(f"    {field.name}:", 1)[1].split("\n", 1)[1].lstrip()
                assert after.startswith('"""'), f"{kind.__name__}.{field.name} has no docstring"


def test_presets_hold_the_papers_numbers():
    # Sec. 4.1, Tables S2 and S3
    for name, classes, size, instances in (
        ("ade20k", 151, (256, 256), False),
        ("coco_stuff", 183, (256, 256), True),
        ("cityscapes", 35, (256, 512), True),
    ):
        config = preset(name)
        assert (config.data.num_classes, config.data.image_size) == (classes, size)
        assert config.data.instances is instances
        assert config.generator.channels == (1024, 1024, 1024, 512, 256, 128, 64)
        assert (config.generator.latent_dim, config.generator.token_dim) == (64, 256)
        assert (config.optim.lr, config.optim.betas) == (1e-3, (0.0, 0.99))
        assert (config.optim.batch_size, config.optim.ema_decay) == (64, 0.9999)
        objective = config.objective
        assert (objective.gan_weight, objective.contrastive_weight) == (1.0, 100.0)
        assert (objective.diversity_weight, objective.temperature) == (10.0, 0.3)
        assert (objective.num_patches, objective.embed_dim) == (128, 256)
        assert objective.focal_gamma == 2.0
        assert config.discriminator.full_res_channels == 128
        assert config.discriminator.head_channels == 256


def test_unknown_preset_lists_the_known_ones():
    with pytest.raises(InputError) as caught:
        preset("imagenet")
    assert_message(caught.value, "name", "'tiny'", "'imagenet'")
