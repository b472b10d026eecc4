"""Kill -9 and hostile-file trials; run as a program, in a process that may die or be watched."""

import json
import os
import pickle
import random
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from checkpoint_trials import kill_trial

from dpsims.errors import CheckpointError
from dpsims_reference.checkpoints import read_checkpoint
from dpsims_reference.checkpoints.manifest import describe, seal

KILLS = 100


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
        kills = []
        for _ in range(KILLS):
            # some saves long, so that the kill falls anywhere in one
            kills.append(kill_trial(root / "run", draw.uniform(0, 0.08)))
            shutil.rmtree(root / "run")
        audit = audit_trial(root)
    sys.stdout.write(json.dumps({"kills": kills, "audit": audit}))


if __name__ == "__main__":
    main()
