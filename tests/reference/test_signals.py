"""A signal never tears a step or a checkpoint, and the run says how to go on."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpsims_reference.signals import STOPPING, StopRequested, StopSignals


@pytest.fixture(scope="module")
def trials():
    script = Path(__file__).with_name("_signal_trials.py")
    result = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    return json.loads(result.stdout)


# exit code, step of the newest checkpoint, what the run says
WANTED = {
    "ctrl-c": (0, 3, "stopped by SIGINT after step 3"),
    "SIGTERM-to-every-process": (0, 3, "stopped by SIGTERM after step 3"),
    "ctrl-c-to-every-process": (0, 3, "stopped by SIGINT after step 3"),
    "SIGUSR1-while-waiting-for-data": (0, 2, "stopped by SIGUSR1 after step 2"),
    "ctrl-c-again-during-the-save": (0, 3, "the checkpoint is being written"),
    "SIGTERM-during-a-regular-save": (0, 1, "stopped by SIGTERM after step 1"),
    "SIGTERM-twice": (0, 3, "stopped by SIGTERM after step 3"),
    "ctrl-c-twice": (130, 2, "left at once"),
    "loader-process-killed": (1, 2, "DataLoader worker"),
}


@pytest.mark.parametrize("name", WANTED)
def test_signal(trials, name):
    found = trials[name]
    code, step, text = WANTED[name]
    assert found["unsent"] == 0, found
    assert (found["code"], found["step"]) == (code, step), found["output"]
    assert text in found["output"]
    assert ("train --resume" in found["output"]) is (code == 0)
    assert not [entry for entry in found["entries"] if entry.startswith((".tmp", ".old"))]
    assert found["seconds"] < 120


def test_every_trial_is_checked(trials):
    assert trials.keys() == WANTED.keys()


def test_handlers_are_put_back():
    before = [signal.getsignal(number) for number in STOPPING]
    with StopSignals() as stop:
        assert all(signal.getsignal(number) == stop._note for number in STOPPING)
    assert [signal.getsignal(number) for number in STOPPING] == before


def test_the_first_signal_is_the_one_that_is_named(capfd):
    with StopSignals() as stop:
        assert stop.requested is None
        signal.raise_signal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested == "SIGUSR1"
    assert capfd.readouterr().err.count("stopping after this step") == 1


def test_a_second_ctrl_c_leaves_unless_a_save_is_under_way(capfd):
    with StopSignals() as stop:
        with stop.saving():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err.count("is being written") == 2
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("number", STOPPING)
def test_waiting_ends_at_once_and_only_waiting(number):
    with StopSignals() as stop:
        with pytest.raises(StopRequested), stop.waiting():
            signal.raise_signal(number)
        assert stop.requested == signal.Signals(number).name
    assert not issubclass(StopRequested, Exception)


def test_other_threads_change_nothing():
    before = [signal.getsignal(number) for number in STOPPING]
    seen = []

    def work():
        with StopSignals() as stop:
            seen.append(([signal.getsignal(number) for number in STOPPING], stop.requested))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]


def test_a_forked_process_does_not_speak_for_the_trainer(monkeypatch):
    with StopSignals() as stop:
        monkeypatch.setattr(os, "getpid", lambda: 1)
        with stop.waiting():
            signal.raise_signal(signal.SIGTERM)
        assert stop.requested is None


def test_a_worker_ignores_ctrl_c_and_ends_quietly_by_sigterm():
    # a process of its own: pytest's has threads, and must not be forked
    program = (
        "import signal, dpsims_reference.signals as signals\n"
        "signals.spare_worker(0)\n"
        "for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):\n"
        "    print(number.name, flush=True)\n"
        "    signal.raise_signal(number)\n"
        "raise SystemExit(1)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.split() == [b"SIGINT", b"SIGUSR1", b"SIGTERM"]
