"""No damage and no hostile file gets through a load."""

import json
import os
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from checkpoint_trials import KINDS, mutate, mutation_trial
from hypothesis import given, strategies as st
from support import assert_equal, assert_message

from dpsims.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    UnsafeCheckpointError,
)
from dpsims_reference.checkpoints import CheckpointStore, read_checkpoint
from dpsims_reference.checkpoints.manifest import describe, seal
from dpsims_reference.checkpoints.strict_json import decode_json

TENSORS = {
    "generator": {"weight": torch.arange(40.0), "counter": torch.tensor(3)},
    "ema": {"weight": torch.arange(40.0) / 2, "counter": torch.tensor(3)},
}
STATE = {"config": {"seed": 7}, "data": "ade20k"}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    with CheckpointStore(folder) as store:
        return store.save(12, TENSORS, STATE)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """A checkpoint of the same run and step, with other values."""
    tensors = {group: {k: v + 1 for k, v in m.items()} for group, m in TENSORS.items()}
    with CheckpointStore(tmp_path_factory.mktemp("other")) as store:
        return store.save(12, tensors, {**STATE, "data": "cityscapes"})


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_mutations_are_all_found(tmp_path, sound, other, kind):
    rng = np.random.default_rng(KINDS.index(kind))
    folder = tmp_path / sound.name
    for _ in range(-(-1000 // len(KINDS))):
        shutil.copytree(sound, folder)
        name = mutate(kind, folder, other, rng)
        with pytest.raises(CorruptCheckpointError) as caught:
            read_checkpoint(folder)
        # a manifest of the same shape is consistent with itself: its files are what does not fit
        if (kind, name) != ("swap-whole", "MANIFEST.json"):
            assert_message(caught.value, "read_checkpoint", name)
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_newest_one_is_never_taken_for_sound(tmp_path, kind):
    with CheckpointStore(tmp_path / "store") as store:
        store.save(1, TENSORS, STATE)
        tensors = {group: {k: v + 1 for k, v in m.items()} for group, m in TENSORS.items()}
        store.save(2, tensors, {**STATE, "data": "cityscapes"})
    rng = np.random.default_rng(KINDS.index(kind))
    found = {mutation_trial(kind, tmp_path / "store", tmp_path, rng) for _ in range(10)}
    assert found == {"found"}


def test_the_undamaged_copy_loads(tmp_path, sound):
    loaded = read_checkpoint(shutil.copytree(sound, tmp_path / "copy"))
    assert loaded.state == STATE
    for group, members in TENSORS.items():
        for name, tensor in members.items():
            assert_equal(loaded.tensors[group][name], tensor)


def forge(folder, written, **changes):
    """A checkpoint whose manifest fits its files, as an attacker would write it."""
    folder.mkdir()
    for name, data in written.items():
        (folder / name).write_bytes(data)
    body = {
        "best": False,
        "files": {name: vars(describe(data)) for name, data in written.items()},
        "format": "dpsims-checkpoint",
        "step": 1,
        "version": [1, 0],
    }
    body.update(changes)
    kept = {key: value for key, value in body.items() if value is not ...}
    (folder / "MANIFEST.json").write_bytes(seal(kept))
    return folder


GOOD = {"state.json": b"{}"}
ENTRY = vars(describe(b"{}"))
MANIFESTS = {
    "no-format": ({"format": ...}, CorruptCheckpointError),
    "other-format": ({"format": "pickle"}, CorruptCheckpointError),
    "version-text": ({"version": "1.0"}, CorruptCheckpointError),
    "version-short": ({"version": [1]}, CorruptCheckpointError),
    "version-bool": ({"version": [True, 0]}, CorruptCheckpointError),
    "version-newer": ({"version": [2, 0]}, IncompatibleCheckpointError),
    "step-negative": ({"step": -1}, CorruptCheckpointError),
    "step-text": ({"step": "1"}, CorruptCheckpointError),
    "best-missing": ({"best": ...}, CorruptCheckpointError),
    "files-list": ({"files": ["state.json"]}, CorruptCheckpointError),
    "files-without-state": ({"files": {}}, CorruptCheckpointError),
    "entry-text": ({"files": {"state.json": "x"}}, CorruptCheckpointError),
    "entry-size-negative": (
        {"files": {"state.json": {**ENTRY, "size": -1}}},
        CorruptCheckpointError,
    ),
    "entry-size-huge": (
        {"files": {"state.json": {**ENTRY, "size": 1 << 70}}},
        CorruptCheckpointError,
    ),
    "entry-digest-short": (
        {"files": {"state.json": {**ENTRY, "sha256": "00"}}},
        CorruptCheckpointError,
    ),
}
UNSAFE_NAMES = (
    "../secret.safetensors",
    "/etc/passwd",
    "a/b.safetensors",
    "..",
    "",
    ".lock",
    "model.pt",
    "model.pkl",
    "MANIFEST.json",
    "a\0.safetensors",
    "A.safetensors",
    "model.safetensors\n",
)


@pytest.mark.parametrize(("changes", "error"), MANIFESTS.values(), ids=MANIFESTS.keys())
def test_consistent_manifest_that_says_nonsense(tmp_path, changes, error):
    with pytest.raises(error) as caught:
        read_checkpoint(forge(tmp_path / "c", GOOD, **changes))
    assert_message(caught.value, "read_checkpoint", ".json")


def test_newer_minor_version_loads(tmp_path):
    assert read_checkpoint(forge(tmp_path / "c", GOOD, version=[1, 7], more="x")).step == 1


@pytest.mark.parametrize("name", UNSAFE_NAMES)
def test_unsafe_names_are_refused_before_anything_is_opened(tmp_path, monkeypatch, name):
    folder = forge(tmp_path / "c", GOOD, files={"state.json": ENTRY, name: ENTRY})
    opened = []
    plain_open = os.open
    monkeypatch.setattr(os, "open", lambda p, *a: opened.append(os.fspath(p)) or plain_open(p, *a))
    with pytest.raises(UnsafeCheckpointError, match="own folder only"):
        read_checkpoint(folder)
    assert opened == [str(folder / "MANIFEST.json")]


@pytest.mark.parametrize("name", ["state.json", "MANIFEST.json"])
@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_anything_but_a_regular_file_is_refused_unopened(tmp_path, name, kind):
    folder = forge(tmp_path / "c", GOOD)
    (folder / name).rename(tmp_path / "elsewhere")
    if kind == "link":
        (folder / name).symlink_to(tmp_path / "elsewhere")
    elif kind == "folder":
        (folder / name).mkdir()
    else:
        # opening a pipe without a writer would block for ever
        os.mkfifo(folder / name)
    with pytest.raises((UnsafeCheckpointError, CorruptCheckpointError)) as caught:
        read_checkpoint(folder)
    assert isinstance(caught.value, UnsafeCheckpointError)
    assert_message(caught.value, name, "regular file")


@pytest.mark.parametrize("kind", ["link", "pt-file"])
def test_a_checkpoint_that_is_no_folder_is_refused(tmp_path, kind):
    path = tmp_path / "step-00000001"
    if kind == "link":
        path.symlink_to(forge(tmp_path / "c", GOOD))
    else:
        torch.save({"a": 1}, path)
    with pytest.raises(UnsafeCheckpointError, match="pickled files are never read"):
        read_checkpoint(path)


MANIFEST_BYTES = {
    "empty": b"",
    "not-json": b"hello",
    "json-without-digest": b'{"step": 1}\n',
    "deep": seal({"a": 1}).replace(b'"a": 1', b"[" * 5000),
    "huge": b" " * ((1 << 20) + 1),
    "binary": bytes(range(256)),
}


@pytest.mark.parametrize("data", MANIFEST_BYTES.values(), ids=MANIFEST_BYTES.keys())
def test_broken_manifest(tmp_path, data):
    folder = forge(tmp_path / "c", GOOD)
    (folder / "MANIFEST.json").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"MANIFEST\.json"):
        read_checkpoint(folder)


@pytest.mark.parametrize(
    "text",
    [
        b'{"a": 1, "a": 2}',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b"[" * 100_000,
        b'{"a": 1} x',
        b"\xff",
        b"1" * 5000,
        b"[1]",
        b"null",
    ],
    ids=["duplicate", "nan", "infinity", "deep", "tail", "not-utf8", "digits", "list", "null"],
)
def test_state_that_is_no_strict_json_object(tmp_path, text):
    with pytest.raises(CorruptCheckpointError) as caught:
        read_checkpoint(forge(tmp_path / "c", {"state.json": text}))
    assert_message(caught.value, "state.json", "JSON")


def test_state_above_the_limit_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dpsims_reference.checkpoints.reader.STATE_LIMIT", 100)
    with pytest.raises(CorruptCheckpointError, match="at most 100 bytes; got 102"):
        read_checkpoint(forge(tmp_path / "c", {"state.json": b'"' + b"x" * 100 + b'"'}))


def header(text, tail=b""):
    return len(text).to_bytes(8, "little") + text + tail


TENSOR_FILES = {
    "empty": b"",
    "short": b"\0" * 7,
    "length-2-to-63": (1 << 63).to_bytes(8, "little") + b"{}",
    "length-beyond-file": (100).to_bytes(8, "little") + b"{}",
    "not-json": header(b"hello"),
    "not-utf8": header(b"\xff\xfe"),
    "list": header(b"[]"),
    "duplicate-name": header(
        b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},'
        b'"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
        b"x",
    ),
    "overlap": header(
        b'{"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},'
        b'"b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}}',
        b"xyz",
    ),
    "huge-shape": header(
        b'{"a":{"dtype":"F32","shape":[1000000000000],"data_offsets":[0,4]}}', b"abcd"
    ),
    "shape-overflow": header(
        b'{"a":{"dtype":"F32","shape":[4294967296,4294967296,4],"data_offsets":[0,0]}}'
    ),
    "unknown-dtype": header(b'{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}}', b"x"),
    "dtype-torch-lacks": header(b'{"a":{"dtype":"F4","shape":[2],"data_offsets":[0,1]}}', b"x"),
    "beyond-the-end": header(b'{"a":{"dtype":"U8","shape":[9],"data_offsets":[0,9]}}', b"x"),
    "uncovered": header(b"{}", b"hidden"),
    "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
}


@pytest.mark.parametrize("data", TENSOR_FILES.values(), ids=TENSOR_FILES.keys())
def test_hostile_tensor_file_with_a_fitting_manifest(tmp_path, data):
    folder = forge(tmp_path / "c", {**GOOD, "ema.safetensors": data})
    with pytest.raises(CorruptCheckpointError) as caught:
        read_checkpoint(folder)
    assert_message(caught.value, "ema.safetensors")


@given(data=st.binary(max_size=300), framed=st.booleans())
def test_random_bytes_as_tensor_file(tmp_path_factory, data, framed):
    data = header(data) if framed else data
    folder = forge(tmp_path_factory.mktemp("c") / "c", {**GOOD, "ema.safetensors": data})
    try:
        loaded = read_checkpoint(folder).tensors["ema"]
    except CorruptCheckpointError:
        return
    # the few random files that are sound must be read as what they are
    assert safetensors.torch.load(data).keys() == loaded.keys()


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=3))
def test_random_json_as_state(tmp_path_factory, value):
    text = json.dumps(value).encode()
    with pytest.raises(CorruptCheckpointError, match="JSON object"):
        read_checkpoint(forge(tmp_path_factory.mktemp("c") / "c", {"state.json": text}))


def test_json_reader_names_the_file(tmp_path):
    with pytest.raises(CorruptCheckpointError) as caught:
        decode_json("owner", tmp_path / "x.json", b"{")
    assert_message(caught.value, "owner:", "x.json", "strict JSON")


def test_unreadable_file_and_bad_block(sound, monkeypatch):
    def refuse(path, *_):
        raise OSError(number, os.strerror(number), path)

    monkeypatch.setattr(os, "open", refuse)
    number = 13
    with pytest.raises(CheckpointError, match="Permission denied") as caught:
        read_checkpoint(sound)
    assert not isinstance(caught.value, CorruptCheckpointError)
    number = 5
    with pytest.raises(CorruptCheckpointError, match="Input/output error"):
        read_checkpoint(sound)


def test_hash_check_cannot_be_replaced_by_the_size_check(tmp_path, sound):
    folder = shutil.copytree(sound, tmp_path / "copy")
    data = bytearray((folder / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "ema.safetensors").write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match="another SHA-256"):
        read_checkpoint(folder)


def test_a_newer_format_is_neither_passed_over_nor_pruned(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, TENSORS, STATE)
        forge(tmp_path / "step-00000009", GOOD, version=[2, 0], step=9)
        with pytest.raises(IncompatibleCheckpointError, match="version"):
            store.latest()
        for step in (2, 3):
            store.save(step, TENSORS, STATE)
        assert store.steps() == [2, 3, 9]


def test_step_of_the_manifest_must_be_the_folders(tmp_path, sound):
    shutil.copytree(sound, tmp_path / "step-00000099")
    with (
        pytest.warns(RuntimeWarning, match="must be of step 99; got step 12"),
        pytest.raises(CorruptCheckpointError),
    ):
        CheckpointStore.read_latest(tmp_path)


def test_a_file_replaced_while_it_is_opened(tmp_path, sound, monkeypatch):
    folder = shutil.copytree(sound, tmp_path / "copy")
    plain_open = os.open

    def swap(path, *rest):
        os.unlink(path)
        os.mkfifo(path)
        return plain_open(path, *rest)

    monkeypatch.setattr(os, "open", swap)
    with pytest.raises(UnsafeCheckpointError, match="regular file"):
        read_checkpoint(folder)
