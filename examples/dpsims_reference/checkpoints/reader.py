"""Reading checkpoints: every byte is hashed before it is parsed."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dpsims.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError
from dpsims_reference.checkpoints.disk import check_folder, read_file
from dpsims_reference.checkpoints.manifest import (
    MANIFEST,
    MANIFEST_LIMIT,
    STATE,
    Manifest,
    decode_manifest,
    describe,
)
from dpsims_reference.checkpoints.strict_json import STATE_LIMIT, decode_json
from dpsims_reference.checkpoints.tensors import decode_tensors

SUFFIX = ".safetensors"
# what a save of the same step moves aside; it counts while its successor is missing
REPLACED = ".old-"
# how often a folder is listed again because its writer has just changed it
_LISTINGS = 20
_NAME = re.compile(r"step-([0-9]{8,18})")


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint holds. The tensors lie on the CPU and own their memory."""

    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    path: Path


def folder_name(step: int) -> str:
    """The name of the folder of one step."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step that a folder's name gives, or ``None`` for any other name."""
    match = _NAME.fullmatch(name)
    if match is None or folder_name(int(match[1])) != name:
        return None
    return int(match[1])


def candidates(owner: str, folder: Path) -> list[tuple[int, Path]]:
    """Steps and folders that may be checkpoints, newest first; the order is that of the steps.

    Raises:
        CheckpointError: The folder cannot be listed.
    """
    try:
        names = set(os.listdir(folder))
    except OSError as error:
        msg = f"{owner}: folder must be a readable folder; got {folder}: {error.strerror}"
        raise CheckpointError(msg) from error
    found = []
    for name in names:
        bare = name.removeprefix(REPLACED)
        step = step_of(bare)
        if step is not None and (name == bare or bare not in names):
            found.append((step, folder / name))
    return sorted(found, reverse=True)


def read_manifest(owner: str, path: Path, step: int | None) -> Manifest:
    """The manifest of the checkpoint folder ``path``.

    Args:
        owner: The public callable that speaks.
        path: The folder.
        step: The step it must be of, or ``None`` for any.

    Raises:
        CheckpointError: There is no such folder, or its manifest is no good; see
            :func:`dpsims_reference.checkpoints.manifest.decode_manifest`.
    """
    check_folder(owner, path)
    file = path / MANIFEST
    manifest = decode_manifest(owner, file, read_file(owner, file, limit=MANIFEST_LIMIT))
    if step is not None and manifest.step != step:
        msg = f"{owner}: {file} must be of step {step}; got step {manifest.step}"
        raise CorruptCheckpointError(msg)
    return manifest


def read_checkpoint(
    path: str | Path, *, step: int | None = None, owner: str = "read_checkpoint"
) -> Checkpoint:
    """Read one checkpoint folder, whoever holds its store.

    Args:
        path: The folder.
        step: The step it must be of; by default what its name says, if that is a step.
        owner: The public callable that speaks.

    Raises:
        CorruptCheckpointError: A byte is not what was saved; the message names the file.
        UnsafeCheckpointError: ``path`` is a file or a link, or the folder refers to anything but
            plain files of its own.
        IncompatibleCheckpointError: A newer format.
        CheckpointError: The system cannot read it.
    """
    path = Path(path)
    manifest = read_manifest(owner, path, step_of(path.name) if step is None else step)
    state: dict[str, Any] = {}
    tensors = {}
    for name, entry in manifest.files.items():
        file = path / name
        if name == STATE and entry.size > STATE_LIMIT:
            msg = f"{owner}: {file} must hold at most {STATE_LIMIT} bytes; got {entry.size}"
            raise CorruptCheckpointError(msg)
        data = read_file(owner, file, size=entry.size)
        if describe(data) != entry:
            msg = f"{owner}: {file} must have the bytes that were saved; got another SHA-256"
            raise CorruptCheckpointError(msg)
        if name != STATE:
            tensors[name.removesuffix(SUFFIX)] = decode_tensors(owner, file, data)
            continue
        state = decode_json(owner, file, data)
        if not isinstance(state, dict):
            msg = f"{owner}: {file} must hold a JSON object; got {type(state).__name__}"
            raise CorruptCheckpointError(msg)
    return Checkpoint(manifest.step, tensors, state, path)


def read_newest(owner: str, folder: Path, *, best: bool = False) -> Checkpoint | None:
    """The sound checkpoint of the highest step; warns of every damaged one above it.

    A checkpoint that its writer removes or replaces in the meantime is no damage: the folder is
    listed again.

    Args:
        owner: The public callable that speaks.
        folder: Where the checkpoints are.
        best: Whether only those count that were saved as the best so far.

    Raises:
        CorruptCheckpointError: None is sound, and some are damaged.
        IncompatibleCheckpointError: The newest sound one has a newer format.
        CheckpointError: The system cannot read the folder.
    """
    for _ in range(_LISTINGS):
        damaged: list[str] = []
        moved = False
        for step, path in candidates(owner, folder):
            before = _identity(path)
            try:
                if not best or read_manifest(owner, path, step).best:
                    return read_checkpoint(path, step=step, owner=owner)
            except CheckpointError as error:
                moved = before is None or _identity(path) != before
                if moved:
                    break
                if not isinstance(error, CorruptCheckpointError | UnsafeCheckpointError):
                    raise
                damaged.append(path.name)
                text = f"{owner}: passed over a damaged checkpoint: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=3)
        if not moved:
            break
    if damaged or moved:
        kind = "best checkpoint" if best else "checkpoint"
        what = "one that stays while it is read" if moved else f"damaged ones: {damaged[:10]}"
        msg = f"{owner}: {folder} must hold a sound {kind}; got {what}"
        raise CorruptCheckpointError(msg)
    return None


def _identity(path: Path) -> int | None:
    try:
        return path.lstat().st_ino
    except FileNotFoundError:
        return None
