"""The writing half of the checkpoint store: lock, write, publish, prune."""

from __future__ import annotations

import contextlib
import fcntl
import os
import uuid
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from dpsims.errors import (
    CheckpointError,
    CorruptCheckpointError,
    IncompatibleCheckpointError,
    UnsafeCheckpointError,
)
from dpsims_reference.checkpoints.disk import Disk, check_folder, hash_file, write_file
from dpsims_reference.checkpoints.manifest import (
    MANIFEST,
    STATE,
    Manifest,
    describe,
    encode_manifest,
)
from dpsims_reference.checkpoints.reader import (
    REPLACED,
    SUFFIX,
    candidates,
    folder_name,
    read_manifest,
)
from dpsims_reference.checkpoints.tensors import encode_tensors

_LOCK, _TEMPORARY = ".lock", ".tmp-"
_OWNER = "CheckpointStore.save"


class FolderWriter:
    """Sole right to write one folder; arguments and errors as of ``CheckpointStore``."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep
        self._disk = Disk()
        self._process = os.getpid()
        self._sound: dict[Path, tuple[tuple[int, int, int], ...]] = {}
        try:
            self._make_folder()
            self.release = weakref.finalize(self, os.close, self._lock())
            try:
                self._tidy()
            except BaseException:
                self.release()
                raise
        except OSError as error:
            reason = error.strerror or error
            msg = f"CheckpointStore: folder must be a writable folder; got {folder}: {reason}"
            raise CheckpointError(msg) from error

    def _make_folder(self) -> None:
        for folder in reversed((self.folder, *self.folder.parents)):
            if not folder.exists():
                with contextlib.suppress(FileExistsError):
                    self._disk.make_folder(folder)
                self._disk.sync_folder(folder.parent)

    def _lock(self) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self.folder / _LOCK, flags, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {self._process}".encode(), 0)
        except BlockingIOError:
            holder = os.pread(descriptor, 100, 0).decode("ascii", "replace")
            os.close(descriptor)
            msg = (
                "CheckpointStore: folder must not be open in another trainer or in its workers; "
                f"got {self.folder}, held by {holder}"
            )
            raise CheckpointError(msg) from None
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def write(
        self, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: bytes, *, best: bool
    ) -> Path:
        """Write a checkpoint beside the others, make it durable, and give it its name.

        Raises:
            CheckpointError: The disk refuses; nothing has changed.
        """
        self._check_right(_OWNER)
        target = self.folder / folder_name(step)
        if os.path.lexists(target):
            check_folder(_OWNER, target)
        temporary = self._temporary()
        try:
            with _named_refusal(_OWNER, target):
                manifest = self._fill(temporary, step, tensors, state, best=best)
                self._publish(temporary, target)
                self._sound[target] = _signature(target, manifest)
        except BaseException:
            with contextlib.suppress(OSError):
                self._tidy()
            raise
        return target

    def _check_right(self, owner: str) -> None:
        if not self.release.alive or os.getpid() != self._process:
            msg = f"{owner}: store must be open, in the process that opened it; got {self.folder}"
            raise CheckpointError(msg)

    def _temporary(self) -> Path:
        return self.folder / f"{_TEMPORARY}{uuid.uuid4().hex}"

    def _fill(
        self,
        folder: Path,
        step: int,
        tensors: Mapping[str, Mapping[str, Tensor]],
        state: bytes,
        *,
        best: bool,
    ) -> Manifest:
        self._disk.make_folder(folder)
        entries = {}
        for group, members in tensors.items():
            data = encode_tensors(_OWNER, group, members)
            write_file(self._disk, folder / f"{group}{SUFFIX}", data)
            entries[f"{group}{SUFFIX}"] = describe(data)
        write_file(self._disk, folder / STATE, state)
        entries[STATE] = describe(state)
        manifest = Manifest(step, best, entries)
        write_file(self._disk, folder / MANIFEST, encode_manifest(manifest))
        self._disk.sync_folder(folder)
        return manifest

    def _publish(self, temporary: Path, target: Path) -> None:
        # no system call replaces a full folder: the old one steps aside, and readers find it there
        if target.exists():
            self._disk.rename(target, target.with_name(REPLACED + target.name))
        self._disk.rename(temporary, target)
        self._disk.sync_folder(self.folder)

    def _tidy(self) -> None:
        """Undo or finish what a save that died left behind; the lock says that it is dead."""
        for name in sorted(os.listdir(self.folder)):
            path = self.folder / name
            if name.startswith(_TEMPORARY):
                self._disk.remove(path)
            elif name.startswith(REPLACED):
                successor = path.with_name(name.removeprefix(REPLACED))
                if os.path.lexists(successor):
                    # it must be safe before the older one goes
                    self._disk.sync_folder(self.folder)
                    self._disk.remove(path)
                else:
                    self._disk.rename(path, successor)
                    self._disk.sync_folder(self.folder)

    def prune(self, saved: int) -> None:
        """Remove what is older than the newest ``keep`` sound checkpoints.

        Damaged ones are never counted. The one of step ``saved`` and the newest best one stay.

        Raises:
            CheckpointError: A checkpoint can be neither read nor removed.
        """
        with _named_refusal(_OWNER, self.folder):
            self._tidy()
            sound, has_best = 0, False
            for step, path in candidates(_OWNER, self.folder):
                enough = sound >= self.keep
                if enough and has_best and step != saved:
                    self._discard(path)
                    continue
                try:
                    manifest = self._verify(path, step)
                except IncompatibleCheckpointError:
                    # a newer version wrote it: not ours to judge or to remove
                    continue
                newest_best = manifest is not None and manifest.best and not has_best
                has_best = has_best or newest_best
                sound += manifest is not None
                if enough and not newest_best and step != saved:
                    self._discard(path)

    def discard_after(self, step: int) -> list[int]:
        """Remove the checkpoints above ``step``, newest first; that of ``step`` must be sound."""
        owner = "CheckpointStore.discard_after"
        self._check_right(owner)
        found = candidates(owner, self.folder)
        path = dict(found).get(step)
        if path is None or self._verify(path, step) is None:
            kind = "a missing" if path is None else "a damaged"
            msg = f"{owner}: step must be that of a sound checkpoint; got {step}, {kind} one"
            raise CheckpointError(msg)
        above = {number: entry for number, entry in found if number > step}
        with _named_refusal(owner, self.folder):
            for entry in above.values():
                self._discard(entry)
            self._disk.sync_folder(self.folder)
        return list(above)

    def _discard(self, path: Path) -> None:
        # renamed first: half a checkpoint must not look like a damaged one
        temporary = self._temporary()
        self._disk.rename(path, temporary)
        self._disk.remove(temporary)
        self._sound.pop(path, None)

    def _verify(self, path: Path, step: int) -> Manifest | None:
        """The manifest of a sound checkpoint, ``None`` for a damaged one.

        Files are hashed again only if they changed since this process last saw them sound.
        """
        try:
            manifest = read_manifest(_OWNER, path, step)
            signature = _signature(path, manifest)
            if self._sound.get(path) != signature:
                for name, entry in manifest.files.items():
                    if hash_file(_OWNER, path / name, size=entry.size) != entry.sha256:
                        return None
                self._sound[path] = signature
        except (CorruptCheckpointError, UnsafeCheckpointError, FileNotFoundError):
            return None
        return manifest


@contextlib.contextmanager
def _named_refusal(owner: str, path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        msg = f"{owner}: {path} must be writable; got {error.strerror or error}"
        raise CheckpointError(msg) from error


def _signature(path: Path, manifest: Manifest) -> tuple[tuple[int, int, int], ...]:
    """Size, time and identity of every file: what changes when a file is written or replaced."""
    seen = [(path / name).lstat() for name in (MANIFEST, *sorted(manifest.files))]
    return tuple((status.st_size, status.st_mtime_ns, status.st_ino) for status in seen)
