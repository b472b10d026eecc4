"""What a street scene is painted on: per sample point, the material and what light needs to know.

Nothing here depends on weather or time of day: one canvas gives one label map and any number of
looks. All lengths are metres, all screen positions are output pixels.
"""

from __future__ import annotations

import math
from math import nan
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

# float32 throughout; numpy's stubs lose that in mixed arithmetic
Floats = npt.NDArray[np.floating[Any]]
Bools = npt.NDArray[np.bool_]

CLASS_NAMES = (
    "sky", "building", "road", "sidewalk", "lane marking", "grass",
    "hill", "tree", "car", "person", "street lamp", "sun or moon",
)  # fmt: skip
CLASS_COLORS = (
    (122, 178, 236), (166, 108, 92), (92, 92, 104), (206, 178, 206), (250, 250, 250),
    (138, 196, 92), (98, 140, 116), (44, 118, 58), (40, 78, 190), (220, 52, 70),
    (236, 152, 40), (255, 226, 96),
)  # fmt: skip


class Material(NamedTuple):
    """A class id, an albedo (sRGB), how strongly noise shows, and how many metres it spans."""

    label: int
    rgb: tuple[float, float, float]
    roughness: float
    grain: float


MATERIALS = {
    "sky": Material(0, (0.5, 0.7, 0.9), 0.0, 1.0),
    "sun": Material(11, (0.0, 0.0, 0.0), 0.0, 1.0),
    "hill": Material(6, (0.33, 0.45, 0.3), 0.45, 60.0),
    "skyline": Material(1, (0.5, 0.5, 0.55), 0.2, 30.0),
    "road": Material(2, (0.34, 0.34, 0.36), 0.28, 2.0),
    "mark": Material(4, (0.93, 0.92, 0.86), 0.3, 1.5),
    "paving": Material(3, (0.66, 0.62, 0.58), 0.3, 2.0),
    "curb": Material(3, (0.76, 0.75, 0.72), 0.15, 2.0),
    "grass": Material(5, (0.36, 0.54, 0.2), 0.75, 2.5),
    "wall": Material(1, (0.7, 0.6, 0.5), 0.2, 2.2),
    "window": Material(1, (0.16, 0.2, 0.26), 0.5, 14.0),
    "roof": Material(1, (0.45, 0.22, 0.17), 0.35, 1.6),
    "shop": Material(1, (0.2, 0.2, 0.22), 0.5, 5.0),
    "trim": Material(1, (0.86, 0.84, 0.78), 0.1, 3.0),
    "awning": Material(1, (0.7, 0.2, 0.2), 0.05, 2.0),
    "leaf": Material(7, (0.2, 0.42, 0.14), 0.9, 1.3),
    "trunk": Material(7, (0.33, 0.24, 0.17), 0.5, 0.6),
    "pole": Material(10, (0.24, 0.27, 0.29), 0.0, 1.0),
    "lamp": Material(10, (0.85, 0.84, 0.75), 0.0, 1.0),
    "body": Material(8, (0.6, 0.1, 0.1), 0.0, 1.0),
    "glass": Material(8, (0.14, 0.18, 0.22), 0.4, 2.0),
    "tyre": Material(8, (0.07, 0.07, 0.08), 0.0, 1.0),
    "tail": Material(8, (0.75, 0.05, 0.05), 0.0, 1.0),
    "head": Material(8, (0.95, 0.95, 0.88), 0.0, 1.0),
    "skin": Material(9, (0.8, 0.6, 0.48), 0.0, 1.0),
    "shirt": Material(9, (0.5, 0.3, 0.3), 0.1, 0.5),
    "trousers": Material(9, (0.2, 0.22, 0.3), 0.1, 0.5),
    "hair": Material(9, (0.16, 0.11, 0.08), 0.0, 0.5),
}
PART = {name: index for index, name in enumerate(MATERIALS)}
LABEL_OF_PART = np.array([m.label for m in MATERIALS.values()], np.uint8)
# only these read the surface coordinates, and only the last two the random cell
TEXTURED = frozenset(name for name, m in MATERIALS.items() if m.roughness > 0 or name == "sun")
PANES = frozenset({"window", "shop"})
UP, FRONT, LEFT, RIGHT = range(4)


class Camera(NamedTuple):
    """A pinhole at ``height`` metres that looks along the street to ``(center, horizon)``."""

    height: float
    center: float
    horizon: float
    focal: float

    def column(self, x: float, z: float) -> float:
        """Screen column of a point ``x`` metres to the right and ``z`` ahead."""
        return self.center + self.focal * x / z

    def row(self, y: float, z: float) -> float:
        """Screen row of a point ``y`` metres above the ground and ``z`` ahead."""
        return self.horizon - self.focal * (y - self.height) / z


class Patch(NamedTuple):
    """A rectangle of sample points, the painted ones among them, and their surface coordinates."""

    rows: slice
    cols: slice
    mask: Bools | Literal[True]
    u: Floats
    v: Floats
    depth: Floats | float

    @property
    def empty(self) -> bool:
        """Whether the rectangle holds no points at all."""
        return self.rows.start == self.rows.stop or self.cols.start == self.cols.stop


class Surface(NamedTuple):
    """Per sample point: material, object, direction that it faces, metres away, shading."""

    part: npt.NDArray[np.uint8]
    owner: npt.NDArray[np.uint8]
    facing: npt.NDArray[np.uint8]
    depth: Floats
    shade: Floats


class Canvas:
    """Buffers of one scene.

    Args:
        image_size: Height and width of the output in pixels.
        camera: Where the scene is seen from.
        maps_only: Paint what the label and instance maps need, at one point per pixel instead of
            2 x 2. The first point of a pixel is the same, so the maps are.
    """

    def __init__(
        self, image_size: tuple[int, int], camera: Camera, *, maps_only: bool = False
    ) -> None:
        oversampling = 1 if maps_only else 2
        self.size = image_size
        self.camera = camera
        self.oversampling = oversampling
        self.maps_only = maps_only
        rows, cols = (length * oversampling for length in image_size)
        step = np.float32(1 / oversampling)
        self.y = np.arange(rows, dtype=np.float32) * step + np.float32(0.25)
        self.x = np.arange(cols, dtype=np.float32) * step + np.float32(0.25)
        # the fill that painted a point last; what a fill sets as a whole is kept once, in _fills
        self.code = np.zeros((rows, cols), np.uint16)
        self.shade = np.ones((rows, cols), np.float32)
        self.cell = np.zeros((rows, cols), np.float32)
        self.u = np.zeros((rows, cols), np.float32)
        self.v = np.zeros((rows, cols), np.float32)
        self.depth = np.full((rows, cols), 1e4, np.float32)
        self.names = ["nothing"]
        self._fills: list[tuple[int, int, int, float, float]] = []
        self.new_code("sky", 0)

    def new_code(
        self, part: str, owner: int, *, facing: int = FRONT, depth: float = nan, shade: float = nan
    ) -> int:
        """A code for ``self.code``; NaN means that the buffer of that name holds the values."""
        self._fills.append((PART[part], owner, facing, depth, shade))
        return len(self._fills) - 1

    def add(self, name: str) -> int:
        """Register an object and return its id; ``name`` says what it is."""
        self.names.append(name)
        return len(self.names) - 1

    def window(self, left: float, top: float, right: float, bottom: float) -> tuple[slice, slice]:
        """Rows and columns of the sample points inside a screen rectangle, cut to the canvas."""
        return _span(top, bottom, self.size[0], self.oversampling), _span(
            left, right, self.size[1], self.oversampling
        )

    def fill(
        self,
        patch: Patch,
        part: str,
        owner: int,
        *,
        facing: int = FRONT,
        shade: Floats | float = 1.0,
        cell: Floats | float = 0.0,
        mask: Bools | None = None,
    ) -> None:
        """Paint one material where ``mask`` (default: the patch's own) holds."""
        if patch.empty:
            return
        where = patch.mask if mask is None else mask
        box = (patch.rows, patch.cols)
        many_depths = isinstance(patch.depth, np.ndarray)
        many_shades = isinstance(shade, np.ndarray)
        code = self.new_code(
            part,
            owner,
            facing=facing,
            depth=nan if isinstance(patch.depth, np.ndarray) else patch.depth,
            shade=nan if isinstance(shade, np.ndarray) else float(shade),
        )
        np.copyto(self.code[box], code, where=where)
        if self.maps_only:
            return
        if many_depths:
            np.copyto(self.depth[box], patch.depth, where=where)
        if many_shades:
            np.copyto(self.shade[box], shade, where=where, casting="same_kind")
        if part in TEXTURED:
            np.copyto(self.u[box], patch.u, where=where)
            np.copyto(self.v[box], patch.v, where=where)
        if part in PANES:
            np.copyto(self.cell[box], cell, where=where)

    def finish(self) -> Surface:
        """What is seen at each point, once everything is painted."""
        parts, owners, facings, depths, shades = zip(*self._fills, strict=True)
        depth = np.array(depths, np.float32).take(self.code)
        shade = np.array(shades, np.float32).take(self.code)
        np.copyto(depth, self.depth, where=np.isnan(depth))
        np.copyto(shade, self.shade, where=np.isnan(shade))
        tables = (np.array(values, np.uint8) for values in (parts, owners, facings))
        part, owner, facing = (table.take(self.code) for table in tables)
        return Surface(part, owner, facing, depth, shade)

    def labels(self) -> npt.NDArray[np.uint8]:
        """Class ids, one per pixel."""
        table = LABEL_OF_PART[[fill[0] for fill in self._fills]]
        return table[self.code[:: self.oversampling, :: self.oversampling]]

    def instances(self) -> npt.NDArray[np.int32]:
        """Ids of the cars and people, one per pixel; 0 elsewhere."""
        things = [name in {"car", "person"} for name in self.names]
        numbers = np.where(things, np.cumsum(things), 0).astype(np.int32)
        table = numbers[[fill[1] for fill in self._fills]]
        return table[self.code[:: self.oversampling, :: self.oversampling]]


def _span(low: float, high: float, size: int, oversampling: int) -> slice:
    first = 0 if low <= 0 else math.ceil((min(low, size + 1) - 0.25) * oversampling)
    last = size * oversampling if high >= size else math.ceil((max(high, 0) - 0.25) * oversampling)
    first = min(first, size * oversampling)
    return slice(first, max(last, first))
