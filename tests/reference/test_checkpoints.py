import errno
import os
import resource
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_equal, assert_message

from dpsims.errors import (
    CheckpointError,
    CorruptCheckpointError,
    DTypeError,
    InputError,
    UnsafeCheckpointError,
)
from dpsims_reference.checkpoints import (
    CheckpointStore,
    read_checkpoint,
    reader as checkpoint_reader,
    writer as checkpoint_writer,
)
from dpsims_reference.checkpoints.disk import Disk

DTYPES = [
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=12).filter(
    lambda name: name != "__metadata__"
)
groups = st.from_regex(r"[a-z0-9][a-z0-9_-]{0,8}", fullmatch=True)
json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=8,
)


@st.composite
def any_tensor(draw):
    """Random bits of any dtype, shape and memory layout: NaN payloads and -0.0 included."""
    dtype = draw(st.sampled_from(DTYPES))
    shape = draw(st.lists(st.integers(0, 4), max_size=3))
    data = draw(st.binary(min_size=1024, max_size=1024))
    wide = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    if dtype is torch.bool:
        wide = wide % 2
    flat = wide.view(dtype)[: max(1, torch.Size(shape).numel())]
    tensor = flat[: torch.Size(shape).numel()].reshape(shape)
    if tensor.ndim > 1 and draw(st.booleans()):
        tensor = tensor.transpose(0, 1)
    return tensor.requires_grad_(dtype == torch.float32 and draw(st.booleans()))


def bits(tensor):
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def assert_same_groups(actual, expected):
    assert actual.keys() == expected.keys()
    for group, members in expected.items():
        assert actual[group].keys() == members.keys()
        for name, tensor in members.items():
            found = actual[group][name]
            assert (found.dtype, found.shape) == (tensor.dtype, tensor.shape)
            assert_equal(bits(found), bits(tensor))


def simple(value=1.0):
    return {"ema": {"weight": torch.full((3,), float(value))}}


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@given(
    tensors=st.dictionaries(groups, st.dictionaries(names, any_tensor(), max_size=3), max_size=3),
    state=st.dictionaries(st.text(max_size=6), json_values, max_size=4),
    step=st.integers(0, 10**15),
    best=st.booleans(),
)
def test_round_trip_is_bit_exact_and_writes_the_same_bytes_again(
    tmp_path_factory, tensors, state, step, best
):
    folder = tmp_path_factory.mktemp("store")
    with CheckpointStore(folder) as store:
        first = files_of(store.save(step, tensors, state, best=best))
        loaded = store.load(step)
        assert_same_groups(loaded.tensors, tensors)
        assert (loaded.step, loaded.state) == (step, state)
        backwards = {group: dict(reversed(m.items())) for group, m in loaded.tensors.items()}
        again = store.save(
            step,
            dict(reversed(backwards.items())),
            dict(reversed(loaded.state.items())),
            best=best,
        )
        assert files_of(again) == first


def test_tied_and_sliced_tensors_round_trip(tmp_path):
    base = torch.arange(12.0)
    members = {
        "whole": base,
        "tied": base,
        "half": base[6:],
        "steps": base[::3],
        "wide": torch.ones(1).expand(4),
        "map": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
    }
    with CheckpointStore(tmp_path) as store:
        path = store.save(0, {"g": members}, {})
        assert_same_groups(store.load(0).tensors, {"g": members})
    assert (path / "g.safetensors").stat().st_size < 1500, (
        "a slice must not save its whole storage"
    )


def test_loaded_tensors_own_their_memory(tmp_path):
    with CheckpointStore(tmp_path) as store:
        path = store.save(0, {"g": {"a": torch.arange(4), "b": torch.arange(4)}}, {})
        loaded = store.load(0).tensors["g"]
    (path / "g.safetensors").write_bytes(b"")
    loaded["a"].add_(1)
    assert_equal(loaded["b"], torch.arange(4))
    assert loaded["a"].untyped_storage().nbytes() == 32


def test_latest_goes_by_step_not_by_time_or_text(tmp_path):
    with CheckpointStore(tmp_path, keep=10) as store:
        assert store.latest() is None
        for step in (99_999_999, 10**9, 5):
            store.save(step, simple(step), {})
        assert store.latest().step == 10**9
        assert store.steps() == [5, 99_999_999, 10**9]
    assert CheckpointStore.read_latest(tmp_path).step == 10**9


def test_pruning_keeps_the_newest_the_best_and_the_one_just_saved(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        for step, best in ((1, False), (2, True), (3, False), (4, False), (5, False)):
            store.save(step, simple(step), {}, best=best)
        assert store.steps() == [2, 4, 5]
        store.save(6, simple(6), {}, best=True)
        assert store.steps() == [5, 6], "the older best one has had its day"
        store.save(3, simple(3), {})
        assert store.steps() == [3, 5, 6]
        assert store.load(3).step == 3


def test_pruning_does_not_count_damaged_checkpoints(tmp_path):
    with CheckpointStore(tmp_path, keep=2) as store:
        store.save(1, simple(1), {})
        for step in (2, 3):
            path = store.save(step, simple(step), {})
        (path / "ema.safetensors").write_bytes(b"x")
        store.save(4, simple(4), {})
        assert store.steps() == [2, 3, 4]


def test_latest_falls_back_and_names_every_damaged_checkpoint(tmp_path):
    with CheckpointStore(tmp_path, keep=4) as store:
        for step in (1, 2, 3):
            path = store.save(step, simple(step), {"step": step})
        (path / "ema.safetensors").write_bytes(b"x")
        (tmp_path / "step-00000002" / "MANIFEST.json").unlink()
        with pytest.warns(RuntimeWarning) as caught:
            found = store.latest()
        assert (found.step, found.state) == (1, {"step": 1})
        texts = [str(entry.message) for entry in caught]
        assert len(texts) == 2
        assert "step-00000003/ema.safetensors" in texts[0]
        assert "step-00000002/MANIFEST.json" in texts[1]


def test_latest_refuses_to_start_over_when_all_are_damaged(tmp_path):
    with CheckpointStore(tmp_path) as store:
        (store.save(1, simple(), {}) / "state.json").unlink()
        with (
            pytest.warns(RuntimeWarning, match=r"state\.json"),
            pytest.raises(CorruptCheckpointError) as caught,
        ):
            store.latest()
    assert_message(caught.value, "CheckpointStore.latest", "sound", "step-00000001")


def test_same_step_is_replaced(tmp_path):
    with CheckpointStore(tmp_path) as store:
        for value in (1, 2):
            store.save(7, simple(value), {"value": value})
        assert store.latest().state == {"value": 2}
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000007"]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        with CheckpointStore(tmp_path / "store") as store:
            path = store.save(0, simple(), {})
    finally:
        os.umask(before)
    modes = {entry.name: stat.S_IMODE(entry.stat().st_mode) for entry in path.iterdir()}
    assert modes == dict.fromkeys(("ema.safetensors", "state.json", "MANIFEST.json"), 0o640)
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


def test_second_trainer_is_refused_and_readers_are_not(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(3, simple(), {})
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore(tmp_path)
        assert_message(caught.value, "another trainer", str(tmp_path), f"process {os.getpid()}")
        assert CheckpointStore.read_latest(tmp_path).step == 3
    CheckpointStore(tmp_path).close()


def test_lock_ends_with_the_store_object(tmp_path):
    CheckpointStore(tmp_path)
    with CheckpointStore(tmp_path) as store:
        assert store.save(1, simple(), {}).is_dir()


def test_lock_is_not_inherited_by_a_started_program(tmp_path):
    with CheckpointStore(tmp_path):
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        with CheckpointStore(tmp_path) as store:
            assert child.poll() is None
            assert store.save(1, simple(), {}).is_dir()
    finally:
        child.communicate(b"\n")


def test_closed_store_reads_but_does_not_write(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(), {})
    assert store.latest().step == 1
    with pytest.raises(CheckpointError, match="open"):
        store.save(2, simple(), {})


def test_forked_child_must_not_save(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with pytest.raises(CheckpointError, match="process that opened it"):
            store.save(2, simple(), {})


def test_start_removes_what_dead_saves_left(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(), {})
    (tmp_path / ".tmp-dead").mkdir()
    (tmp_path / ".tmp-dead" / "half").write_bytes(b"x")
    (tmp_path / ".tmp-link").symlink_to(tmp_path / "step-00000001")
    with CheckpointStore(tmp_path) as store:
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]
        assert store.latest().step == 1


def test_foreign_entries_are_left_alone(tmp_path):
    (tmp_path / "step-7").mkdir()
    (tmp_path / "step-000000012").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    with CheckpointStore(tmp_path) as store:
        for step in range(4):
            path = store.save(step, simple(), {})
        (path / "notes.txt").write_text("mine")
        assert store.latest().step == 3
        assert store.steps() == [2, 3]
    assert {"step-7", "step-000000012", "notes.txt"} < set(os.listdir(tmp_path))


class FullDisk(Disk):
    def write(self, descriptor, data):
        os.write(descriptor, data[: len(data) // 2])
        raise OSError(28, "No space left on device")


class ReadOnlyDisk(Disk):
    def make_folder(self, path):
        raise OSError(30, "Read-only file system", str(path))


@pytest.mark.parametrize("disk", [FullDisk, ReadOnlyDisk])
@pytest.mark.parametrize("step", [1, 2])
def test_refusing_disk_leaves_earlier_checkpoints(tmp_path, monkeypatch, disk, step):
    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(1), {})
        monkeypatch.setattr(store._writer, "_disk", disk())
        with pytest.raises(CheckpointError) as caught:
            store.save(step, simple(2), {})
        assert_message(caught.value, "CheckpointStore.save", f"step-0000000{step}", "got")
        assert_same_groups(store.latest().tensors, simple(1))
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]


def test_file_size_limit_of_the_system(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(1), {})
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
        try:
            with pytest.raises(CheckpointError, match="File too large"):
                store.save(2, {"big": {"a": torch.zeros(1 << 19)}}, {})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert store.steps() == [1]
        assert store.latest().step == 1


def test_the_replaced_one_stays_until_its_successor_is_surely_on_the_disk(tmp_path, monkeypatch):
    class Deaf(Disk):
        def sync_folder(self, path):
            if path == tmp_path:
                raise OSError(5, "Input/output error", str(path))

    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(1), {})
        monkeypatch.setattr(store._writer, "_disk", Deaf())
        with pytest.raises(CheckpointError, match="Input/output error"):
            store.save(1, simple(2), {})
        assert (tmp_path / ".old-step-00000001" / "MANIFEST.json").exists()
        assert_same_groups(store.latest().tensors, simple(2))
    with CheckpointStore(tmp_path) as store:
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001"]


def test_a_prune_that_fails_is_a_warning(tmp_path, monkeypatch):
    class Stubborn(Disk):
        def remove(self, path):
            raise PermissionError(13, "Permission denied", str(path))

    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            store.save(step, simple(step), {})
        monkeypatch.setattr(store._writer, "_disk", Stubborn())
        with pytest.warns(RuntimeWarning, match="is safe, but older ones stay"):
            store.save(3, simple(3), {})
        assert store.latest().step == 3


@pytest.mark.parametrize("where", ["folder-is-a-file", "parent-is-a-file"])
def test_unusable_folder(tmp_path, where):
    (tmp_path / "file").write_text("")
    folder = tmp_path / "file" / ("" if where == "folder-is-a-file" else "store")
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(folder)
    assert_message(caught.value, "CheckpointStore", "folder", "file")


def test_missing_parents_are_made(tmp_path):
    with CheckpointStore(tmp_path / "a" / "b") as store:
        store.save(0, simple(), {})
    assert CheckpointStore.read_latest(tmp_path / "a" / "b").step == 0


def test_folder_that_disappears(tmp_path):
    folder = tmp_path / "store"
    with CheckpointStore(folder) as store:
        checkpoint_writer.Disk().remove(folder)
        with pytest.raises(CheckpointError, match="No such file"):
            store.save(0, simple(), {})
    with pytest.raises(CheckpointError, match="readable folder"):
        CheckpointStore.read_latest(folder)


@pytest.mark.parametrize("kind", ["link", "dangling-link", "file"])
def test_target_that_is_no_folder_is_refused(tmp_path, kind):
    target = tmp_path / "step-00000001"
    with CheckpointStore(tmp_path) as store:
        if kind == "file":
            target.write_text("precious")
        else:
            target.symlink_to(tmp_path if kind == "link" else tmp_path / "nowhere")
        with pytest.raises(UnsafeCheckpointError, match="must be a folder"):
            store.save(1, simple(), {})
        assert os.path.lexists(target)


def test_load_of_a_step_that_is_not_there(tmp_path):
    with CheckpointStore(tmp_path) as store:
        store.save(3, simple(), {})
        with pytest.raises(CheckpointError) as caught:
            store.load(4)
        assert_message(caught.value, "step must be one of [3]", "got 4")
        with pytest.raises(CheckpointError, match="must exist"):
            store.load(tmp_path / "elsewhere")


def test_a_copied_checkpoint_loads_under_another_name(tmp_path):
    with CheckpointStore(tmp_path / "store") as store:
        store.save(3, simple(3), {}).rename(tmp_path / "published")
        assert_same_groups(store.load(str(tmp_path / "published")).tensors, simple(3))
        (tmp_path / "published").rename(tmp_path / "step-00000004")
        with pytest.raises(CorruptCheckpointError, match="must be of step 4; got step 3"):
            read_checkpoint(tmp_path / "step-00000004")


BAD = {
    "step-negative": ((-1, {}, {}), InputError, "step must be at least 0; got -1"),
    "step-float": ((1.0, {}, {}), DTypeError, "step must be an int; got 1.0"),
    "step-bool": ((True, {}, {}), DTypeError, "step must be an int; got True"),
    "tensors-list": ((0, [], {}), DTypeError, "got list, dict, bool"),
    "state-list": ((0, {}, []), DTypeError, "got dict, list, bool"),
    "group-path": ((0, {"../x": {}}, {}), InputError, "got '../x'"),
    "group-capital": ((0, {"G": {}}, {}), InputError, "got 'G'"),
    "group-number": ((0, {1: {}}, {}), InputError, "got 1"),
    "group-tensor": ((0, {"g": torch.ones(1)}, {}), DTypeError, "got Tensor"),
    "name-number": ((0, {"g": {1: torch.ones(1)}}, {}), DTypeError, "text as keys; got 1"),
    "name-reserved": ((0, {"g": {"__metadata__": torch.ones(1)}}, {}), InputError, "__metadata__"),
    "name-surrogate": ((0, {"g": {"\ud800": torch.ones(1)}}, {}), InputError, "can hold"),
    "entry-list": ((0, {"g": {"a": [1.0]}}, {}), DTypeError, "torch.Tensor; got list"),
    "entry-meta": ((0, {"g": {"a": torch.ones(1, device="meta")}}, {}), DTypeError, "meta"),
    "entry-sparse": ((0, {"g": {"a": torch.ones(2).to_sparse()}}, {}), DTypeError, "sparse"),
    "entry-complex": (
        (0, {"g": {"a": torch.ones(1, dtype=torch.complex64)}}, {}),
        DTypeError,
        "complex64",
    ),
    "state-tuple": ((0, {}, {"a": [(1,)]}), DTypeError, "state['a'][0] must be a JSON value"),
    "state-tensor": ((0, {}, {"a": torch.ones(1)}), DTypeError, "got Tensor"),
    "state-int-key": ((0, {}, {"a": {1: 2}}), DTypeError, "state['a'] must have text as keys"),
    "state-nan": ((0, {}, {"a": float("nan")}), InputError, "state['a'] must be finite"),
    "state-huge-int": ((0, {}, {"a": 1 << 5000}), InputError, "at most 4096 bits; got 5001"),
}


@pytest.mark.parametrize(("call", "error", "text"), BAD.values(), ids=BAD.keys())
def test_bad_arguments_leave_no_trace(tmp_path, call, error, text):
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(error) as caught:
            store.save(*call)
        assert_message(caught.value, "CheckpointStore.save", text)
        assert os.listdir(tmp_path) == [".lock"]


def test_state_that_is_too_deep_or_too_large(tmp_path, monkeypatch):
    deep = []
    for _ in range(2000):
        deep = [deep]
    with CheckpointStore(tmp_path) as store:
        with pytest.raises(InputError, match="at most 64 deep"):
            store.save(0, {}, {"a": deep})
        monkeypatch.setattr("dpsims_reference.checkpoints.strict_json.STATE_LIMIT", 50)
        with pytest.raises(InputError, match="must fit into 50 bytes"):
            store.save(0, {}, {"a": "x" * 60})


@pytest.mark.parametrize(("keep", "error"), [(1, InputError), (2.0, DTypeError)])
def test_bad_keep(tmp_path, keep, error):
    with pytest.raises(error, match="CheckpointStore: keep must be"):
        CheckpointStore(tmp_path, keep=keep)
    assert os.listdir(tmp_path) == []


def test_bad_best_flag(tmp_path):
    with (
        CheckpointStore(tmp_path) as store,
        pytest.raises(DTypeError, match="got dict, dict, int"),
    ):
        store.save(0, {}, {}, best=1)


def test_the_best_one_is_found_without_the_lock(tmp_path):
    with CheckpointStore(tmp_path) as store:
        assert CheckpointStore.read_best(tmp_path) is None
        for step, best in ((1, True), (2, False), (3, True), (4, False), (5, False), (6, False)):
            store.save(step, simple(step), {"value": step}, best=best)
        assert CheckpointStore.read_best(tmp_path).state == {"value": 3}
        assert CheckpointStore.read_step(tmp_path, 3).state == {"value": 3}
        assert store.steps() == [3, 5, 6]
        with pytest.raises(CheckpointError) as caught:
            CheckpointStore.read_step(tmp_path, 4)
        assert_message(caught.value, "CheckpointStore.read_step", "[3, 5, 6]", "got 4")


@given(
    saves=st.lists(st.tuples(st.integers(1, 6), st.booleans()), min_size=1, max_size=12),
    keep=st.integers(2, 4),
)
def test_pruning_follows_its_rule_whatever_is_saved(tmp_path_factory, saves, keep):
    folder = tmp_path_factory.mktemp("store")
    held = {}
    with CheckpointStore(folder, keep=keep) as store:
        for number, (step, best) in enumerate(saves):
            store.save(step, simple(number), {"value": number}, best=best)
            held[step] = (number, best)
            flagged = [s for s in sorted(held) if held[s][1]]
            stays = {*sorted(held)[-keep:], *flagged[-1:], step}
            held = {s: held[s] for s in stays}
            assert store.steps() == sorted(held)
            found = CheckpointStore.read_best(folder)
            value = None if found is None else found.state["value"]
            assert value == (held[flagged[-1]][0] if flagged else None)


def test_a_damaged_best_one_is_passed_over_aloud(tmp_path):
    with CheckpointStore(tmp_path, keep=4) as store:
        for step in (1, 2, 3):
            store.save(step, simple(step), {}, best=step < 3)
        (tmp_path / "step-00000003" / "ema.safetensors").write_bytes(b"x")
        assert CheckpointStore.read_best(tmp_path).step == 2, "a worse one's damage is no matter"
        (tmp_path / "step-00000002" / "ema.safetensors").write_bytes(b"x")
        with pytest.warns(RuntimeWarning, match="step-00000002/ema"):
            assert CheckpointStore.read_best(tmp_path).step == 1
        (tmp_path / "step-00000001" / "MANIFEST.json").write_bytes(b"x")
        with (
            pytest.warns(RuntimeWarning, match="passed over"),
            pytest.raises(CorruptCheckpointError, match="sound best checkpoint"),
        ):
            CheckpointStore.read_best(tmp_path)


def test_later_ones_are_discarded_only_above_a_sound_one(tmp_path):
    with CheckpointStore(tmp_path, keep=9) as store:
        for step in (1, 2, 3, 4):
            store.save(step, simple(step), {}, best=step == 3)
        (tmp_path / "step-00000001" / "ema.safetensors").write_bytes(b"x")
        for step, kind in ((1, "a damaged one"), (7, "a missing one")):
            with pytest.raises(CheckpointError) as caught:
                store.discard_after(step)
            assert_message(caught.value, "CheckpointStore.discard_after", f"got {step}, {kind}")
        with pytest.raises(InputError, match="step must be at least 0"):
            store.discard_after(-1)
        assert store.steps() == [1, 2, 3, 4]
        assert store.discard_after(2) == [4, 3]
        assert store.steps() == [1, 2]
        assert sorted(os.listdir(tmp_path)) == [".lock", "step-00000001", "step-00000002"]
    with pytest.raises(CheckpointError, match="store must be open"):
        store.discard_after(2)


def test_a_disk_that_refuses_to_discard(tmp_path, monkeypatch):
    class Stubborn(Disk):
        def rename(self, source, target):
            raise PermissionError(13, "Permission denied", f"{source} -> {target}")

    with CheckpointStore(tmp_path) as store:
        for step in (1, 2):
            store.save(step, simple(step), {})
        monkeypatch.setattr(store._writer, "_disk", Stubborn())
        with pytest.raises(CheckpointError, match=r"discard_after: .* must be writable"):
            store.discard_after(1)
        assert store.latest().step == 2


@pytest.mark.parametrize("name", ["read_latest", "read_best"])
def test_a_checkpoint_that_moves_while_it_is_read_is_looked_for_again(tmp_path, monkeypatch, name):
    plain = checkpoint_reader.read_file
    moves = []

    def read_file(owner, path, **limits):
        # the writer replaces the checkpoint between its manifest and its tensors
        if path.name == "ema.safetensors" and len(moves) < 2:
            moves.append(path)
            store.save(1, simple(len(moves)), {"value": len(moves)}, best=True)
        return plain(owner, path, **limits)

    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(0), {"value": 0}, best=True)
        monkeypatch.setattr(checkpoint_reader, "read_file", read_file)
        found = getattr(CheckpointStore, name)(tmp_path)
    assert found.state == {"value": 2}
    assert_same_groups(found.tensors, simple(2))


def test_a_checkpoint_that_never_stays_is_an_error(tmp_path, monkeypatch):
    def gone(owner, path, step):
        path.rename(path.with_name(f"step-{step + 1:08d}"))
        msg = "gone"
        raise CheckpointError(msg)

    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(), {})
    monkeypatch.setattr(checkpoint_reader, "read_manifest", gone)
    with pytest.raises(CorruptCheckpointError, match="one that stays while it is read"):
        CheckpointStore.read_best(tmp_path)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_refused(tmp_path, monkeypatch, number):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoint_writer.fcntl, "flock", refuse)
    with pytest.raises(CheckpointError, match="CheckpointStore: folder must be a writable folder"):
        CheckpointStore(tmp_path)


@pytest.mark.parametrize("which", ["folder", "parent"])
def test_a_folder_on_another_file_system(tmp_path, which):
    # every rename stays inside the folder, so it may lie anywhere
    shared = Path("/dev/shm")
    if not shared.is_dir() or shared.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("no second file system at /dev/shm")
    with tempfile.TemporaryDirectory(dir=shared) as elsewhere:
        link = tmp_path / "run"
        link.symlink_to(elsewhere, target_is_directory=True)
        folder = link if which == "folder" else link / "checkpoints"
        with CheckpointStore(folder) as store:
            for step in range(4):
                store.save(step, simple(step), {}, best=step == 1)
            assert store.steps() == [1, 2, 3]
        assert CheckpointStore.read_best(folder).step == 1


def test_a_read_only_folder_is_refused_and_can_be_read(tmp_path, monkeypatch):
    with CheckpointStore(tmp_path) as store:
        store.save(1, simple(), {})
    plain = os.open

    def read_only(path, flags, *rest):
        # root may write anywhere, so rights alone would not show it
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), os.fspath(path))
        return plain(path, flags, *rest)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore(tmp_path)
    assert_message(caught.value, "writable folder", str(tmp_path), "Read-only file system")
    assert CheckpointStore.read_latest(tmp_path).step == 1
