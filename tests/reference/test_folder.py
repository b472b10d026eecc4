"""A folder of images and maps: what is read, what is refused, what the check reports."""

from __future__ import annotations

import io
import json
import os

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st
from PIL import Image
from support import assert_equal, assert_message

from dpsims.data import LabelSpec
from dpsims.errors import DataError, DTypeError, InputError
from dpsims_reference.data.files import distinct_ids, read_ids, read_image, shown
from dpsims_reference.data.folder import (
    FolderDataset,
    check_folder,
    format_report,
    read_label_spec,
)
from dpsims_reference.data.sample import ImageDataset

SPEC = LabelSpec(6)


def _ids(height=40, width=56, classes=6, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(classes, size=(-(-height // 8), -(-width // 8)))
    return np.kron(coarse, np.ones((8, 8), int))[:height, :width].astype(np.uint8)


def _painted(ids):
    """An image whose red channel is 40 times the id: image and map can be compared."""
    return np.stack([ids * 40, 255 - ids * 40, np.full_like(ids, 90)], -1)


@pytest.fixture
def root(tmp_path):
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    for n, name in enumerate(("a", "b", "c")):
        ids = _ids(seed=n)
        Image.fromarray(_painted(ids)).save(tmp_path / "images" / f"{name}.png")
        Image.fromarray(ids).save(tmp_path / "labels" / f"{name}.png")
    return tmp_path


def _dataset(root, **options):
    return FolderDataset(root, SPEC, **{"image_size": (32, 32), **options})


def _generator(seed):
    return torch.Generator().manual_seed(seed)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    crop=st.sampled_from(["random", "resize"]),
    seed=st.integers(0, 10**6),
    index=st.integers(0, 2),
)
def test_samples_keep_the_contract_and_invent_no_ids(root, size, crop, seed, index):
    data = _dataset(root, image_size=size, crop=crop)
    sample = data.draw(index, _generator(seed))
    assert sample.image.shape == (3, *size)
    assert sample.labels.shape == size
    assert (sample.image.dtype, sample.labels.dtype) == (torch.float32, torch.uint8)
    assert sample.instances is None
    before = set(np.unique(_ids(seed=index)).tolist())
    assert set(sample.labels.unique().tolist()) <= before
    again = data.draw(index, _generator(seed))
    assert_equal(again.image, sample.image)
    assert_equal(again.labels, sample.labels)


@pytest.mark.parametrize("crop", ["random", "resize"])
def test_image_and_map_are_cut_and_mirrored_together(root, crop):
    data = _dataset(root, image_size=(48, 48), crop=crop)
    flips = set()
    for seed in range(10):
        sample = data.draw(seed % 3, _generator(seed))
        red = ((sample.image[0] + 1) * 127.5).round() / 40
        # edges blur by one or two pixels of an 8-pixel grid; a map that moved would agree in 1/6
        agree = (red.round() == sample.labels).float().mean()
        assert agree > 0.6
        flips.add(float(sample.image[0, 0, 0]))
    assert len(flips) > 1


def test_flip_can_be_switched_off(root):
    data = _dataset(root, image_size=(40, 56), crop="resize", flip=False)
    for seed in range(6):
        assert_equal(data.draw(0, _generator(seed)).labels, torch.from_numpy(_ids()))


def test_a_view_at_full_size_is_the_file(root):
    for crop in ("random", "resize"):
        sample = _dataset(root, image_size=(40, 56), crop=crop).view(0)
        assert_equal(sample.labels, torch.from_numpy(_ids()))
        pixels = torch.from_numpy(_painted(_ids())).permute(2, 0, 1).float()
        # one rounding to float32 each way
        torch.testing.assert_close((sample.image + 1) * 127.5, pixels, rtol=0, atol=2e-5)


def test_instances_travel_with_the_map(root):
    (root / "instances").mkdir()
    for n, name in enumerate(("a", "b", "c")):
        Image.fromarray(_ids(seed=n).astype(np.uint16) * 300).save(
            root / "instances" / f"{name}.png"
        )
    data = _dataset(root, image_size=(24, 40))
    for seed in range(4):
        sample = data.draw(1, _generator(seed))
        assert sample.instances.dtype == torch.int32
        assert_equal(sample.instances, sample.labels.int() * 300)


def test_presence_and_fingerprint(root):
    data = _dataset(root)
    for index in range(3):
        assert (
            data.presence()[index].nonzero().flatten().tolist()
            == np.unique(_ids(seed=index)).tolist()
        )
    assert data.fingerprint() == _dataset(root).fingerprint()
    changed = {data.fingerprint(), _dataset(root, crop="resize").fingerprint()}
    Image.fromarray(np.zeros((40, 56), np.uint8)).save(root / "labels" / "a.png")
    changed.add(_dataset(root).fingerprint())
    assert len(changed) == 3
    assert isinstance(data, ImageDataset)
    assert data.name(-1) == "c"
    assert data.labeller is None


def test_ids_of_16_bits_are_mapped_and_scanned(root):
    for n, name in enumerate("abc"):
        Image.fromarray(_ids(seed=n).astype(np.uint16) + 1000).save(
            root / "labels" / f"{name}.png"
        )
    spec = LabelSpec(6, id_map={1000 + n: n for n in range(6)})
    data = FolderDataset(root, spec, image_size=(40, 56), crop="resize")
    assert_equal(data.view(2).labels, torch.from_numpy(_ids(seed=2)))
    assert data.presence()[2].nonzero().flatten().tolist() == np.unique(_ids(seed=2)).tolist()


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "gray2", "gray4", "palette2"])
def test_every_integer_mode_reads_as_ids(tmp_path, mode):
    ids = _ids(16, 24, classes=4)
    path = tmp_path / "x.png"
    if mode == "I;16":
        Image.fromarray(ids.astype(np.uint16) + 700).save(path)
        assert (read_ids(path) == ids.astype(int) + 700).all()
        assert (distinct_ids(path) == np.unique(ids.astype(int)) + 700).all()
        return
    if mode.startswith("gray"):
        _write_gray_png(path, ids, depth=int(mode[4:]))
    else:
        picture = Image.fromarray(ids)
        if mode != "L":
            picture = picture.convert("P")
            # colours that are anything but the ids
            picture.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
            picture.putdata(ids.ravel().tolist())
        picture.save(path, **({"bits": 2} if mode == "palette2" else {}))
    assert (read_ids(path) == ids).all()
    assert distinct_ids(path).tolist() == np.unique(ids).tolist()


def _write_gray_png(path, ids, *, depth):
    """Pillow cannot write 2- and 4-bit grey, other tools do."""
    import struct
    import zlib

    rows = []
    for row in ids:
        bits = "".join(f"{int(value):0{depth}b}" for value in row)
        rows.append(b"\0" + int(bits, 2).to_bytes(len(bits) // 8, "big"))

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", ids.shape[1], ids.shape[0], depth, 0, 0, 0, 0)
    data = zlib.compress(b"".join(rows))
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("mode", ["1", "LA", "RGB", "RGBA"])
def test_colours_instead_of_ids_are_refused(tmp_path, mode):
    path = tmp_path / "x.png"
    Image.fromarray(_painted(_ids(16, 16))).convert(mode).save(path)
    with pytest.raises(DataError) as caught:
        read_ids(path)
    assert_message(caught.value, "x.png", f"mode {mode}", "id_map")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "I;16", "LA", "1", "Ptransparent"])
def test_every_image_mode_reads_as_rgb(tmp_path, mode):
    gray = np.full((12, 20), 128, np.uint8)
    picture, options = Image.fromarray(gray), {}
    if mode == "I;16":
        picture = Image.fromarray(gray.astype(np.uint16) * 257)
    elif mode == "Ptransparent":
        picture, options = picture.convert("P"), {"transparency": bytes(range(256))}
    elif mode == "1":
        picture = Image.fromarray(np.full((12, 20), 255, np.uint8)).convert("1")
    elif mode == "P":
        picture = picture.convert("P")
    elif mode != "L":
        picture = picture.convert("RGB").convert(mode)
    path = tmp_path / ("x.jpg" if mode == "CMYK" else "x.png")
    picture.save(path, **options)
    pixels = read_image(path)
    assert pixels.shape == (12, 20, 3)
    assert pixels.dtype == np.uint8
    assert abs(int(pixels[5, 5, 0]) - (255 if mode == "1" else 128)) <= 2


def test_camera_rotation_is_applied_only_where_the_map_agrees(root):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by a quarter to show upright
    stored = np.rot90(_painted(_ids()), 1)
    for name in ("a", "b"):
        (root / "images" / f"{name}.png").unlink()
    Image.fromarray(np.ascontiguousarray(stored)).save(
        root / "images" / "a.jpg", exif=exif, quality=95
    )
    Image.fromarray(_painted(_ids(seed=1))).save(root / "images" / "b.jpg", exif=exif, quality=95)
    data = _dataset(root, image_size=(40, 56))
    for index in (0, 1):
        wanted = _painted(_ids(seed=index)).transpose(2, 0, 1)
        found = ((data.view(index).image + 1) * 127.5).numpy()
        # JPEG's error; a wrong turn would be off by about 80 grey levels
        assert np.abs(found - wanted).mean() < 12


def _damage(root, kind):
    path = root / "labels" / "b.png"
    if kind == "zero-bytes":
        path.write_bytes(b"")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:60])
    elif kind == "text":
        path.write_text("not an image")
    elif kind == "directory":
        path.unlink()
        path.mkdir()
    elif kind == "fifo":
        path.unlink()
        os.mkfifo(path)
    elif kind == "link-out":
        outside = root.parent / "outside.png"
        path.rename(outside)
        path.symlink_to(outside)
    elif kind == "broken-link":
        path.unlink()
        path.symlink_to(root / "labels" / "nowhere.png")
    elif kind == "jpeg-as-png":
        Image.fromarray(_ids()).save(path, format="JPEG")
    elif kind == "size":
        Image.fromarray(_ids(24, 56)).save(path)
    elif kind == "id":
        Image.fromarray(np.where(_ids() == 3, 77, _ids()).astype(np.uint8)).save(path)


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("zero-bytes", ("is empty",)),
        ("truncated", ("is not a readable image",)),
        ("text", ("is not a readable image",)),
        ("directory", ("is not a regular file",)),
        ("fifo", ("is not a regular file",)),
        ("link-out", ("link that leads out",)),
        ("broken-link", ("cannot be read",)),
        ("jpeg-as-png", ("is not a readable image",)),
        ("size", ("40 x 56", "24 x 56")),
        ("id", ("must lie in [0, 6)", "[77]")),
    ],
)
def test_damage_is_named(root, kind, parts):
    _damage(root, kind)
    with pytest.raises(DataError) as caught:
        _dataset(root).view(1)
    assert_message(caught.value, "b.png", *parts)
    report = check_folder(root, num_classes=6)
    if kind == "id":
        assert list(report.out_of_range) == [77]
    else:
        assert any("b.png" in problem for problem in report.problems)


def test_large_images_are_refused_before_they_are_unpacked(root, monkeypatch):
    small = _dataset(root, max_pixels=2000)
    with pytest.raises(DataError) as caught:
        small.view(0)
    assert_message(caught.value, "a.png", "56 x 40 pixels", "limit of 2000")
    # a header alone claims 12000 x 12000, which Pillow merely warns about, or 60000 x 60000
    for side in (12_000, 60_000):
        data = bytearray((root / "labels" / "a.png").read_bytes())
        data[16:24] = side.to_bytes(4, "big") * 2
        import zlib

        data[29:33] = zlib.crc32(bytes(data[12:29])).to_bytes(4, "big")
        (root / "labels" / "a.png").write_bytes(data)
        with pytest.raises(DataError, match="pixels than the limit"):
            _dataset(root).view(0)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), suffix=st.sampled_from(["png", "jpg", "webp", "bmp"]))
def test_damaged_bytes_never_raise_anything_else(tmp_path, data, suffix):
    stream = io.BytesIO()
    kind = {"jpg": "JPEG"}.get(suffix, suffix.upper())
    Image.fromarray(_painted(_ids(16, 16))).save(stream, format=kind)
    raw = bytearray(stream.getvalue())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(0, len(raw)))]
    path = tmp_path / f"x.{suffix}"
    path.write_bytes(raw)
    for read in (read_image, read_ids, distinct_ids):
        try:
            shape = read(path).shape
        except DataError as error:
            shape = str(error)
        assert "x." in shape or len(shape) in (1, 2, 3)


def test_partners_are_checked_at_construction(root):
    for n in range(12):
        Image.fromarray(_painted(_ids())).save(root / "images" / f"lonely{n:02d}.png")
    (root / "labels" / "c.png").rename(root / "labels" / "d.png")
    with pytest.raises(DataError) as caught:
        _dataset(root)
    assert_message(caught.value, "14 files have no partner", "images/c.png", "images/lonely08.png")
    assert "lonely09" not in str(caught.value)


def test_instances_need_partners_too(root):
    (root / "instances").mkdir()
    Image.fromarray(_ids()).save(root / "instances" / "a.png")
    with pytest.raises(DataError) as caught:
        _dataset(root)
    assert_message(caught.value, "2 files", "images/b.png", "images/c.png")


def test_wrong_instance_size_is_named(root):
    (root / "instances").mkdir()
    for name in "abc":
        Image.fromarray(_ids(8, 8)).save(root / "instances" / f"{name}.png")
    with pytest.raises(DataError, match=r"instances.a\.png.* is 8 x 8"):
        _dataset(root).view(0)


def test_twins_and_strangers(root):
    Image.fromarray(_painted(_ids())).save(root / "images" / "a.jpg")
    with pytest.raises(DataError, match=r"a\.png: has the same name as a\.jpg"):
        _dataset(root)
    (root / "images" / "a.jpg").unlink()
    (root / "images" / "notes.txt").write_text("passed over")
    (root / "images" / "._a.png").write_text("left by another system")
    (root / "images" / "more").mkdir()
    assert len(_dataset(root)) == 3


def test_unusual_names_work(root):
    names = ["ü" * 60, "a b;c", "x" * 240, os.fsdecode(b"\xff\xfe")]
    for name in names:
        Image.fromarray(_painted(_ids())).save(root / "images" / "t.png")
        os.rename(root / "images" / "t.png", root / "images" / f"{name}.png")
        Image.fromarray(_ids()).save(root / "labels" / "t.png")
        os.rename(root / "labels" / "t.png", root / "labels" / f"{name}.png")
    data = _dataset(root)
    assert len(data) == 7
    assert data.fingerprint()
    for index in range(7):
        assert data.view(index).image.shape == (3, 32, 32)
    assert len(shown("x" * 500)) == 120
    shown(os.fsdecode(b"\xff.png")).encode("ascii")


@pytest.mark.parametrize("missing", ["images", "labels"])
def test_missing_folders(root, missing):
    (root / missing).rename(root / "elsewhere")
    with pytest.raises(DataError) as caught:
        _dataset(root)
    assert_message(caught.value, missing, "no such folder")
    assert "no such folder" in check_folder(root).problems[0]


def test_an_empty_folder(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(DataError, match="holds no images"):
        _dataset(tmp_path)
    report = check_folder(tmp_path)
    assert report.problems == ["There is not a single image with a label map of the same name."]
    assert "images with label maps" in format_report(report)


@pytest.mark.parametrize(
    ("options", "error", "parts"),
    [
        ({"image_size": (0, 32)}, InputError, ("image_size[0] must be at least 1", "got 0")),
        ({"image_size": (32,)}, InputError, ("image_size must be (height, width)", "(32,)")),
        ({"crop": "center"}, InputError, ("crop must be one of 'random', 'resize'", "'center'")),
        ({"spec": 6}, DTypeError, ("spec must be a LabelSpec", "got int")),
    ],
    ids=["empty-size", "one-number", "unknown-crop", "number-as-spec"],
)
def test_bad_arguments(root, options, error, parts):
    with pytest.raises(error) as caught:
        FolderDataset(root, **{"spec": SPEC, "image_size": (32, 32), **options})
    assert_message(caught.value, "FolderDataset: ", *parts)


def test_ids_are_mapped_by_the_spec(root):
    spec = LabelSpec(2, id_map={0: 255, 1: 0, 2: 0, 3: 1, 4: 1, 5: 1})
    data = FolderDataset(root, spec, image_size=(40, 56))
    wanted = torch.tensor([255, 0, 0, 1, 1, 1], dtype=torch.uint8)[torch.from_numpy(_ids()).long()]
    assert_equal(data.view(0).labels, wanted)
    assert data.presence().all()


def test_report_of_a_sound_folder(root):
    report = check_folder(root, num_classes=6)
    assert report.problems == []
    pixels = np.concatenate([_ids(seed=n).ravel() for n in range(3)])
    assert {i: count.pixels for i, count in report.ids.items()} == dict(
        zip(*(part.tolist() for part in np.unique(pixels, return_counts=True)), strict=True)
    )
    text = format_report(report)
    assert "no problems found" in text
    assert text.endswith("  num_classes = 6\n  ignore_index = 255")
    assert "num_classes = 6" in format_report(check_folder(root))


def test_report_collects_every_problem_and_goes_on(root):
    _damage(root, "truncated")
    Image.fromarray(_painted(_ids(20, 20))).save(root / "images" / "c.png")
    Image.fromarray(_painted(_ids())).save(root / "images" / "extra.png")
    (root / "images" / "a.png").write_bytes(b"no image")
    bad = _ids().copy()
    bad[:4] = 9
    Image.fromarray(bad).save(root / "labels" / "a.png")
    report = check_folder(root, num_classes=6)
    assert report.unmatched == ["images/extra.png"]
    assert list(report.out_of_range) == [9]
    assert report.out_of_range[9].pixels == 4 * 56
    text = " ".join(report.problems)
    for part in (
        "1 file has no partner",
        "images/a.png",
        "b.png",
        "20 x 20",
        "Id 9 is not below num_classes=6",
    ):
        assert part in text
    assert "id_map = {" in format_report(report)


def test_suggestions_for_gaps_and_for_unlabelled_pixels(root):
    for n, name in enumerate("abc"):
        ids = _ids(seed=n, classes=3) * 50
        ids[0, 0] = 255
        Image.fromarray(ids).save(root / "labels" / f"{name}.png")
    text = format_report(check_folder(root))
    assert "num_classes = 3" in text
    assert "id_map = {0: 0, 50: 1, 100: 2, 255: 255}" in text
    assert "255" in text
    assert "consider ignore_index = 255" in format_report(check_folder(root, ignore_index=-1))
    for name in "abc":
        Image.fromarray(np.full((40, 56), 255, np.uint8)).save(root / "labels" / f"{name}.png")
    report = check_folder(root)
    assert report.problems == ["Every pixel of every map is unlabelled (id 255)."]
    assert "nothing to suggest" in format_report(report)


def test_long_lists_are_shortened(root):
    for n in range(8):
        Image.fromarray(_ids()).save(root / "labels" / f"z{n}.png")
    problem = check_folder(root).problems[0]
    assert "8 files have no partner" in problem
    assert problem.endswith("and 3 more.")


def test_check_refuses_nonsense_arguments(root):
    with pytest.raises(InputError, match="num_classes must be at least 1; got 0"):
        check_folder(root, num_classes=0)


def test_label_spec_file(tmp_path):
    path = tmp_path / "labels.json"
    assert read_label_spec(path, num_classes=4) == LabelSpec(4)
    with pytest.raises(InputError, match="num_classes must be given without"):
        read_label_spec(path)
    path.write_text(json.dumps({**SPEC.to_dict(), "labeller": "labeller.safetensors"}))
    assert read_label_spec(path) == read_label_spec(path, num_classes=6) == SPEC
    with pytest.raises(InputError, match=r"num_classes must be 6.*got 5"):
        read_label_spec(path, num_classes=5)


@pytest.mark.parametrize("text", ["{", "[1]", '{"num_classes": 0}', '{"classes": 3}', "[" * 9999])
def test_damaged_label_spec_file(tmp_path, text):
    path = tmp_path / "labels.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"labels\.json"):
        read_label_spec(path)


def test_labeller_must_lie_in_the_folder(root):
    (root / "labels.json").write_text(
        json.dumps({**SPEC.to_dict(), "labeller": "../x.safetensors"})
    )
    with pytest.raises(DataError, match="file name without folders"):
        _ = _dataset(root).labeller
