"""Kill -9 and hostile-file trials; run as a program, in a process that may die or be watched.

Forks from one process that has torch loaded: starting Python with torch takes seconds.
"""

import json
import os
import pickle
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

import torch

from dpsims.errors import CheckpointError
from dpsims_reference.checkpoints import CheckpointStore, read_checkpoint
from dpsims_reference.checkpoints.manifest import describe, seal

SAVES = 10_000


def payload(step):
    tensors = {name: torch.full((30_000,), float(step)) for name in ("generator", "ema")}
    return {name: {"weight": tensor} for name, tensor in tensors.items()}, {"step": step}


def save_for_ever(folder, pipe):
    with CheckpointStore(folder) as store:
        for step in range(1, SAVES):
            # every fifth save replaces a checkpoint
            store.save(step - (step % 5 == 0), *payload(step))
            os.write(pipe, step.to_bytes(4, "little"))


def kill_trial(folder, delay):
    """One trainer, killed ``delay`` seconds after its first save; returns its faults."""
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
    faults = []
    try:
        # a reader sees the folder as the kill left it; the next trainer tidies it first
        found = [CheckpointStore.read_latest(folder)]
        with CheckpointStore(folder) as store:
            found.append(store.latest())
    except CheckpointError as error:
        return [str(error)]
    for checkpoint in found:
        value = checkpoint.state["step"]
        tensors = [group["weight"] for group in checkpoint.tensors.values()]
        if value not in (saved, saved + 1) or not all((t == value).all() for t in tensors):
            faults.append(f"saved {saved}, found {value}")
    extra = [name for name in os.listdir(folder) if not name.startswith((".lock", "step-"))]
    return faults + extra


class Attack:
    """Unpickling this would make the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def audit_trial(folder):
    """Load pickles under every name a checkpoint has; returns what was refused and what ran."""
    marker = str(folder / "marker")
    pickled = pickle.dumps({"weight": Attack(marker)})
    torch.save({"weight": Attack(marker)}, folder / "model.pt")
    zipped = (folder / "model.pt").read_bytes()
    seen = []
    refused = []
    watched = ("pickle.", "os.system", "subprocess.", "socket.", "os.exec", "os.posix_spawn")
    sys.addaudithook(
        lambda event, _: (
            seen.append(event) if event.startswith(watched) or event == "os.mkdir" else None
        )
    )
    for number, data in enumerate((pickled, zipped)):
        for name in ("ema.safetensors", "state.json", "MANIFEST.json"):
            path = folder / f"attack-{number}-{name}"
            path.mkdir()
            seen.clear()
            files = {"state.json": b"{}", name: data}
            entries = {file: vars(describe(text)) for file, text in files.items()}
            body = {"best": False, "files": entries, "format": "dpsims-checkpoint"}
            files.setdefault("MANIFEST.json", seal({**body, "step": 1, "version": [1, 0]}))
            for file, text in files.items():
                (path / file).write_bytes(text)
            try:
                read_checkpoint(path)
            except CheckpointError as error:
                refused.append(type(error).__name__)
    try:
        read_checkpoint(folder / "model.pt")
    except CheckpointError as error:
        refused.append(type(error).__name__)
    return {"refused": refused, "events": seen, "marker": Path(marker).exists()}


def main():
    torch.set_num_threads(1)
    draw = random.Random(0)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        kills = [kill_trial(root / f"run{i}", draw.uniform(0, 0.08)) for i in range(20)]
        audit = audit_trial(root)
    sys.stdout.write(json.dumps({"kills": kills, "audit": audit}))


if __name__ == "__main__":
    main()
