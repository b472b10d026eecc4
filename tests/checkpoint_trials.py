"""Trials that a checkpoint store must survive: kill -9 during saves, and damaged files.

Kills fork from one process that has torch loaded: starting Python with torch takes seconds.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
import warnings
from pathlib import Path

import torch

from dpsims.errors import CheckpointError, CorruptCheckpointError
from dpsims_reference.checkpoints import CheckpointStore, read_checkpoint

SAVES = 10_000
KINDS = ("flip", "zero", "truncate", "append", "swap", "delete", "swap-whole")


def payload(number):
    tensors = {name: torch.full((30_000,), float(number)) for name in ("generator", "ema")}
    return {name: {"weight": tensor} for name, tensor in tensors.items()}, {"number": number}


def step_of_save(number):
    # every fifth save replaces a checkpoint
    return number - (number % 5 == 0)


def is_best(number):
    return step_of_save(number) % 7 == 3


def save_for_ever(folder, pipe):
    with CheckpointStore(folder) as store:
        for number in range(1, SAVES):
            store.save(step_of_save(number), *payload(number), best=is_best(number))
            os.write(pipe, number.to_bytes(4, "little"))


def kill_trial(folder, delay):
    """One trainer, killed ``delay`` seconds after its first save.

    Returns:
        How many saves had been acknowledged, and what is wrong afterwards.
    """
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        try:
            save_for_ever(folder, writing)
        finally:
            os._exit(1)
    os.close(writing)
    acknowledged = os.read(reading, 4)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while data := os.read(reading, 4000):
        acknowledged = data[-4:]
    os.close(reading)
    saved = int.from_bytes(acknowledged, "little")
    return saved, faults_after(folder, saved)


def faults_after(folder, saved):
    """What is wrong in a folder whose last acknowledged save has the number ``saved``."""
    best = {number for number in range(1, saved + 1) if is_best(number)}
    allowed = {
        "latest": {saved, saved + 1},
        "best": {max(best, default=None)} | ({saved + 1} if is_best(saved + 1) else set()),
    }
    read = {"latest": CheckpointStore.read_latest, "best": CheckpointStore.read_best}
    faults = []
    with warnings.catch_warnings():
        # a damaged checkpoint would be passed over with a warning: after a kill there is none
        warnings.simplefilter("error")
        try:
            # a reader sees the folder as the kill left it; the next trainer tidies it first
            for _ in range(2):
                for name, values in allowed.items():
                    faults += _faults_of(name, read[name](folder), values, saved)
                with CheckpointStore(folder) as store:
                    for step in store.steps():
                        store.load(step)
        except (CheckpointError, RuntimeWarning) as error:
            return [*faults, str(error)]
    extra = [name for name in os.listdir(folder) if not name.startswith((".lock", "step-"))]
    return faults + extra


def _faults_of(name, checkpoint, values, saved):
    if checkpoint is None:
        return [] if None in values else [f"saved {saved}, found no {name} one"]
    number = checkpoint.state["number"]
    tensors = [group["weight"] for group in checkpoint.tensors.values()]
    if number in values and all((tensor == number).all() for tensor in tensors):
        return []
    return [f"saved {saved}, found {number} as {name}, not one of {values}"]


def mutate(kind, folder, other, rng):
    """Damage one file so that its bytes surely differ; returns the file's name.

    Args:
        kind: One of ``KINDS``.
        folder: The checkpoint to damage.
        other: A checkpoint with files of the same names and other bytes.
        rng: A numpy generator.
    """
    names = sorted(os.listdir(folder), reverse=True)
    path = folder / names[rng.integers(len(names))]
    data = bytearray(path.read_bytes())
    at = int(rng.integers(len(data)))
    if kind == "flip":
        data[at] ^= 1 << int(rng.integers(8))
    elif kind == "zero":
        # over zeros a block of zeros would change nothing
        at = next(i for i in range(at, -1, -1) if data[i])
        data[at : at + 16] = bytes(len(data[at : at + 16]))
    elif kind == "truncate":
        del data[at:]
    elif kind == "append":
        data += rng.bytes(int(rng.integers(1, 64)))
    elif kind == "swap":
        data = (folder / names[names.index(path.name) - 1]).read_bytes()
    elif kind == "swap-whole":
        data = (other / path.name).read_bytes()
    path.unlink()
    if kind != "delete":
        path.write_bytes(data)
    return path.name


def mutation_trial(kind, store, work, rng):
    """Damage the newest checkpoint of a copy of ``store``, which holds two or more.

    Returns:
        ``"found"``, or what went wrong.
    """
    older, newest = sorted(store.glob("step-*"))[-2:]
    copy = work / "copy"
    for path in (older, newest):
        shutil.copytree(path, copy / path.name)
    mutate(kind, copy / newest.name, older, rng)
    try:
        read_checkpoint(copy / newest.name)
        return "loaded silently"
    except CorruptCheckpointError:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            found = CheckpointStore.read_latest(copy)
        return "found" if found.step == int(older.name[5:]) else "no fallback"
    finally:
        shutil.rmtree(copy)


def files(folder: Path):
    """The bytes of every file of a checkpoint, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
