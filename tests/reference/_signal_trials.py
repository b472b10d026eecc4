"""Signals to real training processes; run as a program. Each trial is a fork of this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import replace
from pathlib import Path

import torch
from unit_run import small_config

from dpsims_reference import cli, options, probes, verbs
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.checkpoints.disk import Disk
from dpsims_reference.datasets import build_dataset
from dpsims_reference.steps import TrainingStep

INT, TERM, USR1, KILL = signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGKILL
# where the trainer is when each signal comes and to whom it goes; loader processes; save_every
TRIALS = {
    "ctrl-c": ([("step", INT, "trainer")], 0, 100),
    "SIGTERM-to-every-process": ([("step", TERM, "group")], 2, 100),
    "ctrl-c-to-every-process": ([("step", INT, "group")], 2, 100),
    "SIGUSR1-while-waiting-for-data": ([("data", USR1, "trainer")], 0, 100),
    "ctrl-c-again-during-the-save": (
        [("step", INT, "trainer"), ("save", INT, "trainer"), ("save", INT, "trainer")],
        0,
        100,
    ),
    "SIGTERM-during-a-regular-save": ([("save", TERM, "trainer")], 0, 1),
    "SIGTERM-twice": ([("step", TERM, "trainer"), ("step", TERM, "trainer")], 0, 100),
    "ctrl-c-twice": ([("step", INT, "trainer"), ("step", INT, "trainer")], 0, 1),
    "loader-process-killed": ([("step", KILL, "worker")], 2, 1),
}


class Child:
    """The training process: the command line, stopping where signals are awaited."""

    def __init__(self, told, go):
        self.told, self.go, self.process, self.step = told, go, os.getpid(), 0

    def tell(self, where):
        """Say where the trainer is, and wait until the parent has done what it wants."""
        if os.getpid() == self.process:
            os.write(self.told, f"{where}\n".encode())
            os.read(self.go, 1)

    def main(self, folder, workers, save_every):
        child, plain_call, plain_write = self, TrainingStep.__call__, Disk.write
        config = small_config(steps=6)
        config = replace(config, data=replace(config.data, workers=workers))
        dataset = build_dataset(config.data)
        plain_draw = dataset.draw

        def draw(index, generator):
            if child.step == 2:
                child.tell("data")
            return plain_draw(index, generator)

        def call(update, batch, step):
            if step == 2:
                # twice: a second signal may be awaited in the same step
                child.tell("step")
                child.tell("step")
            terms = plain_call(update, batch, step)
            child.step = step + 1
            return terms

        def write(disk, descriptor, data):
            child.tell("save")
            plain_write(disk, descriptor, data)

        dataset.draw, TrainingStep.__call__, Disk.write = draw, call, write
        probes.RECALIBRATION_MAPS = probes.CALIBRATION_MAPS = 4
        verbs.build_dataset = lambda *_, **__: dataset
        verbs.plot_curves = lambda *_: None
        cli._PARSERS["train"] = lambda _: options.Train(
            config=config, out=folder, device="cpu", save_every=save_every, picture_every=100
        )
        cli.main(["train"])


def start(folder, workers, save_every):
    """Fork a trainer; returns its process, what it tells and what lets it go on."""
    told, tells = os.pipe()
    goes, go = os.pipe()
    process = os.fork()
    if process:
        os.close(tells)
        os.close(goes)
        return process, os.fdopen(told), go
    code = 1
    try:
        os.setpgid(0, 0)
        output = os.open(folder.with_suffix(".txt"), os.O_CREAT | os.O_WRONLY)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(told)
        os.close(go)
        Child(tells, goes).main(folder, workers, save_every)
        code = 0
    except SystemExit as error:
        code = error.code
    finally:
        if code == 1:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def send(process, number, target):
    if target == "group":
        os.killpg(process, number)
    elif target == "worker":
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        os.kill(int(children[0]), number)
    else:
        os.kill(process, number)


def trial(folder, script, workers, save_every):
    started = time.monotonic()
    process, told, go = start(folder, workers, save_every)
    script = list(script)
    for line in told:
        if script and line.strip() == script[0][0]:
            _, number, target = script.pop(0)
            send(process, number, target)
            # the handler runs while the child still waits here
            time.sleep(0.05)
        # a trainer that has just died reads no more
        with contextlib.suppress(BrokenPipeError):
            os.write(go, b".")
    _, status = os.waitpid(process, 0)
    store = CheckpointStore.read_latest(folder / "checkpoints")
    return {
        "unsent": len(script),
        "code": os.waitstatus_to_exitcode(status),
        "step": store and store.step,
        "entries": sorted(os.listdir(folder / "checkpoints")),
        "output": folder.with_suffix(".txt").read_text(),
        "seconds": time.monotonic() - started,
    }


def main():
    torch.set_num_threads(1)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    with tempfile.TemporaryDirectory() as name:
        found = {title: trial(Path(name) / title, *options) for title, options in TRIALS.items()}
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
