"""Street scenes: maps that do not depend on the look, and looks that do differ."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims_reference.data.sample import ImageDataset
from dpsims_reference.data.scenes import StreetScenes
from dpsims_reference.data.scenes.canvas import PART, Canvas
from dpsims_reference.data.scenes.noise import noise_texture
from dpsims_reference.data.scenes.street import paint_world
from dpsims_reference.data.scenes.world import sample_world

SIZES = st.tuples(st.integers(32, 72), st.integers(32, 96))
SEEDS = st.integers(0, 2**31 - 1)


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=12)
@given(size=SIZES, index=st.integers(0, 999), seed=SEEDS)
def test_contract_holds_for_any_size(size, index, seed):
    scenes = StreetScenes(1000, image_size=size)
    sample = scenes.draw(index, _generator(seed))
    assert sample.image.shape == (3, *size)
    assert sample.image.dtype == torch.float32
    assert sample.labels.shape == sample.instances.shape == size
    assert (sample.labels.dtype, sample.instances.dtype) == (torch.uint8, torch.int32)
    assert -1 <= sample.image.min() <= sample.image.max() <= 1
    assert int(sample.labels.max()) < scenes.spec.num_classes
    assert_equal(sample.image, scenes.draw(index, _generator(seed)).image)


@settings(max_examples=8)
@given(index=st.integers(0, 999), looks=st.lists(SEEDS, min_size=2, max_size=2, unique=True))
def test_one_street_has_one_map_and_many_pictures(index, looks):
    scenes = StreetScenes(1000, image_size=(48, 64))
    first, second = (scenes.render(index, look) for look in looks)
    assert_equal(first.labels, second.labels)
    assert_equal(first.instances, second.instances)
    assert (first.image - second.image).abs().mean() > 0.01


@settings(max_examples=10)
@given(index=st.integers(0, 999), size=SIZES)
def test_cheap_maps_equal_those_of_the_picture(index, size):
    scenes = StreetScenes(1000, image_size=size)
    sample = scenes.render(index, 0)
    _, canvas = scenes._paint(index, maps_only=True)
    assert_equal(torch.from_numpy(canvas.labels()), sample.labels)
    assert_equal(torch.from_numpy(canvas.instances()), sample.instances)


def test_instances_are_exactly_the_cars_and_people():
    scenes = StreetScenes(60, image_size=(64, 96))
    things = [scenes.spec.names.index(name) for name in ("car", "person")]
    found = 0
    for index in range(0, 60, 3):
        sample = scenes.view(index)
        assert_equal(sample.instances > 0, torch.isin(sample.labels, torch.tensor(things)))
        for thing in sample.instances.unique()[1:]:
            assert len(sample.labels[sample.instances == thing].unique()) == 1
            found += 1
    assert found > 40


def test_presence_names_the_classes_of_every_map():
    scenes = StreetScenes(40, image_size=(48, 64))
    presence = scenes.presence()
    for index in (0, 7, 39):
        classes = scenes.view(index).labels.long().unique()
        assert presence[index].nonzero().flatten().tolist() == classes.tolist()
    # every class occurs somewhere, sky and road almost everywhere
    assert presence.any(0).all()
    assert presence[:, [0, 2]].float().mean() > 0.9
    presence.zero_()
    assert scenes.presence().any()


def test_draws_differ_and_flip_with_their_map():
    scenes = StreetScenes(3, image_size=(32, 48))
    draws = [scenes.draw(1, _generator(seed)) for seed in range(12)]
    plain = scenes.view(1).labels
    flipped = [not torch.equal(draw.labels, plain) for draw in draws]
    assert 0 < sum(flipped) < 12
    for draw, mirrored in zip(draws, flipped, strict=True):
        assert_equal(draw.labels.flip(-1) if mirrored else draw.labels, plain)


def test_a_flipped_draw_is_the_mirrored_render():
    scenes = StreetScenes(3, image_size=(32, 48))
    for seed in range(4):
        drawn = scenes.draw(2, _generator(seed))
        look = int(torch.randint(2**31, (), generator=_generator(seed)))
        plain = scenes.render(2, look)
        mirrored = torch.equal(drawn.labels, plain.labels.flip(-1))
        for ours, theirs in zip(drawn, plain, strict=True):
            assert_equal(ours.flip(-1) if mirrored else ours, theirs)


@pytest.mark.parametrize("look", StreetScenes.look_names)
def test_every_look_renders(look):
    image = StreetScenes(4, image_size=(40, 56)).render(2, 5, look=look).image
    assert torch.isfinite(image).all()
    assert image.std() > 0.1


def test_looks_are_what_they_are_called():
    scenes = StreetScenes(30, image_size=(48, 64))
    brightness = {
        look: torch.stack([scenes.render(i, 0, look=look).image.mean() for i in range(6)]).mean()
        for look in ("noon", "night", "fog")
    }
    assert brightness["night"] < brightness["noon"] - 0.4
    contrast = [
        torch.stack([scenes.render(i, 0, look=look).image.std() for i in range(6)]).mean()
        for look in ("fog", "noon")
    ]
    assert contrast[0] < contrast[1]


def test_every_material_is_used_somewhere():
    scenes = StreetScenes(200, image_size=(64, 96))
    used = set()
    for index in range(60):
        _, canvas = scenes._paint(index, maps_only=False)
        used |= set(canvas.finish().part.ravel().tolist())
    assert used == set(PART.values())


def test_seeds_give_other_streets_and_fingerprints():
    scenes, other = (StreetScenes(5, image_size=(32, 32), seed=seed) for seed in (0, 1))
    assert scenes.fingerprint() == StreetScenes(5, image_size=(32, 32)).fingerprint()
    names = {
        scenes.fingerprint(),
        other.fingerprint(),
        StreetScenes(6, image_size=(32, 32)).fingerprint(),
        StreetScenes(5, image_size=(32, 33)).fingerprint(),
    }
    assert len(names) == 4
    assert not torch.equal(scenes.view(0).labels, other.view(0).labels)


def test_global_random_state_is_left_alone():
    import numpy as np

    scenes = StreetScenes(2, image_size=(32, 32))
    noise_texture(0.7)
    before, numpy_before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    scenes.draw(0, _generator(0))
    assert_equal(torch.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()  # noqa: NPY002


def test_a_world_without_anything_is_sky_and_ground():
    import numpy as np

    world = sample_world(np.random.default_rng(0), (64, 64))
    world = world._replace(buildings=[], things=[], hills=[], town=None, sun=None)
    canvas = Canvas((64, 64), world.camera)
    paint_world(canvas, world)
    labels = canvas.labels()
    horizon = int(world.camera.horizon)
    assert (labels[: horizon - 1] == 0).all()
    assert not (labels[horizon + 2 :] == 0).any()


def test_it_is_an_image_dataset_with_a_length():
    scenes = StreetScenes(3, image_size=(32, 32))
    assert isinstance(scenes, ImageDataset)
    assert len(scenes) == 3
    assert_equal(scenes.view(-1).labels, scenes.view(2).labels)
    with pytest.raises(IndexError, match=r"index must be in \[-3, 3\); got 3"):
        scenes.view(3)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"num_images": 0}, InputError, ("num_images must be at least 1", "got 0")),
        ({"num_images": 2.0}, DTypeError, ("num_images must be an int", "got 2.0")),
        ({"image_size": (31, 64)}, InputError, ("image_size[0] must be at least 32", "got 31")),
        ({"image_size": (64,)}, InputError, ("image_size must be (height, width)", "got (64,)")),
        ({"image_size": 64}, DTypeError, ("image_size must be a sequence", "got int")),
        ({"seed": -1}, InputError, ("seed must be at least 0", "got -1")),
    ],
    ids=["no-images", "float-count", "too-small", "one-number", "int-size", "negative-seed"],
)
def test_bad_arguments(arguments, error, parts):
    with pytest.raises(error) as caught:
        StreetScenes(**arguments)
    assert_message(caught.value, "StreetScenes: ", *parts)


def test_bad_looks():
    scenes = StreetScenes(2, image_size=(32, 32))
    with pytest.raises(InputError) as caught:
        scenes.render(0, 0, look="hail")
    assert_message(caught.value, "StreetScenes.render: look must be one of 'noon'", "got 'hail'")
    with pytest.raises(InputError, match="look_seed must be at least 0; got -1"):
        scenes.render(0, -1)
