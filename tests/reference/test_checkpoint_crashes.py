"""A save that has returned survives a crash at any moment of a later one."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from dpsims_reference.checkpoints import CheckpointStore, writer as checkpoint_writer
from dpsims_reference.checkpoints.disk import Disk

# the third save replaces the second, the fifth and sixth prune, the last one goes back in steps
STEPS = (1, 2, 2, 3, 4, 5, 3)
# saves of the best so far: a first one, one that is replaced, and one that lets another go
BESTS = (0, 1, 2, 5)


class Crash(BaseException):
    """The process is gone: nothing catches this."""


class CrashingDisk(Disk):
    """Stops the process before, in the middle of or after the operation of a given number."""

    def __init__(self, stop, when):
        self.stop, self.when, self.count = stop, when, 0

    def _run(self, name, *values):
        number, self.count = self.count, self.count + 1
        if number > self.stop or (number == self.stop and self.when == "before"):
            raise Crash
        if number == self.stop and self.when == "within":
            self._half(name, *values)
            raise Crash
        # a killed process loses no written byte, so there is no need to wait for the disk
        result = None if name.startswith("sync") else getattr(Disk, name)(self, *values)
        if number == self.stop:
            raise Crash
        return result

    def _half(self, name, *values):
        if name == "write":
            os.write(values[0], values[1][: len(values[1]) // 2])
        elif name == "remove" and values[0].is_dir():
            for path in sorted(values[0].iterdir())[:2]:
                path.unlink()


for _name in ("make_folder", "create", "write", "sync", "sync_folder", "rename", "remove"):
    setattr(CrashingDisk, _name, lambda self, *values, _name=_name: self._run(_name, *values))


def payload(value):
    return {"ema": {"weight": torch.full((2,), float(value))}}, {"value": value}


def run_until_crash(folder):
    """Save until the disk stops; returns the number of saves that returned."""
    done = 0
    store = None
    try:
        store = CheckpointStore(folder)
        for step in STEPS:
            store.save(step, *payload(done), best=done in BESTS)
            done += 1
    except Crash:
        pass
    finally:
        # the kernel frees the lock of a dead process
        if store is not None:
            store.close()
    return done


def assert_survived(folder, done):
    """What was saved last, or was being saved, is whole at its step; nothing else is damaged."""
    allowed = {}
    for number, step in enumerate(STEPS[: done + 1]):
        allowed.setdefault(step, []).append(number)
    if done:
        # the last save that returned may only have been replaced by the one under way
        allowed[STEPS[done - 1]] = [n for n in allowed[STEPS[done - 1]] if n >= done - 1]
    seen = CheckpointStore.read_latest(folder) if folder.exists() else None
    assert_best_survived(folder, done)
    with CheckpointStore(folder) as store:
        steps = store.steps()
        assert [name for name in os.listdir(folder) if name.startswith((".tmp", ".old"))] == []
        for step in steps:
            found = store.load(step)
            assert found.state["value"] in allowed[step]
            assert (found.tensors["ema"]["weight"] == found.state["value"]).all()
        if done:
            assert STEPS[done - 1] in steps
            assert len(steps) >= min(2, len(set(STEPS[:done])))
            assert store.latest().step == seen.step >= STEPS[done - 1]
        assert len(steps) <= 5
        assert_best_survived(folder, done)
        store.save(9, *payload(9))
        assert store.latest().state == {"value": 9}


def assert_best_survived(folder, done):
    """The last best one that was saved, or the one that was being saved, is whole."""
    saved = [number for number in BESTS if number < done]
    found = CheckpointStore.read_best(folder) if folder.exists() else None
    if found is None:
        assert not saved
    else:
        assert found.state["value"] in {*saved[-1:], done} & set(BESTS)
        assert (found.tensors["ema"]["weight"] == found.state["value"]).all()


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_every_crash_point(tmp_path, monkeypatch, when):
    points = 0
    while True:
        disk = CrashingDisk(points, when)
        monkeypatch.setattr(checkpoint_writer, "Disk", lambda disk=disk: disk)
        folder = tmp_path / str(points)
        done = run_until_crash(folder)
        if disk.count <= points:
            break
        monkeypatch.setattr(checkpoint_writer, "Disk", lambda: CrashingDisk(10**9, "never"))
        assert_survived(folder, done)
        points += 1
    assert done == len(STEPS)
    assert points > 100, "the operations of seven saves"


class InterruptingDisk(CrashingDisk):
    """Raises once, before, in the middle of or after one operation; the process lives on."""

    def _run(self, name, *values):
        number, self.count = self.count, self.count + 1
        if number != self.stop:
            return getattr(Disk, name)(self, *values)
        if self.when == "within":
            self._half(name, *values)
        elif self.when == "after":
            getattr(Disk, name)(self, *values)
        raise KeyboardInterrupt


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_an_interrupt_at_every_moment_of_a_save_that_prunes(tmp_path, monkeypatch, when):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for stop in itertools.count():
        with CheckpointStore(tmp_path / str(stop)) as store:
            for step in (1, 2, 3):
                store.save(step, *payload(step), best=step == 2)
            disk = InterruptingDisk(stop, when)
            monkeypatch.setattr(store._writer, "_disk", disk)
            try:
                store.save(4, *payload(4), best=True)
                break
            except KeyboardInterrupt:
                monkeypatch.setattr(store._writer, "_disk", Disk())
            assert store.latest().step in (3, 4)
            assert CheckpointStore.read_best(store.folder).step in (2, 4)
            for step in store.steps():
                store.load(step)
            store.save(4, *payload(5), best=True)
            assert store.steps() == [3, 4]
            assert sorted(os.listdir(store.folder)) == [".lock", "step-00000003", "step-00000004"]
    # a folder, three files of three operations, its names, one renaming, one old one removed
    assert disk.count == stop == 1 + 3 * 3 + 1 + 2 + 2


@pytest.mark.parametrize("when", ["before", "within", "after"])
def test_a_crash_while_later_ones_are_discarded(tmp_path, monkeypatch, when):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for stop in itertools.count():
        folder = tmp_path / str(stop)
        monkeypatch.setattr(checkpoint_writer, "Disk", Disk)
        with CheckpointStore(folder, keep=5) as store:
            for step in (1, 2, 3, 4, 5):
                store.save(step, *payload(step), best=step == 4)
            disk = CrashingDisk(stop, when)
            monkeypatch.setattr(store._writer, "_disk", disk)
            try:
                assert store.discard_after(2) == [5, 4, 3]
                break
            except Crash:
                pass
        with CheckpointStore(folder) as store:
            assert store.latest().step in (2, 3, 4, 5)
            store.discard_after(2)
            assert store.steps() == [1, 2]
            assert CheckpointStore.read_best(folder) is None
    assert stop == 7, "two for each of three checkpoints, and a wait for the disk"


def test_a_crash_while_tidying_up_after_a_crash(tmp_path, monkeypatch):
    def with_disk(stop, when):
        monkeypatch.setattr(checkpoint_writer, "Disk", lambda: CrashingDisk(stop, when))

    unfinished = {}
    for stop in range(0, 120, 3):
        with_disk(stop, "after")
        folder = tmp_path / str(stop)
        done = run_until_crash(folder)
        left = [name for name in os.listdir(folder) if name.startswith((".tmp", ".old"))]
        if left:
            unfinished[stop] = (folder, done)
    assert any((folder / ".old-step-00000002").exists() for folder, _ in unfinished.values())
    for folder, done in unfinished.values():
        for stop in range(4):
            with_disk(stop, ("before", "after")[stop % 2])
            with pytest.raises(Crash):
                CheckpointStore(folder).save(9, *payload(9))
        with_disk(10**9, "never")
        assert_survived(folder, done)


class Recorder(Disk):
    """Does everything, and keeps a log of it; ``entries`` name folders by identity."""

    def __init__(self):
        self.log = []
        self.files = {}

    def create(self, path):
        descriptor = super().create(path)
        self.files[descriptor] = path
        self.log.append(("create", path))
        return descriptor

    def write(self, descriptor, data):
        super().write(descriptor, data)
        self.log.append(("write", self.files[descriptor], data))

    def sync(self, descriptor):
        self.log.append(("sync", self.files[descriptor]))

    def make_folder(self, path):
        super().make_folder(path)
        self.log.append(("make_folder", path))

    def sync_folder(self, path):
        self.log.append(("sync_folder", path))

    def rename(self, source, target):
        super().rename(source, target)
        self.log.append(("rename", source, target))

    def remove(self, path):
        names = sorted(entry.name for entry in path.iterdir())
        super().remove(path)
        self.log += [("unlink", path / name) for name in names]
        self.log.append(("remove", path))


def unsafe_operations(log):
    """Which operations of a log may be lost in a loss of power: no later sync covers them."""
    lost = []
    files, folders = set(), set()
    for number in range(len(log) - 1, -1, -1):
        kind, path, *_ = log[number]
        if kind == "sync":
            files.add(path)
        elif kind == "sync_folder":
            folders.add(path)
        elif (kind == "write" and path not in files) or (
            kind != "write" and kind != "acknowledge" and path.parent not in folders
        ):
            lost.append(number)
    return lost


def replay(log, lost, root):
    """Build the folder that is on the disk after power came back.

    A folder keeps its identity when it is renamed: what was removed from it is gone from it even
    if the renaming itself was lost.
    """
    inodes, live, disk = {}, {root: "root"}, {"root": {}}
    for number, (kind, path, *rest) in enumerate(log):
        keeps = number not in lost
        if kind == "make_folder":
            inode = f"folder{number}"
            live[path], disk[inode] = inode, {}
            if keeps:
                disk["root"][path.name] = inode
        elif kind == "rename":
            inode = live[rest[0]] = live.pop(path)
            if keeps:
                disk["root"] = {n: i for n, i in disk["root"].items() if i != inode}
                disk["root"][rest[0].name] = inode
        elif kind == "remove" and keeps:
            disk["root"] = {n: i for n, i in disk["root"].items() if i != live[path]}
        elif kind == "create":
            inodes[path] = bytearray()
            if keeps:
                disk[live[path.parent]][path.name] = inodes[path]
        elif kind == "write" and keeps:
            inodes[path] += rest[0]
        elif kind == "unlink" and keeps:
            disk[live[path.parent]].pop(path.name, None)
    return {name: disk[inode] for name, inode in disk["root"].items()}


def materialise(folder, content):
    folder.mkdir()
    for name, files in content.items():
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)


def losses(log, rng):
    """All lost, none lost, and some random choices of what a power failure takes."""
    unsafe = unsafe_operations(log)
    yield set(unsafe)
    yield set()
    for _ in range(2):
        yield {number for number in unsafe if rng.random() < 0.5}


@pytest.mark.filterwarnings("ignore:.*passed over a damaged checkpoint")
def test_loss_of_power_at_every_moment(tmp_path, monkeypatch):
    disk = Recorder()
    monkeypatch.setattr(checkpoint_writer, "Disk", lambda: disk)
    root = tmp_path / "store"
    root.mkdir()
    with CheckpointStore(root) as store:
        for number, step in enumerate(STEPS):
            store.save(step, *payload(number), best=number in BESTS)
            disk.log.append(("acknowledge", root, number))
    log = disk.log
    rng = np.random.default_rng(0)
    monkeypatch.setattr(checkpoint_writer, "Disk", Disk)
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    trials = 0
    for length in range(len(log) + 1):
        done = 1 + max((e[2] for e in log[:length] if e[0] == "acknowledge"), default=-1)
        for lost in losses(log[:length], rng):
            folder = tmp_path / f"{length}-{trials}"
            materialise(folder, replay(log[:length], lost, root))
            trials += 1
            if not done:
                continue
            # a checkpoint that pruning was removing may be found half removed, below the others
            with CheckpointStore(folder) as store:
                found = store.load(STEPS[done - 1])
                assert found.state["value"] in (done - 1, done)
                assert store.latest().step >= found.step
            assert_best_survived(folder, done)
    assert trials > 400


@pytest.fixture(scope="module")
def trials():
    script = Path(__file__).with_name("_crash_trials.py")
    result = subprocess.run(
        [sys.executable, "-W", "error", str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


def test_kill_at_random_moments(trials):
    assert [faults for _, faults in trials["kills"]] == [[]] * 100
    assert sum(saved for saved, _ in trials["kills"]) > 300, "kills that find nothing to break"


def test_no_pickle_is_ever_opened(trials):
    report = trials["audit"]
    assert report["events"] == []
    assert report["marker"] is False
    assert sorted(set(report["refused"])) == ["CorruptCheckpointError", "UnsafeCheckpointError"]
    assert len(report["refused"]) == 7
