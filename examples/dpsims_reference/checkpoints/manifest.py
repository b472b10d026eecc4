"""The manifest of a checkpoint: which files it has, and what they must hold."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dpsims.errors import (
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    UnsafeCheckpointError,
)
from dpsims_reference.checkpoints.strict_json import decode_json

MANIFEST, STATE = "MANIFEST.json", "state.json"
MANIFEST_LIMIT = 1 << 20
FORMAT = "dpsims-checkpoint"
# a reader of 1.0 reads every 1.x; it refuses 2.0
VERSION = (1, 0)

_FILE = re.compile(r"state\.json|[a-z0-9][a-z0-9_-]{0,63}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileEntry:
    """What the manifest says of one file."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """Which files make up a checkpoint, and what they must hold."""

    step: int
    best: bool
    files: dict[str, FileEntry]


def describe(data: bytes) -> FileEntry:
    """The manifest's entry for a file of these bytes."""
    return FileEntry(len(data), hashlib.sha256(data).hexdigest())


def encode_manifest(manifest: Manifest) -> bytes:
    """JSON whose last entry is the SHA-256 of all text above it."""
    body = {
        "best": manifest.best,
        "files": {name: vars(entry) for name, entry in manifest.files.items()},
        "format": FORMAT,
        "step": manifest.step,
        "version": list(VERSION),
    }
    return seal(body)


def seal(body: Mapping[str, Any]) -> bytes:
    """``body`` as JSON text, its own digest in the last line."""
    head = json.dumps(body, indent=1, sort_keys=True).removesuffix("\n}").encode() + b",\n"
    return head + _last_line(head)


def _last_line(head: bytes) -> bytes:
    return b' "sha256": "' + hashlib.sha256(head).hexdigest().encode() + b'"\n}\n'


def decode_manifest(owner: str, file: Path, data: bytes) -> Manifest:
    """Read a manifest whose every byte is checked.

    Raises:
        CorruptCheckpointError: The text does not fit its digest, or says something else than
            a manifest says.
        UnsafeCheckpointError: It lists a file outside its folder or of an unknown kind.
        IncompatibleCheckpointError: It was written by a newer format.
    """
    cut = max(0, len(data) - len(_last_line(b"")))
    if data[cut:] != _last_line(data[:cut]):
        msg = f"{owner}: {file} must end with the digest of its text; got another ending"
        raise CorruptCheckpointError(msg)
    body = decode_json(owner, file, data)
    version = body.get("version") if isinstance(body, dict) else None
    if (
        not isinstance(body, dict)
        or body.get("format") != FORMAT
        or not isinstance(version, list)
        or not (len(version) == 2 and all(_is_count(part) for part in version))
    ):
        msg = f"{owner}: {file} must be the manifest of a {FORMAT}; got other JSON"
        raise CorruptCheckpointError(msg)
    if version[0] > VERSION[0]:
        msg = f"{owner}: {file} must have format version {VERSION[0]} or older; got {version}"
        raise IncompatibleCheckpointError(msg)
    files = body.get("files")
    if not (
        _is_count(body.get("step"))
        and isinstance(body.get("best"), bool)
        and isinstance(files, dict)
    ):
        msg = f"{owner}: {file} must give step, best and files; got {sorted(body)[:10]}"
        raise CorruptCheckpointError(msg)
    entries = {name: _read_entry(owner, file, name, entry) for name, entry in files.items()}
    if STATE not in entries:
        msg = f"{owner}: {file} must list {STATE}; got {sorted(entries)[:10]}"
        raise CorruptCheckpointError(msg)
    return Manifest(body["step"], body["best"], entries)


def _read_entry(owner: str, file: Path, name: str, entry: object) -> FileEntry:
    if not _FILE.fullmatch(name):
        msg = (
            f"{owner}: {file} must list {STATE} and *.safetensors files of its own folder only; "
            f"got {name[:100]!r}"
        )
        raise UnsafeCheckpointError(msg)
    if isinstance(entry, dict):
        size, digest = entry.get("size"), entry.get("sha256")
        if _is_count(size) and isinstance(digest, str) and _DIGEST.fullmatch(digest):
            return FileEntry(size, digest)
    msg = f"{owner}: {file} must give size and sha256 of {name}; got something else"
    raise CorruptCheckpointError(msg)


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0
