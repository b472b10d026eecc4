"""The file of a scan: rows found so far, what they belong to, and a checksum."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

_FORMAT = "dpsims class presence 1"


class CorruptCacheError(Exception):
    """The file's bytes are not the bytes that were written."""


@dataclass(frozen=True)
class ScanKey:
    """What a scan depends on; another key means another scan."""

    fingerprint: str
    num_images: int
    num_classes: int
    ignore_index: int


def write_scan(path: Path, key: ScanKey, presence: np.ndarray) -> None:
    """Replace the file by one that holds the first ``len(presence)`` rows of a scan."""
    about = {"format": _FORMAT, "done": len(presence), **asdict(key)}
    arrays = {
        "about": np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
        "rows": np.packbits(presence),
    }
    arrays["sha256"] = _checksum(arrays["about"], arrays["rows"])
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(save(arrays))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        with suppress(FileNotFoundError):
            temporary.unlink()
    _sync_folder(path.parent)


def read_scan(path: Path, key: ScanKey) -> np.ndarray:
    """The rows that the file holds; none where it is absent or belongs to another scan.

    Raises:
        CorruptCacheError: The file is damaged.
    """
    empty = np.zeros((0, key.num_classes), dtype=np.bool_)
    try:
        # read, not mapped: a mapped file that shrinks kills the process
        arrays = load(path.read_bytes())
    except FileNotFoundError:
        return empty
    except SafetensorError as error:
        raise CorruptCacheError(str(error)[:100]) from error
    if set(arrays) != {"about", "rows", "sha256"}:
        raise CorruptCacheError("unexpected entries")
    checksum = _checksum(arrays["about"], arrays["rows"])
    if arrays["sha256"].tobytes() != checksum.tobytes():
        raise CorruptCacheError("wrong checksum")
    about = json.loads(arrays["about"].tobytes())
    done = about.pop("done")
    if about != {"format": _FORMAT, **asdict(key)}:
        return empty
    bits = np.unpackbits(arrays["rows"], count=done * key.num_classes)
    return bits.astype(np.bool_).reshape(done, key.num_classes)


def _checksum(about: np.ndarray, rows: np.ndarray) -> np.ndarray:
    # hashed one by one: bytes must not be able to move from one to the other
    parts = [hashlib.sha256(part.tobytes()).digest() for part in (about, rows)]
    return np.frombuffer(hashlib.sha256(b"".join(parts)).digest(), dtype=np.uint8)


def _sync_folder(folder: Path) -> None:
    # without this a crash of the machine may undo the rename; only POSIX opens folders
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
