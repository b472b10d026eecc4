"""Reads images and label maps from files that nobody has checked."""

from __future__ import annotations

import io
import os
import stat
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from dpsims._optional import require
from dpsims.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

Pixels = npt.NDArray[np.uint8]

MAX_PIXELS = 64_000_000
"""Images with more pixels are refused: a small file can unpack to any size."""
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LABEL_SUFFIXES = (".png",)
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
# everything that Pillow raises on damaged files (SyntaxError is its own "broken PNG")
_DAMAGE = (
    OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, OverflowError,
    struct.error, zlib.error,
)  # fmt: skip


def shown(path: str | os.PathLike[str], *, length: int = 120) -> str:
    """A file name that can be printed anywhere, cut in the middle when it is long."""
    text = os.fspath(path).encode("utf-8", "backslashreplace").decode()
    end = max(30, length // 2)
    return text if len(text) <= length else f"{text[: length - 3 - end]}...{text[-end:]}"


def files_by_stem(root: Path, folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """Regular files directly in ``folder``, by name without suffix, sorted.

    Names that start with a dot, subfolders and other suffixes are passed over.

    Raises:
        DataError: The folder is missing; two files share a stem; a file is not a regular file, or
            a link leads out of ``root``.
    """
    found = dict[str, Path]()
    for name in regular_files(root, folder, suffixes):
        path = folder / name
        if path.stem in found:
            msg = f"{shown(path)}: has the same name as {shown(found[path.stem].name)}"
            raise DataError(msg)
        found[path.stem] = path
    return found


def regular_files(root: Path, folder: Path, endings: tuple[str, ...]) -> list[str]:
    """Names of the regular files directly in ``folder`` with one of the endings, sorted.

    The case of an ending does not matter. Names that start with a dot are passed over.

    Raises:
        DataError: The folder is missing; a file is empty or not a regular file, or a link leads
            out of ``root``.
    """
    if not folder.is_dir():
        msg = f"{shown(folder)}: no such folder"
        raise DataError(msg)
    home, lowered = root.resolve(), tuple(ending.lower() for ending in endings)
    inside = folder.resolve().is_relative_to(home)
    names = list[str]()
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: os.fsencode(entry.name)):
            if entry.name.startswith(".") or not entry.name.lower().endswith(lowered):
                continue
            # links are resolved one by one, which takes minutes for 100 000 files
            plain = inside and entry.is_file(follow_symlinks=False)
            if not plain or entry.stat(follow_symlinks=False).st_size == 0:
                check_regular(folder / entry.name, home)
            names.append(entry.name)
    return names


def check_regular(path: Path, home: Path) -> None:
    """Raise DataError unless ``path`` is a regular, non-empty file inside ``home``."""
    try:
        target = path.resolve(strict=True)
        status = target.stat()
    except (OSError, RuntimeError) as error:
        msg = f"{shown(path)}: cannot be read ({type(error).__name__})"
        raise DataError(msg) from error
    if not target.is_relative_to(home):
        msg = f"{shown(path)}: is a link that leads out of {shown(home)}"
        raise DataError(msg)
    if not stat.S_ISREG(status.st_mode):
        msg = f"{shown(path)}: is not a regular file"
        raise DataError(msg)
    if status.st_size == 0:
        msg = f"{shown(path)}: is empty (0 bytes)"
        raise DataError(msg)


def read_image(
    path: Path, *, fits: tuple[int, int] | None = None, max_pixels: int = MAX_PIXELS
) -> Pixels:
    """Read RGB as ``(H, W, 3)``.

    Args:
        path: A PNG, JPEG, WebP or BMP file of any colour mode; alpha is dropped.
        fits: Height and width of the label map. The camera's rotation tag is applied unless only
            the unrotated image has this size.
        max_pixels: Largest image that is unpacked.

    Raises:
        DataError: The file cannot be read, or is too large.
    """
    purpose = "reading images"
    turn = require("PIL.ImageOps", extra="train", purpose=purpose).exif_transpose
    with _guarded(path, max_pixels):
        picture = _decode(path, _FORMATS, max_pixels, path.read_bytes())
        upright = turn(picture)
        if fits is not None and upright.size[::-1] != fits == picture.size[::-1]:
            upright = picture
        if upright.mode.startswith("I"):
            # 16 bits per channel: Pillow would clip at 255 instead of scaling
            gray = np.clip(np.asarray(upright, np.float32) / 257 + 0.5, 0, 255).astype(np.uint8)
            return np.repeat(gray[..., None], 3, axis=2)
        if upright.mode == "P":
            # a palette with transparency has no direct way to RGB
            upright = upright.convert("RGBA")
        return np.array(upright.convert("RGB"))


def read_ids(
    path: Path, *, max_pixels: int = MAX_PIXELS
) -> npt.NDArray[np.uint8] | npt.NDArray[np.int32]:
    """Read the integer ids of a PNG as ``(H, W)``; palette colours are never looked at.

    uint8 where the file has at most 8 bits per pixel, else int32.

    Raises:
        DataError: The file cannot be read, is too large, or holds colours instead of ids.
    """
    picture, step = _id_picture(path, max_pixels)
    if picture.mode in ("L", "P"):
        return np.array(picture) // np.uint8(step) if step > 1 else np.array(picture)
    return np.array(picture).astype(np.int32)


def distinct_ids(path: Path, *, max_pixels: int = MAX_PIXELS) -> npt.NDArray[np.int64]:
    """The ids that occur in :func:`read_ids`, in order, found faster.

    Raises:
        DataError: As :func:`read_ids`.
    """
    picture, step = _id_picture(path, max_pixels)
    if picture.mode in ("L", "P"):
        return np.flatnonzero(picture.histogram()) // step
    return np.unique(np.array(picture)).astype(np.int64)


def _id_picture(path: Path, max_pixels: int) -> tuple[Image.Image, int]:
    """A PNG of one integer channel, and by how much Pillow has multiplied its ids."""
    with _guarded(path, max_pixels):
        data = path.read_bytes()
        picture = _decode(path, ("PNG",), max_pixels, data)
    if picture.mode not in {"L", "P", "I", "I;16"}:
        msg = (
            f"{shown(path)}: has mode {picture.mode}, but ids need one integer channel (mode L, P "
            "or I;16); turn colours into ids first, for example with LabelSpec's id_map"
        )
        raise DataError(msg)
    depth, color_type = data[24:26]
    # Pillow spreads 2- and 4-bit grey over 0..255, which is right for grey but not for ids
    return picture, 255 // (2**depth - 1) if color_type == 0 and depth in (2, 4) else 1


def _decode(path: Path, formats: tuple[str, ...], max_pixels: int, data: bytes) -> Image.Image:
    """Decode the bytes of a whole file: it may change or vanish in the meantime."""
    pillow = require("PIL.Image", extra="train", purpose="reading images")
    picture: Image.Image = pillow.open(io.BytesIO(data), formats=formats)
    if picture.width * picture.height > max_pixels:
        size = f"{picture.width} x {picture.height}"
        msg = f"{shown(path)}: has {size} pixels, more than the limit of {max_pixels}"
        raise DataError(msg)
    picture.load()
    return picture


@contextmanager
def _guarded(path: Path, max_pixels: int) -> Iterator[None]:
    """Turn whatever Pillow raises about a file into a DataError that names it."""
    pillow: Any = require("PIL.Image", extra="train", purpose="reading images")
    try:
        with warnings.catch_warnings():
            # Pillow only warns about large images, and about broken tags that nobody needs
            warnings.simplefilter("ignore", UserWarning)
            warnings.simplefilter("error", pillow.DecompressionBombWarning)
            yield
    except (pillow.DecompressionBombError, pillow.DecompressionBombWarning) as error:
        msg = f"{shown(path)}: has more pixels than the limit of {max_pixels}"
        raise DataError(msg) from error
    except _DAMAGE as error:
        reason = shown(str(error) or type(error).__name__, length=160)
        msg = f"{shown(path)}: is not a readable image of a known format ({reason})"
        raise DataError(msg) from error
