"""DiffAugment: images and label maps move together, and gradients are exact."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message

from dpsims.data import AugmentParams, DiffAugment
from dpsims.errors import InputError

OFF = {"color": False, "translation": 0.0, "cutout": 0.0, "flip": False}


@st.composite
def batches(draw):
    """float64 images, none 0, and label maps of the same size."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    sizes = st.integers(1, 9)
    batch, height, width = draw(st.integers(1, 3)), draw(sizes), draw(sizes)
    images = torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64) + 0.5
    labels = torch.randint(7, (batch, height, width), generator=generator)
    return images, labels


@st.composite
def policies(draw):
    share = st.sampled_from([0.0, 0.125, 0.5, 1.0])
    return DiffAugment(
        color=draw(st.booleans()),
        translation=draw(share),
        cutout=draw(share),
        flip=draw(st.booleans()),
    )


def draws(seed, batch):
    return DiffAugment().sample(batch, generator=torch.Generator().manual_seed(seed))


def fixed(batch=1, flip=False, color=(0.5, 0.5, 0.5), shift=(0.5, 0.5), hole=(0.5, 0.5)):
    """Parameters by hand; a half is the middle of every range."""
    columns = [torch.tensor(x)[:, None].expand(-1, batch) for x in (color, shift, hole)]
    return AugmentParams(torch.full((batch,), flip), *columns)


def oracle_color(images, params):
    """Brightness, saturation, contrast with python loops over images."""
    out = []
    for image, (b, s, c) in zip(images.numpy(), params.color.double().numpy().T, strict=True):
        image = image + (b - 0.5)
        grey = image.mean(0, keepdims=True)
        image = grey + 2 * s * (image - grey)
        out.append(image.mean() + (0.5 + c) * (image - image.mean()))
    return torch.from_numpy(np.stack(out))


def oracle_move(augment, maps, params, fill):
    """Flip, shift and cut with python loops over pixels."""
    batch, _, height, width = maps.shape
    out = torch.full_like(maps, fill)
    for i in range(batch):
        source = maps[i].flip(-1) if augment.flip and params.flip[i] else maps[i]
        shift, cut = [], []
        for size, move, centre in zip(
            (height, width), params.shift[:, i], params.hole[:, i], strict=True
        ):
            reach = int(size * augment.translation + 0.5)
            shift.append(int(np.floor(move.item() * (2 * reach + 1))) - reach)
            side = int(size * augment.cutout + 0.5)
            start = int(np.floor(centre.item() * size)) - side // 2
            cut.append(range(start, start + side))
        for y in range(height):
            for x in range(width):
                from_y, from_x = y - shift[0], x - shift[1]
                inside = 0 <= from_y < height and 0 <= from_x < width
                if inside and not (y in cut[0] and x in cut[1]):
                    out[i, :, y, x] = source[:, from_y, from_x]
    return out


@given(batches(), policies(), st.integers(0, 2**20))
def test_equals_loops(batch, augment, seed):
    images, labels = batch
    params = draws(seed, len(images))
    colored = oracle_color(images, params) if augment.color else images
    assert_close64(augment.apply(params, images), oracle_move(augment, colored, params, 0))
    expected = oracle_move(augment, labels[:, None], params, 255)[:, 0]
    assert_equal(augment.apply_labels(params, labels), expected)


@given(batches(), policies(), st.integers(0, 2**20))
def test_images_and_labels_move_together(batch, augment, seed):
    _, labels = batch
    # the label map drawn as an image: colour has to be off for its values to be ids
    plain = copy.copy(augment)
    plain.color = False
    images = labels[:, None].expand(-1, 3, -1, -1).double() + 1
    out = plain(images, labels, generator=torch.Generator().manual_seed(seed))
    painted = torch.where(out.labels == 255, 0, out.labels + 1)
    assert_equal(out.images[:, 0], painted.double())
    colored = augment(images, labels, generator=torch.Generator().manual_seed(seed))
    assert_equal(colored.labels, out.labels)


@given(batches(), policies(), st.integers(0, 2**20))
def test_one_draw_changes_all_batches_alike(batch, augment, seed):
    images, labels = batch
    params = draws(seed, len(images))
    whole = augment(images, labels, generator=torch.Generator().manual_seed(seed))
    assert_equal(whole.images, augment.apply(params, images))
    assert_equal(whole.labels, augment.apply_labels(params, labels))
    alone = [
        augment.apply(AugmentParams(*(x[..., i : i + 1] for x in params)), images[i : i + 1])
        for i in range(len(images))
    ]
    assert_close64(torch.cat(alone), whole.images)


@given(batches(), st.integers(0, 2**20))
def test_nothing_on_changes_nothing(batch, seed):
    images, labels = batch
    augment = DiffAugment(**OFF, ignore_index=None)
    out = augment(images, labels, generator=torch.Generator().manual_seed(seed))
    assert_equal(out.images, images)
    assert_equal(out.labels, labels)


@given(batches())
def test_the_middle_of_every_range_changes_nothing(batch):
    images, _ = batch
    augment = DiffAugment(translation=0.5, cutout=0.0, flip=True)
    assert_close64(augment.apply(fixed(len(images)), images), images)


@given(batches())
def test_two_flips_are_none(batch):
    images, labels = batch
    augment = DiffAugment(**(OFF | {"flip": True}))
    params = fixed(len(images), flip=True)
    assert_equal(augment.apply(params, images), images.flip(-1))
    assert_equal(augment.apply_labels(params, augment.apply_labels(params, labels)), labels)


def test_colour_at_the_ends_of_its_ranges():
    images = torch.rand(1, 3, 4, 5, dtype=torch.float64)
    augment = DiffAugment(**(OFF | {"color": True}))
    brighter = augment.apply(fixed(color=(1.0, 0.5, 0.5)), images)
    assert_close64(brighter, images + 0.5)
    grey = augment.apply(fixed(color=(0.5, 0.0, 0.5)), images)
    assert_close64(grey, images.mean(1, keepdim=True).expand_as(images))
    flat = augment.apply(fixed(color=(0.5, 0.5, 0.0)), images)
    assert_close64(flat.std(), images.std() / 2)
    assert_close64(flat.mean(), images.mean())


def test_shifts_and_holes_reach_both_ends_evenly():
    augment = DiffAugment(**(OFF | {"translation": 0.25}))
    ramp = torch.arange(1.0, 9.0).view(1, 1, 1, 8)
    first = [
        augment.apply(fixed(shift=(0.5, draw)), ramp)[0, 0, 0].tolist()
        for draw in (0.0, 1 - 2**-24)
    ]
    assert first == [[3, 4, 5, 6, 7, 8, 0, 0], [0, 0, 1, 2, 3, 4, 5, 6]]
    params = DiffAugment().sample(5000, generator=torch.Generator().manual_seed(0))
    moved = augment.apply(params, ramp.expand(5000, 1, 1, 8))[:, 0, 0, 2]
    # five shifts, each 1000 times, with a deviation of 28
    counts = torch.bincount(moved.long(), minlength=6)[1:6]
    assert counts.sum() == 5000
    assert (counts - 1000).abs().max() < 150


def test_a_hole_is_a_window_of_its_size():
    augment = DiffAugment(**(OFF | {"cutout": 0.5}))
    out = augment.apply(fixed(), torch.ones(1, 1, 8, 6))[0, 0]
    assert (out == 0).sum() == 4 * 3
    assert (out[2:6, 2:5] == 0).all()
    corner = augment.apply(fixed(hole=(0.0, 0.0)), torch.ones(1, 1, 8, 6))[0, 0]
    # the centre is the first pixel; what lies outside is cropped
    assert (corner == 0).sum() == 2 * 2


def test_maps_of_another_resolution_move_in_proportion():
    augment = DiffAugment(translation=0.25, cutout=0.5, flip=True)
    params = draws(5, 4)
    coarse = torch.randint(0, 5, (4, 8, 8))
    fine = coarse.repeat_interleave(4, 1).repeat_interleave(4, 2)
    small, large = augment.apply_labels(params, coarse), augment.apply_labels(params, fine)
    same = (large == small.repeat_interleave(4, 1).repeat_interleave(4, 2)).double().mean()
    # a shift of one small pixel at most: the borders differ, most of the map does not
    assert same > 0.5


def test_gradcheck():
    augment = DiffAugment(translation=0.3, cutout=0.4, flip=True)
    params = draws(3, 2)
    images = torch.randn(2, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    run = lambda x: augment.apply(params, x)  # noqa: E731
    assert torch.autograd.gradcheck(run, (images,), fast_mode=False)
    assert torch.autograd.gradgradcheck(lambda x: run(x).square(), (images,), fast_mode=False)


def test_the_gradient_is_0_where_pixels_are_lost():
    augment = DiffAugment(color=False, translation=0.3, cutout=0.5, flip=True)
    params = draws(1, 3)
    images = torch.randn(3, 2, 9, 7, dtype=torch.float64, requires_grad=True)
    out = augment.apply(params, images)
    (slope,) = torch.autograd.grad(out.sum(), images)
    # every pixel that is still there counts once
    assert set(slope.unique().tolist()) == {0.0, 1.0}
    assert slope.sum() == (out != 0).sum()


def test_what_is_cut_away_may_be_infinite():
    augment = DiffAugment(**(OFF | {"cutout": 1.0}))
    images = torch.full((1, 1, 3, 3), torch.inf, requires_grad=True)
    out = augment.apply(fixed(), images)
    (slope,) = torch.autograd.grad(out.sum(), images)
    assert not out.any()
    assert not slope.any()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64], ids=str)
def test_every_dtype_of_labels(dtype):
    augment = DiffAugment(cutout=1.0)
    labels = torch.zeros(1, 3, 3, dtype=dtype)
    out = augment.apply_labels(fixed(), labels)
    assert out.dtype == dtype
    assert (out == 255).all()
    signed = DiffAugment(cutout=1.0, ignore_index=-1)
    if dtype == torch.uint8:
        with pytest.raises(InputError) as caught:
            signed.apply_labels(fixed(), labels)
        assert_message(caught.value, "ignore_index must fit labels of dtype torch.uint8", "got -1")
    else:
        assert (signed.apply_labels(fixed(), labels) == -1).all()


def test_ids_are_needed_only_where_labels_lose_pixels():
    labels = torch.zeros(1, 3, 3, dtype=torch.uint8)
    for options in ({"translation": 0.5}, {"cutout": 0.5}):
        with pytest.raises(InputError) as caught:
            DiffAugment(**(OFF | options), ignore_index=None)(torch.zeros(1, 3, 3, 3), labels)
        assert_message(caught.value, "DiffAugment: ignore_index must be an id", "got None")
    DiffAugment(**(OFF | {"flip": True}), ignore_index=None).apply_labels(fixed(), labels)
    DiffAugment(**(OFF | {"flip": True}), ignore_index=-1).apply_labels(fixed(), labels)


def test_randomness_comes_from_the_generator_alone():
    images = torch.randn(4, 3, 8, 8)
    augment = DiffAugment(flip=True)
    state = torch.get_rng_state()
    first = augment(images, generator=torch.Generator().manual_seed(1)).images
    assert_equal(torch.get_rng_state(), state)
    torch.rand(3)
    assert_equal(augment(images, generator=torch.Generator().manual_seed(1)).images, first)
    other = augment(images, generator=torch.Generator().manual_seed(2)).images
    assert not torch.equal(other, first)
    # without one, torch's default generator
    torch.manual_seed(1)
    assert_equal(augment(images).images, first)


def test_options_do_not_change_each_others_draws():
    images = torch.randn(4, 3, 8, 8)
    with_all, with_flip = DiffAugment(flip=True), DiffAugment(**(OFF | {"flip": True}))
    params = [
        a.sample(4, generator=torch.Generator().manual_seed(7)) for a in (with_all, with_flip)
    ]
    for one, other in zip(*params, strict=True):
        assert_equal(one, other)
    assert augmented_without_labels(with_flip, images) is None


def augmented_without_labels(augment, images):
    return augment(images).labels


def test_parameters_of_other_images():
    augment = DiffAugment()
    with pytest.raises(InputError) as caught:
        augment.apply(fixed(2), torch.zeros(3, 3, 4, 4))
    assert_message(caught.value, "DiffAugment.apply: images must have shape (B=2", "(3, 3, 4, 4)")
    with pytest.raises(InputError) as caught:
        augment.apply_labels(fixed(1), torch.zeros(1, 4, 4, dtype=torch.long, device="meta"))
    assert_message(caught.value, "DiffAugment.apply_labels: labels must be on device", "meta")


def test_copies_and_repr():
    augment = DiffAugment(color=False, translation=0.25, ignore_index=None)
    for other in (copy.deepcopy(augment), pickle.loads(pickle.dumps(augment))):
        assert repr(other) == repr(augment)
    assert "translation=0.25" in repr(augment)


def test_meta_parameters():
    augment = DiffAugment()
    params = augment.sample(2, device="meta")
    assert augment.apply(params, torch.zeros(2, 3, 5, 4, device="meta")).shape == (2, 3, 5, 4)
    drawn = augment.sample(2, device="meta", generator=torch.Generator().manual_seed(0))
    assert drawn.color.is_meta


@pytest.mark.compile
def test_compiled_equals_eager():
    augment = DiffAugment(flip=True)
    params = draws(2, 2)
    images, labels = torch.randn(2, 3, 8, 8), torch.randint(0, 4, (2, 8, 8))

    def both(images, labels):
        return augment.apply(params, images), augment.apply_labels(params, labels)

    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    for one, other in zip(compiled(images, labels), both(images, labels), strict=True):
        torch.testing.assert_close(one, other)
