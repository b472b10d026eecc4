"""Ctrl-C, SIGTERM and SIGUSR1 as a wish to stop: between two steps, and with a checkpoint."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

# what a terminal, a scheduler that preempts, and SLURM's --signal=USR1@... send
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequested(BaseException):
    """A signal came while the loop waited for data.

    As ``KeyboardInterrupt``, it is no ``Exception``: the loader would replace it by its own error
    when the signal has ended a worker, too.
    """


class StopSignals:
    """Turns the signals that stop a run into a wish, and never lets one tear a step or a save.

    The first signal is noted; the loop looks at :attr:`requested` after each step. While the loop
    waits for data nothing is half done, so there the wait ends at once. A second Ctrl-C during a
    step leaves without saving; a second SIGTERM does not, for schedulers send it twice. During a
    save every signal is only noted.

    Note:
        Python lets only the main thread set handlers: in any other one, nothing is changed.

    Example:
        >>> import signal
        >>> with StopSignals() as stop:
        ...     signal.raise_signal(signal.SIGTERM)
        ...     stop.requested
        'SIGTERM'
    """

    def __init__(self) -> None:
        self.requested: str | None = None
        self._waiting = self._saving = False
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in STOPPING}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            # None stands for a handler that Python did not set and cannot set again
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around waiting for data: a signal raises :class:`StopRequested` here."""
        self._waiting = True
        try:
            yield
        finally:
            self._waiting = False

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a save: signals are noted, and nothing else."""
        self._saving = True
        try:
            yield
        finally:
            self._saving = False

    def _note(self, number: int, _: FrameType | None) -> None:
        # a loader process that has just been forked still has this handler
        if os.getpid() != self._process:
            return
        again, self.requested = self.requested, self.requested or signal.Signals(number).name
        if self._saving:
            _say("the checkpoint is being written; the run stops after it")
        elif self._waiting:
            raise StopRequested
        elif again is None:
            _say(f"{self.requested}: stopping after this step, with a checkpoint")
        elif number == signal.SIGINT:
            raise KeyboardInterrupt


def _say(text: str) -> None:
    # print() may be what the signal interrupted, and must not be entered twice
    os.write(2, f"\n{text}\n".encode())


def spare_worker(_: int) -> None:
    """Leave Ctrl-C and preemption to the trainer: for ``DataLoader(worker_init_fn=...)``.

    A terminal and a scheduler signal every process. A worker that died of it would make the
    loader raise in the middle of a step or of a save.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # not ignored: the loader itself ends a worker that hangs by SIGTERM
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
