"""``make soak``: what only many steps, kills and damaged files show. Takes about ten minutes.

Writes ``soak.json`` into the folder of the run, part by part, prints a table, and ends with exit
code 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import shutil
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from checkpoint_trials import KINDS, kill_trial, mutation_trial
from unit_run import small_config

from dpsims.data import LabelSpec
from dpsims_reference import probes
from dpsims_reference.best import BestFigure
from dpsims_reference.data.sample import Sample, flip_sample, random_below
from dpsims_reference.trainer import Trainer

PARTS = ("steps", "kills", "mutations")
# growth that counts as none, between the middle and the end of the run
MIB_PER_1000_STEPS, OBJECTS = 1.0, 200
PAGE = os.sysconf("SC_PAGE_SIZE")


class Pictures:
    """Pictures of noise in memory: a step costs the time of the networks alone."""

    def __init__(self, config):
        rng = torch.Generator().manual_seed(0)
        self.spec, self.image_size = LabelSpec(config.num_classes), config.image_size
        size = (config.num_scenes, *config.image_size)
        self.images = torch.rand(size[0], 3, *size[1:], generator=rng) * 2 - 1
        self.labels = torch.randint(config.num_classes, size, dtype=torch.uint8, generator=rng)

    def __len__(self):
        return len(self.images)

    def view(self, index):
        return Sample(self.images[index], self.labels[index])

    def draw(self, index, generator):
        sample = self.view(index)
        return flip_sample(sample) if random_below(2, generator) else sample

    def presence(self):
        classes = torch.arange(self.spec.num_classes)
        return (self.labels.flatten(1)[:, :, None] == classes).any(1)

    def fingerprint(self):
        return "noise"


def train(folder, steps, *, watch=None, **options):
    config = small_config(steps=steps)
    trainer = Trainer(config, Pictures(config.data), folder, best=BestFigure("g_pixel"))
    if watch is not None:
        update = trainer.ema.update

        def watched(generator):
            update(generator)
            watch(trainer.step + 1)

        trainer.ema.update = watched
    trainer.run(**options)
    trainer.store.close()


def measured(step, started):
    """What must not grow; the collection makes the count exact."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "step": step,
        "rss_mib": round(pages * PAGE / 2**20, 2),
        "objects": len(gc.get_objects()),
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "seconds": round(time.monotonic() - started, 1),
    }


def soak_steps(folder, count):
    """Train, with pictures, checkpoints and the best one, and watch the memory."""
    marks, found, started = (count // 10, count // 2, count), [], time.monotonic()

    def watch(step):
        if step in marks:
            found.append(measured(step, started))

    shutil.rmtree(folder / "steps", ignore_errors=True)
    every = max(count // 20, 1)
    train(folder / "steps", count, watch=watch, save_every=every, picture_every=2 * every)
    _, middle, end = found
    thousands = (end["step"] - middle["step"]) / 1000
    slope = (end["rss_mib"] - middle["rss_mib"]) / thousands
    return {
        "marks": found,
        "mib_per_1000_steps": round(slope, 3),
        "sound": slope <= MIB_PER_1000_STEPS
        and end["objects"] - middle["objects"] <= OBJECTS
        and end["descriptors"] == middle["descriptors"]
        and end["threads"] == middle["threads"],
    }


def soak_kills(folder, count):
    """Kill -9 a process that saves, at a random moment, and look at what is left."""
    draw, found, started = random.Random(0), [], time.monotonic()
    for _ in range(count):
        shutil.rmtree(folder / "kills", ignore_errors=True)
        found.append(kill_trial(folder / "kills", draw.uniform(0, 0.08)))
    shutil.rmtree(folder / "kills", ignore_errors=True)
    faults = [text for _, texts in found for text in texts]
    return {
        "trials": count,
        "saves": sum(saved for saved, _ in found),
        "faulty_trials": sum(bool(texts) for _, texts in found),
        "faults": faults[:20],
        "seconds": round(time.monotonic() - started, 1),
        "sound": not faults,
    }


def soak_mutations(folder, count):
    """Damage copies of a trainer's newest checkpoint and try to load them."""
    work, rng, started = folder / "mutations", np.random.default_rng(0), time.monotonic()
    shutil.rmtree(work, ignore_errors=True)
    train(work / "run", 4, save_every=2)
    found = {kind: Counter() for kind in KINDS}
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        found[kind][mutation_trial(kind, work / "run" / "checkpoints", work, rng)] += 1
    total = sum(found.values(), Counter())
    shutil.rmtree(work)
    return {
        "trials": count,
        "found": total["found"],
        "by_kind": {kind: dict(counts) for kind, counts in found.items()},
        "seconds": round(time.monotonic() - started, 1),
        "sound": total["found"] == count,
    }


def table(report):
    """The report as Markdown."""
    lines = ["| part | what | found |", "|---|---|---|"]
    if steps := report.get("steps"):
        lines += [
            f"| steps | after step {m['step']} | {m['rss_mib']} MiB, {m['objects']} objects, "
            f"{m['descriptors']} descriptors, {m['threads']} threads |"
            for m in steps["marks"]
        ]
        lines.append(f"| steps | growth | {steps['mib_per_1000_steps']} MiB per 1,000 steps |")
    if kills := report.get("kills"):
        what = f"{kills['trials']} kills -9 over {kills['saves']} saves"
        lines.append(f"| kills | {what} | {kills['faulty_trials']} with a fault |")
    if mutations := report.get("mutations"):
        missed = mutations["trials"] - mutations["found"]
        lines.append(f"| mutations | {mutations['trials']} damaged | {missed} not found |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/soak"))
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--mutations", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # the averages of a checkpoint over few maps: the steps are what is tried here
    probes.RECALIBRATION_MAPS = probes.CALIBRATION_MAPS = 8
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "soak.json"
    report = json.loads(path.read_text()) if path.is_file() else {}
    report["machine"] = {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "system": platform.platform(),
    }
    parts = {"kills": soak_kills, "mutations": soak_mutations, "steps": soak_steps}
    # kills first: they fork, and no thread may run yet
    for name, part in parts.items():
        if name in options.parts:
            report[name] = part(options.out, getattr(options, name))
            path.write_text(json.dumps(report, indent=2) + "\n")
    sys.stdout.write(f"\n{table(report)}\n\nwritten to {path}\n")
    return 0 if all(report[name]["sound"] for name in options.parts) else 1


if __name__ == "__main__":
    sys.exit(main())
