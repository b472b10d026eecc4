"""Paints the backdrop, the ground and the buildings. Nothing here depends on the look."""

from __future__ import annotations

import numpy as np

from dpsims_reference.data.scenes.canvas import (
    FRONT,
    LEFT,
    RIGHT,
    UP,
    Canvas,
    Floats,
    Patch,
)
from dpsims_reference.data.scenes.noise import look_up, noise_texture
from dpsims_reference.data.scenes.objects import mark_ground, paint_thing
from dpsims_reference.data.scenes.shapes import (
    front_plane,
    ground,
    polygon,
    side_plane,
    skyline,
)
from dpsims_reference.data.scenes.things import Building, World

FLOOR = 3.1
CURB = 0.2


def paint_world(canvas: Canvas, world: World) -> None:
    """Paint everything: backdrop, ground with its shadows, buildings, things."""
    _paint_backdrop(canvas, world)
    _paint_ground(canvas, world)
    if not canvas.maps_only:
        for thing in world.things:
            mark_ground(canvas, thing)
    for building in world.buildings:
        _paint_building(canvas, building)
    for thing in world.things:
        paint_thing(canvas, thing)


def _paint_backdrop(canvas: Canvas, world: World) -> None:
    height, width = canvas.size
    if world.sun is not None:
        x, y, radius = world.sun[0] * width, world.sun[1] * height, world.sun[2] * height
        rows, cols = canvas.window(x - radius, y - radius, x + radius, y + radius)
        px, py = (canvas.x[cols] - x)[None] / radius, (canvas.y[rows] - y)[:, None] / radius
        disc = px * px + py * py < 1
        canvas.fill(Patch(rows, cols, disc, px, py, 0.0), "sun", canvas.add("sun"))
    knots = np.linspace(0, width, 64)
    for layer, ridge in enumerate(world.hills):
        tops = canvas.camera.horizon - height * np.interp(canvas.x, knots, ridge)
        patch = skyline(canvas, tops.astype(np.float32), 900.0 * 0.5**layer)
        shade = 0.8 + 0.25 * look_up(noise_texture(1.6), patch.u * 0.5, patch.v * 0.9)
        canvas.fill(patch, "hill", canvas.add("hill"), shade=shade, facing=UP)
    if world.town is not None:
        column = np.clip((canvas.x * (64 / width)).astype(np.int32), 0, 63)
        tops = (canvas.camera.horizon - height * world.town[column]).astype(np.float32)
        patch = skyline(canvas, tops, 260.0)
        owner = canvas.add("town")
        block = look_up(noise_texture(0.0), column * 7.0, column * 3.0)
        canvas.fill(patch, "skyline", owner, shade=0.8 + 0.4 * block)
        panes = ((patch.u / 5.0) % 1.0 < 0.5) & ((patch.v / 6.0) % 1.0 < 0.5) & patch.mask
        cell = look_up(noise_texture(0.0), patch.u / 5.0, patch.v / 6.0)
        canvas.fill(patch, "window", owner, mask=panes & (cell > 0.45), cell=cell, shade=1.6)


def _paint_ground(canvas: Canvas, world: World) -> None:
    patch = ground(canvas)
    u, v, box = patch.u, patch.v, (patch.rows, patch.cols)
    (low, high), (left, right) = world.road, world.sides
    edges = (low - left.paving, low - min(CURB, left.paving), low, high,
             high + min(CURB, right.paving), high + right.paving)  # fmt: skip
    beyond = ["paving" if side.kind == "terraces" else "grass" for side in (left, right)]
    strips = (beyond[0], "paving", "curb", "road", "curb", "paving", beyond[1])
    strip = np.zeros(u.shape, np.uint8)
    for edge in edges:
        strip += u >= np.float32(edge)
    codes = [canvas.new_code(name, 0, facing=UP) for name in (*strips, "mark")]
    code = np.array(codes, np.uint16)[strip]
    road = strip == 3
    # a line keeps at least half a pixel, so that it fades instead of breaking up
    half = np.maximum(np.float32(0.09), np.float32(0.25 / canvas.camera.focal) * v)
    lines = np.zeros(u.shape, np.bool_)
    if world.dash:
        lines |= (np.abs(u - np.float32((low + high) / 2)) < half) & ((v / world.dash) % 1 < 0.45)
    if world.edge_lines:
        lines |= np.abs(np.abs(u - (low + high) / 2) - (high - low) / 2 + 0.3) < half
    if world.crossing:
        zebra = (v > world.crossing) & (v < world.crossing + 3.0)
        lines = (lines & ~zebra) | (zebra & (((u - low) / 1.0) % 1 < 0.5))
    code[road & lines] = codes[-1]
    canvas.code[box] = code
    if canvas.maps_only:
        return
    canvas.cell[box] = 0
    canvas.u[box], canvas.v[box], canvas.depth[box] = u, v, v
    # wheels polish two tracks per lane, and the gutter stays dark
    tracks = np.cos((u - low) * np.float32(8 * np.pi / (high - low)))
    canvas.shade[box] = np.where(road, 0.94 - 0.05 * tracks, 1.0)


def _walls_of(building: Building) -> tuple[float, float, int]:
    """Far edge of the end wall, its middle, and where the facade faces."""
    far = building.x + building.side * building.width
    return far, (building.x + far) / 2, (RIGHT if building.side < 0 else LEFT)


def _grounded(canvas: Canvas, v: Floats) -> Floats | float:
    """Walls darken towards the ground."""
    if canvas.maps_only:
        return 1.0
    return np.clip(np.float32(0.72) + np.float32(0.14) * v, 0, 1)


def _paint_building(canvas: Canvas, building: Building) -> None:
    owner = canvas.add("building")
    far, middle, facing = _walls_of(building)
    (z0, z1), high = building.z, building.height
    end = front_plane(canvas, z0, (min(building.x, far), max(building.x, far)), (0, high))
    if not end.empty:
        canvas.fill(end, "wall", owner, shade=0.92 * _grounded(canvas, end.v))
        across = np.abs(end.u - building.x)
        _paint_windows(canvas, end, building, owner, across, facing=FRONT)
    if building.gabled:
        ridge = high + 0.32 * building.width
        gable = polygon(canvas, [(building.x, high, z0), (far, high, z0), (middle, ridge, z0)])
        canvas.fill(gable, "wall", owner, shade=0.9)
        eaves, over = building.x - building.side * 0.35, z0 - 0.3
        slope = [(eaves, high - 0.2, over), (eaves, high - 0.2, z1), (middle, ridge, z1),
                 (middle, ridge, over)]  # fmt: skip
        canvas.fill(polygon(canvas, slope), "roof", owner, facing=facing)
    front = side_plane(canvas, building.x, building.z, (0, high))
    if front.empty:
        return
    canvas.fill(front, "wall", owner, facing=facing, shade=_grounded(canvas, front.v))
    along = front.u - np.float32(z0)
    _paint_windows(canvas, front, building, owner, along, facing=facing)
    if not building.gabled:
        cornice = front.mask & (front.v > high - 0.45)
        canvas.fill(front, "trim", owner, facing=facing, mask=cornice)


def _paint_windows(
    canvas: Canvas, wall: Patch, building: Building, owner: int, along: Floats, *, facing: int
) -> None:
    """Rows of windows; below them, towards the street, shops or a door."""
    if canvas.maps_only:
        return
    shops = building.height > 2 * FLOOR + 1 and facing != FRONT and building.style < 3
    # metres per pixel along the wall: far windows melt into it
    fine = wall.depth * wall.depth < 0.9 * building.window * canvas.camera.focal * abs(building.x)
    if facing != FRONT and not np.any(fine):
        return
    column, floor = along / np.float32(building.window), wall.v / np.float32(FLOOR)
    fu, fv = column % 1, floor % 1
    whole = (wall.v < building.height - 0.7) & wall.mask & (fine if facing != FRONT else True)
    side, low = ((0.27, 0.34), (0.22, 0.16), (0.3, 0.3), (0.06, 0.36))[building.style]
    panes = (fu > side) & (fu < 1 - side) & (fv > low) & (fv < 0.82) & whole
    cell = look_up(noise_texture(0.0), column + 31 * owner, floor + 57 * owner)
    if shops:
        panes &= floor >= 1
    frame = (fu > side - 0.07) & (fu < 1.07 - side) & (fv > low - 0.06) & (fv < 0.86) & whole
    if building.style != 3 and not shops:
        canvas.fill(wall, "trim", owner, facing=facing, mask=frame, shade=0.9)
    canvas.fill(wall, "window", owner, facing=facing, mask=panes, cell=cell, shade=0.7 + 0.5 * fv)
    if shops:
        band = whole & (wall.v < 2.35) & (wall.v > 0.4) & (fu > 0.06) & (fu < 0.94)
        canvas.fill(wall, "shop", owner, facing=facing, mask=band, cell=cell)
        awning = whole & (wall.v >= 2.25) & (wall.v < 3.0)
        canvas.fill(wall, "awning", owner, facing=facing, mask=awning,
                    shade=np.where((fu * 4) % 1 < 0.5, 1.0, 0.75).astype(np.float32))  # fmt: skip
    elif facing != FRONT:
        door = (np.abs(along - 1.5 * building.window) < 0.55) & (wall.v < 2.2) & wall.mask
        canvas.fill(wall, "awning", owner, facing=facing, mask=door, shade=0.8)
