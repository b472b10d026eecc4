"""File operations of the checkpoint store: all writing ones in one class, and safe reading."""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpsims.errors import CheckpointError, CorruptCheckpointError, UnsafeCheckpointError

_CHUNK = 1 << 22


class Disk:
    """Every operation by which the store changes the disk, one method each.

    The store does nothing else to the disk, so a test that stops the process before or after any
    of these methods has tried every moment of a crash.
    """

    def make_folder(self, path: Path) -> None:
        """Make one folder; its rights follow the umask."""
        path.mkdir(mode=0o777)

    def create(self, path: Path) -> int:
        """Open a new file for writing; its rights follow the umask, and no link is followed."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(path, flags, 0o666)

    def write(self, descriptor: int, data: bytes) -> None:
        """Write all of ``data``."""
        view = memoryview(data)
        while view:
            view = view[os.write(descriptor, view) :]

    def sync(self, descriptor: int) -> None:
        """Wait until the file's bytes would survive a loss of power."""
        os.fsync(descriptor)

    def sync_folder(self, path: Path) -> None:
        """Wait until the names in a folder would survive a loss of power."""
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)

    def rename(self, source: Path, target: Path) -> None:
        """Give a folder another name, at once."""
        source.rename(target)

    def remove(self, path: Path) -> None:
        """Remove a folder with all it holds, or a file; a link itself, never what it names."""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_file(disk: Disk, path: Path, data: bytes) -> None:
    """Write a new file and wait until its bytes are safe."""
    descriptor = disk.create(path)
    try:
        disk.write(descriptor, data)
        disk.sync(descriptor)
    finally:
        os.close(descriptor)


def check_folder(owner: str, path: Path) -> None:
    """Raise unless ``path`` is a real folder.

    Raises:
        CheckpointError: Nothing is there.
        UnsafeCheckpointError: A link, a file or anything else is there.
    """
    with _named_errors(owner, path):
        mode = path.lstat().st_mode
    if not stat.S_ISDIR(mode):
        what = "a symbolic link" if stat.S_ISLNK(mode) else "no folder"
        msg = (
            f"{owner}: checkpoint must be a folder (links are not followed, and pickled files "
            f"are never read); got {path}, which is {what}"
        )
        raise UnsafeCheckpointError(msg)


def read_file(
    owner: str, path: Path, *, size: int | None = None, limit: int | None = None
) -> bytes:
    """The bytes of a regular file.

    Args:
        owner: The public callable that speaks.
        path: The file.
        size: Its exact size, checked before anything is read.
        limit: Its largest size, checked before anything is read.

    Raises:
        CorruptCheckpointError: The file is missing, has another size or lies on a bad block.
        UnsafeCheckpointError: It is a link, folder, device or pipe; it has not been opened.
        CheckpointError: The system refuses to read it.
    """
    with _open_regular(owner, path, size, limit) as descriptor:
        parts = []
        while part := os.read(descriptor, 1 << 30):
            parts.append(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def hash_file(owner: str, path: Path, *, size: int) -> str:
    """SHA-256 of a regular file of ``size`` bytes, in constant memory; as :func:`read_file`."""
    digest = hashlib.sha256()
    with _open_regular(owner, path, size, None) as descriptor:
        while part := os.read(descriptor, _CHUNK):
            digest.update(part)
    return digest.hexdigest()


@contextmanager
def _open_regular(owner: str, path: Path, size: int | None, limit: int | None) -> Iterator[int]:
    with _named_errors(owner, path, missing=CorruptCheckpointError):
        _check_regular(owner, path, path.lstat(), size, limit)
        # the file may have been replaced since: ask again, about what was really opened
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            _check_regular(owner, path, os.fstat(descriptor), size, limit)
            yield descriptor
        finally:
            os.close(descriptor)


def _check_regular(
    owner: str, path: Path, status: os.stat_result, size: int | None, limit: int | None
) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = stat.filemode(status.st_mode)
        msg = f"{owner}: {path} must be a regular file; got {kind}"
        raise UnsafeCheckpointError(msg)
    if size is not None and status.st_size != size:
        msg = f"{owner}: {path} must hold {size} bytes; got {status.st_size}"
        raise CorruptCheckpointError(msg)
    if limit is not None and status.st_size > limit:
        msg = f"{owner}: {path} must hold at most {limit} bytes; got {status.st_size}"
        raise CorruptCheckpointError(msg)


@contextmanager
def _named_errors(
    owner: str, path: Path, *, missing: type[CheckpointError] = CheckpointError
) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        msg = f"{owner}: {path} must exist; got no such file or folder"
        raise missing(msg) from None
    except OSError as error:
        kind = CorruptCheckpointError if error.errno == errno.EIO else CheckpointError
        msg = f"{owner}: {path} must be readable; got {error.strerror or error}"
        raise kind(msg) from error
