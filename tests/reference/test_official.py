"""What the three official data sets share, each on a small copy of its folders."""

from __future__ import annotations

import pickle
import random
import re
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from official_folders import (
    ADE_IDS,
    CITYSCAPES_IDS,
    COCO_IDS,
    LEVEL,
    write_ade20k,
    write_cityscapes,
    write_coco_stuff,
)
from PIL import Image
from support import assert_equal, assert_message

from dpsims.errors import DataError, DTypeError, InputError
from dpsims_reference.data import ade20k, cityscapes, coco_stuff
from dpsims_reference.data.ade20k import ADE20K
from dpsims_reference.data.cityscapes import Cityscapes
from dpsims_reference.data.coco_stuff import COCOStuff
from dpsims_reference.data.paired import PresenceScan
from dpsims_reference.data.sample import ImageDataset

KINDS = {"ade20k": ADE20K, "coco_stuff": COCOStuff, "cityscapes": Cityscapes}
WRITERS = {
    "ade20k": write_ade20k,
    "coco_stuff": write_coco_stuff,
    "cityscapes": write_cityscapes,
}
# class of every id of the small maps, in the order of the ids
CLASSES = {"ade20k": ADE_IDS, "coco_stuff": (0, 1, 18, 182), "cityscapes": CITYSCAPES_IDS}
FILE_IDS = {"ade20k": ADE_IDS, "coco_stuff": COCO_IDS, "cityscapes": CITYSCAPES_IDS}
NAMES = sorted(KINDS)
# the second label map of each
LABELS = {
    "ade20k": "annotations/training/ADE_train_00000002.png",
    "coco_stuff": "stuffthingmaps/train2017/000000000025.png",
    "cityscapes": "gtFine/train/aachen/aachen_000002_000019_gtFine_labelIds.png",
}
PAGES = {
    "ade20k": "http://sceneparsing.csail.mit.edu",
    "coco_stuff": "https://cocodataset.org",
    "cityscapes": "https://www.cityscapes-dataset.com/downloads/",
}


@pytest.fixture(scope="module")
def roots(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture
def copy_of(roots, tmp_path_factory):
    # a short path: messages name it twice
    folder = tmp_path_factory.mktemp("d")
    return lambda name: shutil.copytree(roots[name], folder / name)


def dataset(name, root, **options):
    return KINDS[name](root, **{"image_size": (32, 48), "partial": True, **options})


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def ranks(name, labels):
    """Place of every pixel's class among the classes of the small maps."""
    table = torch.zeros(256, dtype=torch.long)
    table[list(CLASSES[name])] = torch.arange(len(CLASSES[name]))
    return table[labels.long()]


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=15)
@given(
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    seed=st.integers(0, 10**6),
    index=st.integers(-3, 2),
)
def test_samples_keep_the_contract(roots, name, size, seed, index):
    data = dataset(name, roots[name], image_size=size)
    for sample in (data.draw(index, rng(seed)), data.view(index)):
        assert sample.image.shape == (3, *size)
        assert sample.labels.shape == size
        assert (sample.image.dtype, sample.labels.dtype) == (torch.float32, torch.uint8)
        assert sample.instances is None
        assert -1 <= sample.image.min() <= sample.image.max() <= 1
        assert set(sample.labels.unique().tolist()) <= set(CLASSES[name])
        assert type(sample.image) is type(sample.labels) is torch.Tensor
    again = data.draw(index, rng(seed))
    assert_equal(again.image, data.draw(index, rng(seed)).image)
    assert_equal(again.labels, data.draw(index, rng(seed)).labels)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_an_image_dataset_without_global_randomness(roots, name):
    data = dataset(name, roots[name])
    assert isinstance(data, ImageDataset)
    state = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    labels = {tuple(data.draw(0, rng(seed)).labels.flatten().tolist()) for seed in range(12)}
    assert len(labels) > 1
    assert_equal(torch.get_rng_state(), state[0])
    assert random.getstate() == state[1]
    assert np.random.get_state()[1].tolist() == state[2]  # noqa: NPY002
    with pytest.raises(IndexError):
        data.view(len(data))


@pytest.mark.parametrize("name", NAMES)
def test_image_and_map_are_cut_and_mirrored_together(roots, name):
    data = dataset(name, roots[name], image_size=(64, 96))
    for seed in range(8):
        sample = data.draw(seed % 3, rng(seed))
        shown = ((sample.image.mean(0) + 1) * 127.5 / LEVEL).round()
        # borders of the blocks blur; maps that moved or mirrored apart would agree in a quarter
        assert (shown == ranks(name, sample.labels)).float().mean() > 0.75


@pytest.mark.parametrize("name", NAMES)
def test_a_draw_is_a_window_of_the_squeezed_map(roots, name):
    # at these widths no pixel's middle falls on a border of blocks, where rounding decides
    size, load = ((64, 96), (64, 96)) if name == "cityscapes" else ((64, 93), (72, 104))
    path, names = roots[name] / LABELS[name], FILE_IDS[name]
    # Pillow's nearest takes the pixel under the middle, independent of ours
    squeezed = np.array(Image.open(path).resize(load[::-1], Image.Resampling.NEAREST))
    lookup = dict(zip(names, CLASSES[name], strict=True))
    squeezed = np.vectorize(lookup.get)(squeezed)
    data = dataset(name, roots[name], image_size=size)
    number = next(n for n in range(3) if data.pair(n).labels == path)
    seen = set()
    for seed in range(12):
        found = data.draw(number, rng(seed)).labels.numpy()
        for turned in (False, True):
            wanted = found[:, ::-1] if turned else found
            for top in range(load[0] - size[0] + 1):
                for left in range(load[1] - size[1] + 1):
                    window = squeezed[top : top + size[0], left : left + size[1]]
                    if (window == wanted).all():
                        seen.add((seed, turned, top, left))
    assert {seed for seed, *_ in seen} == set(range(12))
    assert len({place[1] for place in seen}) == 2
    places = {place[2:] for place in seen}
    assert len(places) == 1 if name == "cityscapes" else len(places) > 6


@pytest.mark.parametrize("name", NAMES)
def test_a_view_at_full_size_is_the_file(roots, name):
    with Image.open(roots[name] / LABELS[name]) as picture:
        ids = np.array(picture)
    data = dataset(name, roots[name], image_size=ids.shape)
    number = next(n for n in range(3) if data.pair(n).labels == roots[name] / LABELS[name])
    sample = data.view(number)
    lookup = dict(zip(FILE_IDS[name], CLASSES[name], strict=True))
    assert_equal(sample.labels, torch.from_numpy(np.vectorize(lookup.get)(ids)).to(torch.uint8))
    with Image.open(data.pair(number).image) as picture:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    # one rounding to float32 each way
    torch.testing.assert_close((sample.image + 1) * 127.5, pixels.float(), rtol=0, atol=2e-5)


def test_flip_mirrors_half_and_can_be_switched_off(roots):
    data = dataset("cityscapes", roots["cityscapes"])
    view = data.view(0)
    mirrored = 0
    for seed in range(40):
        sample = data.draw(0, rng(seed))
        turned = not torch.equal(sample.image, view.image)
        mirrored += turned
        assert_equal(sample.image, view.image.flip(-1) if turned else view.image)
        assert_equal(sample.labels, view.labels.flip(-1) if turned else view.labels)
    # four standard deviations of a fair coin
    assert abs(mirrored - 20) < 4 * (40 / 4) ** 0.5
    fixed = dataset("cityscapes", roots["cityscapes"], flip=False)
    for seed in range(8):
        assert_equal(fixed.draw(0, rng(seed)).image, view.image)


@pytest.mark.parametrize("name", NAMES)
def test_splits_are_the_official_ones_and_disjoint(roots, name):
    train, heldout = (dataset(name, roots[name], split=s) for s in ("train", "heldout"))
    assert (len(train), len(heldout)) == (3, 2)
    files = [{data.pair(n) for n in range(len(data))} for data in (train, heldout)]
    assert not files[0] & files[1]
    assert not {train.name(n) for n in range(3)} & {heldout.name(n) for n in range(2)}
    assert train.fingerprint() != heldout.fingerprint()
    heldout.view(1)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [0, 2])
def test_presence_is_what_the_maps_hold(roots, name, workers, tmp_path):
    data = dataset(name, roots[name])
    told = []
    data.scan = PresenceScan(
        tmp_path / "run" / "scan", workers=workers, progress=lambda *at: told.append(at)
    )
    presence = data.presence()
    assert presence.shape == (3, data.spec.num_classes)
    assert told == [(1, 3), (2, 3), (3, 3)]
    for index in range(3):
        held = set(data.read(index).labels.unique().tolist()) - {0}
        assert set(presence[index].nonzero().flatten().tolist()) == held
    again = dataset(name, roots[name])
    again.scan = PresenceScan(tmp_path / "run" / "scan", progress=lambda *at: told.append(at))
    assert_equal(again.presence(), presence)
    # read from the file: nothing was told
    assert len(told) == 3


@pytest.mark.parametrize("name", NAMES)
def test_a_changed_map_makes_the_kept_scan_void(copy_of, name, tmp_path):
    root = copy_of(name)
    scan = PresenceScan(tmp_path / "scan")
    data = dataset(name, root)
    data.scan = scan
    before, fingerprint = data.presence(), data.fingerprint()
    kept = data.presence()
    kept[:] = False
    assert_equal(data.presence(), before)
    path = root / LABELS[name]
    with Image.open(path) as picture:
        only = np.full(np.array(picture).shape, FILE_IDS[name][1], np.uint8)
    Image.fromarray(only).save(path)
    changed = dataset(name, root)
    changed.scan = scan
    number = next(n for n in range(3) if changed.pair(n).labels == path)
    assert changed.presence()[number].nonzero().flatten().tolist() == [CLASSES[name][1]]
    assert changed.fingerprint() != fingerprint


@pytest.mark.parametrize("name", NAMES)
def test_fingerprint_knows_settings_and_not_the_place(roots, copy_of, name):
    data = dataset(name, roots[name])
    assert data.fingerprint() == dataset(name, copy_of(name)).fingerprint()
    assert data.fingerprint() != dataset(name, roots[name], image_size=(32, 32)).fingerprint()


@pytest.mark.parametrize("name", NAMES)
def test_it_can_be_sent_to_loader_processes(roots, name):
    data = dataset(name, roots[name])
    copy = pickle.loads(pickle.dumps(data))
    assert_equal(copy.draw(1, rng(3)).image, data.draw(1, rng(3)).image)


# what a download may lack


def _break(root, name, kind):
    path = root / LABELS[name]
    if kind == "no-folder":
        shutil.rmtree(root / LABELS[name].split("/")[0])
    elif kind == "no-map":
        path.unlink()
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "link-out":
        outside = root.parent / "outside.png"
        path.rename(outside)
        path.symlink_to(outside)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "size":
        Image.fromarray(np.zeros((8, 9), np.uint8)).save(path)
    elif kind == "colours":
        Image.fromarray(np.zeros((96, 128, 3), np.uint8)).save(path)
    elif kind == "id":
        Image.fromarray(np.full((96, 128), 190, np.uint8)).save(path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("no-folder", ("no such folder", "download: ")),
        ("no-map", ("1 files are missing", "download: ")),
        ("empty", ("is empty", "download: ")),
        ("link-out", ("link that leads out", "download: ")),
    ],
)
def test_a_half_download_is_said_at_once(copy_of, name, kind, parts):
    root = copy_of(name)
    _break(root, name, kind)
    with pytest.raises(DataError) as caught:
        dataset(name, root)
    expected = LABELS[name].split("/")[0] if kind == "no-folder" else LABELS[name].split("/")[-1]
    assert_message(caught.value, expected, str(root), PAGES[name], *parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("truncated", ("is not a readable image",)),
        ("size", ("8 x 9",)),
        ("colours", ("mode RGB",)),
        ("id", ("[190]",)),
    ],
)
def test_damaged_maps_are_named_when_they_are_read(copy_of, name, kind, parts):
    root = copy_of(name)
    _break(root, name, kind)
    data = dataset(name, root)
    number = next(n for n in range(3) if data.pair(n).labels == root / LABELS[name])
    for read in (data.view, lambda index: data.draw(index, rng())):
        with pytest.raises(DataError) as caught:
            read(number)
        assert_message(caught.value, LABELS[name].split("/")[-1], *parts)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_names_the_bad_file(copy_of, name, workers):
    root = copy_of(name)
    _break(root, name, "id")
    data = dataset(name, root)
    data.scan = PresenceScan(workers=workers)
    with pytest.raises(DataError) as caught:
        data.presence()
    assert_message(caught.value, LABELS[name].split("/")[-1], "[190]")
    assert "Traceback" not in str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_ten_missing_files_are_named_and_all_counted(tmp_path, name):
    root = WRITERS[name](tmp_path, train=14)
    data = dataset(name, root)
    gone = [data.pair(n).labels for n in range(12)]
    for path in gone:
        path.unlink()
    with pytest.raises(DataError) as caught:
        dataset(name, root)
    text = str(caught.value)
    assert "12 files are missing" in text
    assert [path.name in text for path in gone] == [True] * 10 + [False] * 2
    assert len(text) < 800


@pytest.mark.parametrize("name", NAMES)
def test_fewer_images_than_the_release_needs_consent(roots, name, monkeypatch):
    with pytest.raises(DataError) as caught:
        dataset(name, roots[name], partial=False)
    parts = {
        # ADE20K's names are numbers, so the missing ones are known
        "ade20k": ["40414 files are missing", "ADE_train_00000004.jpg"],
        "coco_stuff": ["3 of 118287 images", "partial=True"],
        "cityscapes": ["3 of 2975 images", "partial=True"],
    }[name]
    assert_message(caught.value, *parts, PAGES[name], str(roots[name]))
    module = {"ade20k": ade20k, "coco_stuff": coco_stuff, "cityscapes": cityscapes}[name]
    counts = dict.fromkeys(module._COUNTS, 3)
    monkeypatch.setattr(module, "_COUNTS", counts)
    assert len(dataset(name, roots[name], partial=False)) == 3


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_not_a_part(tmp_path, name):
    for folder in {path.parent for path in WRITERS[name](tmp_path).rglob("*.*g")}:
        for path in folder.iterdir():
            path.unlink()
    with pytest.raises(DataError) as caught:
        dataset(name, tmp_path)
    assert_message(caught.value, "0 of ", PAGES[name])


@pytest.mark.parametrize("name", NAMES)
def test_folders_may_be_links_to_another_disk(copy_of, name):
    root = copy_of(name)
    first = LABELS[name].split("/")[0]
    elsewhere = root.parent / "disk"
    (root / first).rename(elsewhere)
    (root / first).symlink_to(elsewhere)
    assert len(dataset(name, root)) == 3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"image_size": (0, 32)}, InputError, ["image_size", "at least 1"]),
        ({"image_size": (32, 32, 3)}, InputError, ["image_size", "(height, width)"]),
        ({"image_size": 32}, DTypeError, ["image_size", "int"]),
        ({"split": "test"}, InputError, ["split", "'test'"]),
        ({"flip": 1}, DTypeError, ["flip", "bool", "int"]),
        ({"partial": "yes"}, DTypeError, ["partial", "bool", "str"]),
        ({"max_pixels": 0}, InputError, ["max_pixels", "at least 1"]),
    ],
    ids=["no-rows", "three-sizes", "one-size", "split", "flip", "partial", "no-pixels"],
)
def test_refuses(roots, name, options, error, parts):
    with pytest.raises(error) as caught:
        dataset(name, roots[name], **options)
    assert_message(caught.value, f"{KINDS[name].__name__}: ", *parts)


@pytest.mark.parametrize("name", NAMES)
def test_names_and_colours_are_one_per_class(roots, name):
    spec = dataset(name, roots[name]).spec
    assert spec.num_classes == {"ade20k": 151, "coco_stuff": 183, "cityscapes": 35}[name]
    assert spec.ignore_index == 0
    assert all(re.fullmatch(r"[a-z][a-z \-]*", text) for text in spec.names)
    assert len(set(spec.names)) == spec.num_classes


def test_a_smaller_map_holds_the_pixels_under_the_middles(copy_of):
    root = copy_of("ade20k")
    rows = np.repeat(np.arange(96, dtype=np.uint8)[:, None], 128, axis=1)
    cols = np.repeat(np.arange(128, dtype=np.uint8)[None], 96, axis=0)
    data = dataset("ade20k", root, image_size=(24, 32))
    for ids, middles in ((rows, torch.arange(24)[:, None]), (cols, torch.arange(32)[None])):
        Image.fromarray(ids).save(data.pair(0).labels)
        # four pixels become one: the middle is the border of the second and the third
        wanted = (4 * middles + 2).expand(24, 32).to(torch.uint8)
        assert_equal(data.view(0).labels, wanted)
