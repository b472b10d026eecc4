from __future__ import annotations

import os
import random
import signal
import stat
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.numpy import load, save
from support import assert_equal, assert_message

from dpsims import class_presence
from dpsims.data._presence_cache import CorruptCacheError, ScanKey, read_scan
from dpsims.errors import DataError, DTypeError, InputError

DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


class Labels:
    """A data set that counts its reads, and can be killed."""

    def __init__(self, maps, *, dies_at=None):
        self.maps = maps
        self.dies_at = dies_at
        self.reads = []

    def __len__(self):
        return len(self.maps)

    def __getitem__(self, index):
        if index == self.dies_at:
            raise KeyboardInterrupt
        self.reads.append(index)
        return self.maps[index]


def random_maps(num_images, num_classes, *, seed=0, ignore=255):
    rng = np.random.default_rng(seed)
    maps = rng.integers(0, num_classes, (num_images, 4, 5))
    maps[rng.random(maps.shape) < 0.3] = ignore
    return list(torch.from_numpy(maps))


def presence_by_loops(maps, num_classes, ignore):
    rows = [
        [k != ignore and bool((labels == k).any()) for k in range(num_classes)] for labels in maps
    ]
    return torch.tensor(rows)


@given(
    st.integers(1, 8),
    st.integers(1, 9),
    st.sampled_from([255, -1, 0, 70_000]),
    st.integers(0, 2**31),
)
def test_equals_the_definition(num_images, num_classes, ignore, seed):
    maps = random_maps(num_images, num_classes, seed=seed, ignore=ignore)
    actual = class_presence(maps, num_classes=num_classes, ignore_index=ignore)
    assert_equal(actual, presence_by_loops(maps, num_classes, ignore))


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_strides_give_the_same(dtype):
    maps = [labels.to(dtype) for labels in random_maps(4, 6, ignore=100)]
    expected = presence_by_loops(maps, 6, 100)
    assert_equal(class_presence(maps, num_classes=6, ignore_index=100), expected)
    turned = [labels.t() for labels in maps]
    assert_equal(class_presence(turned, num_classes=6, ignore_index=100), expected)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_arrays_are_read_and_left_alone(dtype):
    maps = [labels.numpy().astype(dtype) for labels in random_maps(4, 6)]
    for labels in maps:
        labels.flags.writeable = False
    expected = presence_by_loops(random_maps(4, 6), 6, 255)
    assert_equal(class_presence(maps, num_classes=6), expected)


def test_labels_of_replaces_reading_items():
    maps = random_maps(5, 3)
    dataset = Labels([None] * 5)
    actual = class_presence(dataset, num_classes=3, labels_of=maps.__getitem__)
    assert_equal(actual, presence_by_loops(maps, 3, 255))
    assert dataset.reads == []


def test_progress_is_told_after_every_image():
    told = []
    class_presence(random_maps(3, 2), num_classes=2, progress=lambda *at: told.append(at))
    assert told == [(1, 3), (2, 3), (3, 3)]


def test_global_random_state_is_not_touched(tmp_path):
    state, python_state = torch.get_rng_state(), random.getstate()
    class_presence(random_maps(3, 2), num_classes=2, cache=tmp_path / "scan", fingerprint="a")
    assert_equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


# the cache


def scan(dataset, path, **changes):
    arguments = {"num_classes": 5, "fingerprint": "files v1", "save_every": 4, **changes}
    return class_presence(dataset, cache=path, **arguments)


def test_finished_scan_is_read_back_without_reading_labels(tmp_path):
    maps = random_maps(11, 5)
    first = scan(Labels(maps), tmp_path / "scan")
    again = Labels(maps)
    assert_equal(scan(again, str(tmp_path / "scan")), first)
    assert again.reads == []
    assert [path.name for path in tmp_path.iterdir()] == ["scan"]


@given(st.integers(1, 25), st.integers(1, 9), st.integers(0, 24))
def test_killed_scan_continues_at_the_last_write(
    tmp_path_factory, num_images, save_every, dies_at
):
    path = tmp_path_factory.mktemp("kill") / "scan"
    maps = random_maps(num_images, 5)
    if dies_at < num_images:
        with pytest.raises(KeyboardInterrupt):
            scan(Labels(maps, dies_at=dies_at), path, save_every=save_every)
        known = dies_at - dies_at % save_every
    else:
        scan(Labels(maps), path, save_every=save_every)
        known = num_images
    rest = Labels(maps)
    assert_equal(scan(rest, path, save_every=save_every), presence_by_loops(maps, 5, 255))
    assert rest.reads == list(range(known, num_images))


@pytest.mark.parametrize(
    "changes",
    [{"fingerprint": "files v2"}, {"num_classes": 6}, {"ignore_index": 4}],
    ids=["fingerprint", "classes", "ignored-id"],
)
def test_cache_of_another_scan_is_replaced(tmp_path, changes):
    path = tmp_path / "scan"
    # no pixel is 255: the ids are sound with either ignored id
    maps = [labels.clamp(max=4) for labels in random_maps(6, 5)]
    scan(Labels(maps), path)
    other = Labels(maps)
    expected = class_presence(
        maps,
        num_classes=changes.get("num_classes", 5),
        ignore_index=changes.get("ignore_index", 255),
    )
    assert_equal(scan(other, path, **changes), expected)
    assert other.reads == list(range(6))
    cached = Labels(maps)
    assert_equal(scan(cached, path, **changes), expected)
    assert cached.reads == []


def test_cache_of_another_length_is_replaced(tmp_path):
    maps = random_maps(6, 5)
    scan(Labels(maps), tmp_path / "scan")
    longer = Labels([*maps, maps[0]])
    assert len(scan(longer, tmp_path / "scan")) == 7
    assert longer.reads == list(range(7))


def test_flipped_bits_of_every_byte_are_found(tmp_path):
    path = tmp_path / "scan"
    key = ScanKey("files v1", 9, 5, 255)
    scan(Labels(random_maps(9, 5)), path)
    sound = path.read_bytes()
    assert len(read_scan(path, key)) == 9
    for bit in range(0, 8 * len(sound), 3):
        damaged = bytearray(sound)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(damaged))
        with pytest.raises(CorruptCacheError):
            read_scan(path, key)


@pytest.mark.parametrize("place", [0, 20, 150, 250, -40, -1])
def test_damaged_file_is_scanned_anew_with_a_warning(tmp_path, place):
    path = tmp_path / "scan"
    maps = random_maps(9, 5)
    expected = scan(Labels(maps), path)
    damaged = bytearray(path.read_bytes())
    damaged[place] ^= 4
    path.write_bytes(bytes(damaged))
    dataset = Labels(maps)
    with pytest.warns(RuntimeWarning, match=r"cache .*scan is damaged .*scanning anew") as caught:
        assert_equal(scan(dataset, path), expected)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert dataset.reads == list(range(9))


@pytest.mark.parametrize("size", [0, 7, 8, 60, -1])
def test_truncated_file_is_found(tmp_path, size):
    path = tmp_path / "scan"
    maps = random_maps(9, 5)
    expected = scan(Labels(maps), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.warns(RuntimeWarning, match=r"cache .*scan is damaged .*scanning anew"):
        assert_equal(scan(Labels(maps), path), expected)


def test_swapped_parts_are_found(tmp_path):
    path = tmp_path / "scan"
    maps = random_maps(9, 5)
    expected = scan(Labels(maps), path)
    arrays = load(path.read_bytes())
    arrays["rows"], arrays["about"] = arrays["about"], arrays["rows"]
    path.write_bytes(save(arrays))
    with pytest.warns(RuntimeWarning, match="wrong checksum"):
        assert_equal(scan(Labels(maps), path), expected)


def test_file_of_another_kind_is_found(tmp_path):
    path = tmp_path / "scan"
    path.write_bytes(save({"weights": np.zeros(3)}))
    with pytest.warns(RuntimeWarning, match="unexpected entries"):
        scan(Labels(random_maps(2, 5)), path)


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "scan"
    scan(Labels(random_maps(4, 5)), path)
    sound = path.read_bytes()

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        scan(Labels(random_maps(8, 5)), path, fingerprint="other")
    assert path.read_bytes() == sound
    assert list(tmp_path.iterdir()) == [path]


def test_file_may_be_read_by_others(tmp_path):
    mask = os.umask(0o022)
    try:
        scan(Labels(random_maps(4, 5)), tmp_path / "scan")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "scan").stat().st_mode) == 0o644


# bad input


@pytest.mark.parametrize(
    ("item", "parts"),
    [
        (torch.tensor([[0, 9], [7, 255]]), ["[0, 5)", "255", "got [7, 9]"]),
        (torch.tensor([[-1, 0]]), ["got [-1]"]),
        (torch.tensor([[0, 70_000]]), ["got [70000]"]),
        (torch.zeros(2, 2), ["integer ids", "torch.float32", "labels_of"]),
        (torch.zeros(1, 2, 2, dtype=torch.uint8), ["(H, W)", "got (1, 2, 2)"]),
        (torch.zeros(0, 2, dtype=torch.uint8), ["(H, W)", "got (0, 2)"]),
        ((torch.zeros(3, 2, 2), torch.zeros(2, 2).long()), ["torch.Tensor", "tuple", "labels_of"]),
        (None, ["NoneType"]),
    ],
    ids=[
        "out-of-range",
        "negative",
        "far-out-of-range",
        "float",
        "rank-3",
        "no-pixels",
        "pair",
        "none",
    ],
)
def test_unusable_item_is_named_by_its_index(item, parts):
    maps = [*random_maps(3, 5), item]
    with pytest.raises(DataError) as caught:
        class_presence(maps, num_classes=5)
    assert_message(caught.value, "class_presence: labels of image 3 must", *parts)


@pytest.mark.parametrize(
    ("arguments", "error", "parts"),
    [
        ({"dataset": []}, InputError, ["dataset must not be empty", "0"]),
        ({"dataset": iter([1])}, DTypeError, ["dataset must have a length", "list_iterator"]),
        ({"dataset": {1}}, DTypeError, ["dataset must give label maps by index", "set"]),
        ({"labels_of": 3}, DTypeError, ["labels_of must be a callable", "int"]),
        ({"num_classes": 0}, InputError, ["num_classes", "at least 1", "got 0"]),
        ({"num_classes": 2.0}, DTypeError, ["num_classes", "2.0"]),
        ({"ignore_index": None}, DTypeError, ["ignore_index", "None"]),
        ({"save_every": 0}, InputError, ["save_every", "at least 1"]),
        ({"workers": -1}, InputError, ["workers", "at least 0", "-1"]),
        ({"cache": "scan"}, InputError, ["fingerprint must be given together with cache"]),
        ({"cache": "scan", "fingerprint": 3}, DTypeError, ["fingerprint must be a str", "int"]),
        ({"cache": "no/folder/scan", "fingerprint": "a"}, InputError, ["cache", "no/folder/scan"]),
    ],
    ids=[
        "empty",
        "no-length",
        "no-index",
        "labels-of",
        "no-classes",
        "float-classes",
        "no-ignored-id",
        "save-never",
        "negative-workers",
        "no-fingerprint",
        "number-fingerprint",
        "no-folder",
    ],
)
def test_refuses(arguments, error, parts):
    arguments = {"dataset": random_maps(2, 2), "num_classes": 2, **arguments}
    with pytest.raises(error) as caught:
        class_presence(arguments.pop("dataset"), **arguments)
    assert_message(caught.value, "class_presence: ", *parts)


# workers


@given(st.integers(1, 60), st.integers(1, 2), st.integers(0, 2**31))
@settings(max_examples=5)
def test_workers_give_the_same_rows_in_order(num_images, workers, seed):
    maps, told = random_maps(num_images, 6, seed=seed), []
    actual = class_presence(
        maps, num_classes=6, workers=workers, progress=lambda *at: told.append(at)
    )
    assert_equal(actual, class_presence(maps, num_classes=6))
    assert told == [(n, num_images) for n in range(1, num_images + 1)]


def test_workers_write_the_same_file_and_leave_random_states_alone(tmp_path):
    maps = random_maps(50, 5)
    state, python_state = torch.get_rng_state(), random.getstate()
    scan(Labels(maps), tmp_path / "one")
    scan(Labels(maps), tmp_path / "two", workers=2)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert_equal(torch.get_rng_state(), state)
    assert random.getstate() == python_state


def test_a_workers_error_reads_like_any_other(tmp_path):
    maps = random_maps(40, 5)
    maps[37] = torch.tensor([[0, 9]])
    messages = []
    for workers in (0, 2):
        with pytest.raises(DataError) as caught:
            scan(Labels(maps), tmp_path / f"scan{workers}", workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    assert_message(caught.value, "class_presence: labels of image 37 must", "got [9]")
    # what came before is kept: the last multiple of save_every
    assert len(read_scan(tmp_path / "scan2", ScanKey("files v1", 40, 5, 255))) == 36


_KILLED = """
import sys, time
from pathlib import Path
import torch
from dpsims import class_presence

class Slow:
    def __len__(self):
        return 400
    def __getitem__(self, index):
        time.sleep(0.01)
        return torch.tensor([[index % 7]])

class_presence(
    Slow(), num_classes=7, cache=Path(sys.argv[1]), fingerprint="slow",
    save_every=8, workers=int(sys.argv[2]),
)
"""


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_killed_by_the_system_goes_on(tmp_path, workers):
    path, key = tmp_path / "scan", ScanKey("slow", 400, 7, 255)
    arguments = [sys.executable, "-c", _KILLED, str(path), str(workers)]
    process = subprocess.Popen(arguments, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(read_scan(path, key)) < 24:
            assert process.poll() is None, "the scan ended before it was killed"
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    known = len(read_scan(path, key))
    assert 24 <= known < 400
    assert known % 8 == 0
    rest = Labels([torch.tensor([[index % 7]]) for index in range(400)])
    found = class_presence(rest, num_classes=7, cache=path, fingerprint="slow", save_every=8)
    assert rest.reads == list(range(known, 400))
    assert_equal(found, torch.eye(7, dtype=torch.bool)[torch.arange(400) % 7])
