"""Checkpoints that survive a kill, a full disk and a flipped bit, and that cannot run code.

A checkpoint is a folder ``step-00012345`` with one safetensors file per group of tensors, a
``state.json`` and a ``MANIFEST.json`` that gives size and SHA-256 of every file and ends with its
own digest. It is written under a temporary name, made durable, and renamed; older ones are removed
after that. Digests find damage, not an attacker who rewrites files and manifest alike; against
those stands that nothing is ever unpickled and no file outside the folder is ever opened.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from torch import Tensor

from dpsims._checks import check_int
from dpsims.errors import CheckpointError, DTypeError
from dpsims_reference.checkpoints.module import (
    load_module_ as load_module_,
    module_tensors as module_tensors,
)
from dpsims_reference.checkpoints.optimizer import (
    load_optimizer_ as load_optimizer_,
    optimizer_tensors as optimizer_tensors,
)
from dpsims_reference.checkpoints.reader import (
    Checkpoint as Checkpoint,
    candidates,
    read_checkpoint as read_checkpoint,
    read_newest,
)
from dpsims_reference.checkpoints.strict_json import encode_json
from dpsims_reference.checkpoints.writer import FolderWriter

_SAVE, _LOAD = "CheckpointStore.save", "CheckpointStore.load"
_DISCARD = "CheckpointStore.discard_after"


class CheckpointStore:
    """The checkpoints of one run, in one folder, written by one process.

    A save that has returned is never lost: not by a kill or a loss of power at any moment of a
    later save, not by a full disk, not by pruning. Whatever loads is bit for bit what was saved.

    Args:
        folder: Where the checkpoints are; made if missing.
        keep: How many sound checkpoints stay, newest first. The newest one saved with
            ``best=True`` and the one just saved stay beside them.

    Raises:
        InputError: ``keep`` below 2.
        CheckpointError: The folder cannot be written, or another process has it open.

    Note:
        The lock is an advisory ``flock`` and ends with the process, and with its forked children:
        workers that outlive a killed trainer hold it for some seconds more. On many machines only
        one process opens the store; the others use :meth:`read_latest` or :func:`read_checkpoint`,
        which need no lock. Writing holds one group of tensors in memory, as bytes. POSIX only.

    Source:
        Not from the paper.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.TemporaryDirectory()
        >>> with folder as name, CheckpointStore(name) as store:
        ...     path = store.save(7, {"ema": {"weight": torch.ones(2)}}, {"epoch": 1})
        ...     checkpoint = store.latest()
        >>> path.name, checkpoint.state, checkpoint.tensors["ema"]["weight"]
        ('step-00000007', {'epoch': 1}, tensor([1., 1.]))
    """

    def __init__(self, folder: str | Path, *, keep: int = 2) -> None:
        check_int("CheckpointStore", "keep", keep, minimum=2)
        self.folder, self.keep = Path(folder), keep
        self._writer = FolderWriter(self.folder, keep)

    def save(
        self,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: dict[str, Any],
        *,
        best: bool = False,
    ) -> Path:
        """Write one checkpoint; when this returns, it is safe.

        Args:
            step: Its number. A checkpoint of the same step is replaced once the new one is safe.
            tensors: Groups of tensors; each group becomes one file. Tensors that share memory are
                written separately.
            state: Everything else, as JSON values: no tuples, no NaN.
            best: Whether to keep it until a newer best one is saved.

        Returns:
            The checkpoint's folder.

        Raises:
            InputError: A name or a number that a checkpoint cannot hold.
            DTypeError: A value that a checkpoint cannot hold.
            CheckpointError: The disk is full or refuses; earlier checkpoints are as they were.
            UnsafeCheckpointError: A link or a file has the checkpoint's name.
        """
        check_int(_SAVE, "step", step, minimum=0)
        if not isinstance(tensors, Mapping) or type(state) is not dict or type(best) is not bool:
            kinds = ", ".join(type(value).__name__ for value in (tensors, state, best))
            msg = f"{_SAVE}: tensors, state, best must be a dict, a dict and a bool; got {kinds}"
            raise DTypeError(msg)
        text = encode_json(_SAVE, "state", state)
        target = self._writer.write(step, tensors, text, best=best)
        try:
            self._writer.prune(step)
        except CheckpointError as error:
            complaint = f"{_SAVE}: {target} is safe, but older ones stay: {error}"
            warnings.warn(complaint, RuntimeWarning, stacklevel=2)
        return target

    def latest(self) -> Checkpoint | None:
        """The sound checkpoint of the highest step, or ``None`` if there is no checkpoint.

        Every damaged one above it is named in a ``RuntimeWarning``.

        Raises:
            CorruptCheckpointError: There are checkpoints, and all are damaged: a run must not
                start again from nothing without being told.
            IncompatibleCheckpointError: The newest one was written by a newer version.
        """
        return read_newest("CheckpointStore.latest", self.folder)

    @staticmethod
    def read_latest(folder: str | Path) -> Checkpoint | None:
        """As :meth:`latest`, for a folder that another process may have open."""
        return read_newest("CheckpointStore.read_latest", Path(folder))

    @staticmethod
    def read_best(folder: str | Path) -> Checkpoint | None:
        """The newest sound checkpoint that was saved with ``best=True``, or ``None``.

        Every damaged one above it is named in a ``RuntimeWarning``. Needs no lock.

        Raises:
            CorruptCheckpointError: No best one is sound, and some checkpoints are damaged.
            IncompatibleCheckpointError: One above it was written by a newer version.
        """
        return read_newest("CheckpointStore.read_best", Path(folder), best=True)

    @staticmethod
    def read_step(folder: str | Path, step: int) -> Checkpoint:
        """The checkpoint of one step, in a folder that another process may have open.

        Raises:
            CheckpointError: There is none, or it is damaged, unsafe or too new.
        """
        return _read_step("CheckpointStore.read_step", Path(folder), step)

    def load(self, which: int | str | Path) -> Checkpoint:
        """Read one checkpoint.

        Args:
            which: Its step, or its folder, which may lie anywhere.

        Raises:
            CheckpointError: There is none, or it is damaged, unsafe or too new; see
                :func:`read_checkpoint`.
        """
        if not isinstance(which, int):
            return read_checkpoint(which, owner=_LOAD)
        return _read_step(_LOAD, self.folder, which)

    def steps(self) -> list[int]:
        """Steps of the checkpoints in the folder, damaged ones included, oldest first."""
        return [step for step, _ in reversed(candidates("CheckpointStore.steps", self.folder))]

    def discard_after(self, step: int) -> list[int]:
        """Remove every checkpoint above ``step``, best ones too, to go on from ``step``.

        Args:
            step: The step of a sound checkpoint; it stays, and so do those below it.

        Returns:
            The steps that were removed, newest first.

        Raises:
            CheckpointError: The checkpoint of ``step`` is missing or damaged (nothing has been
                removed), or the disk refuses.
        """
        check_int(_DISCARD, "step", step, minimum=0)
        return self._writer.discard_after(step)

    def close(self) -> None:
        """Give the folder free; reading goes on to work."""
        self._writer.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _read_step(owner: str, folder: Path, step: int) -> Checkpoint:
    check_int(owner, "step", step, minimum=0)
    found = dict(candidates(owner, folder))
    if step not in found:
        msg = f"{owner}: step must be one of {sorted(found)[-10:]}; got {step}"
        raise CheckpointError(msg)
    return read_checkpoint(found[step], step=step, owner=owner)
