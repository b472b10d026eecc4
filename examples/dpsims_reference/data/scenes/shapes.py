"""Surfaces seen in perspective: each function returns the patch of points that it covers."""

from __future__ import annotations

import math

import numpy as np

from dpsims_reference.data.scenes.canvas import Canvas, Floats, Patch

NEAREST = 1.5


def side_plane(canvas: Canvas, x: float, z: tuple[float, float], y: tuple[float, float]) -> Patch:
    """An upright plane along the street; ``u`` ``(1, w)`` runs along it, ``v`` ``(h, w)`` up."""
    cam = canvas.camera
    near, far = max(z[0], NEAREST), max(z[1], NEAREST + 0.1)
    ends = sorted((cam.column(x, near), cam.column(x, far)))
    tops = (cam.row(y[1], near), cam.row(y[1], far))
    bottoms = (cam.row(y[0], near), cam.row(y[0], far))
    rows, cols = canvas.window(ends[0], min(tops), ends[1], max(bottoms))
    offset = canvas.x[cols] - np.float32(cam.center)
    depth: Floats = np.float32(cam.focal * x) / np.where(offset == 0, np.float32(1e-6), offset)
    v: Floats = np.float32(cam.height) - (canvas.y[rows] - np.float32(cam.horizon))[:, None] * (
        depth * np.float32(1 / cam.focal)
    )
    mask = (v >= y[0]) & (v < y[1])
    return Patch(rows, cols, mask, depth[None], v, depth[None])


def front_plane(canvas: Canvas, z: float, x: tuple[float, float], y: tuple[float, float]) -> Patch:
    """An upright plane across the street; ``u`` ``(1, w)`` runs right, ``v`` ``(h, 1)`` up."""
    cam = canvas.camera
    rows, cols = canvas.window(
        cam.column(x[0], z), cam.row(y[1], z), cam.column(x[1], z), cam.row(y[0], z)
    )
    scale = np.float32(z / cam.focal)
    u = (canvas.x[cols] - np.float32(cam.center)) * scale
    v = np.float32(cam.height) - (canvas.y[rows] - np.float32(cam.horizon)) * scale
    return Patch(rows, cols, True, u[None], v[:, None], z)


def polygon(canvas: Canvas, corners: list[tuple[float, float, float]]) -> Patch:
    """A convex polygon through points ``(x, y, z)``; ``u`` and ``v`` are rough metres."""
    cam = canvas.camera
    screen = [(cam.column(x, max(z, NEAREST)), cam.row(y, max(z, NEAREST))) for x, y, z in corners]
    columns, lines = [p[0] for p in screen], [p[1] for p in screen]
    rows, cols = canvas.window(min(columns), min(lines), max(columns), max(lines))
    px, py = canvas.x[cols][None], canvas.y[rows][:, None]
    edges = list(zip(screen, screen[1:] + screen[:1], strict=True))
    turn = math.copysign(1, sum(ax * by - bx * ay for (ax, ay), (bx, by) in edges))
    inside = np.ones((py.shape[0], px.shape[1]), np.bool_)
    for (ax, ay), (bx, by) in edges:
        across, down = turn * (bx - ax), turn * (by - ay)
        inside &= np.float32(across) * py - np.float32(down) * px >= across * ay - down * ax
    depth = sum(z for _, _, z in corners) / len(corners)
    scale = np.float32(depth / cam.focal)
    return Patch(rows, cols, inside, px * scale, py * scale, depth)


def skyline(canvas: Canvas, tops: Floats, depth: float) -> Patch:
    """Everything between the horizon and the height ``tops``, one screen row per column."""
    cam = canvas.camera
    rows, cols = canvas.window(0, float(tops.min()), canvas.size[1], cam.horizon + 1)
    mask = canvas.y[rows][:, None] >= tops[None]
    scale = np.float32(depth / cam.focal)
    up = (np.float32(cam.horizon) - canvas.y[rows])[:, None]
    return Patch(rows, cols, mask, (canvas.x * scale)[None], up * scale, depth)


def ground(canvas: Canvas) -> Patch:
    """The ground plane below the horizon; ``u`` is metres to the right, ``v`` metres ahead."""
    cam = canvas.camera
    rows, cols = canvas.window(0, cam.horizon + 0.3, canvas.size[1], canvas.size[0] + 1)
    depth = np.float32(cam.focal * cam.height) / (canvas.y[rows] - np.float32(cam.horizon))
    u = (canvas.x - np.float32(cam.center))[None] * (depth * np.float32(1 / cam.focal))[:, None]
    wide = np.broadcast_to(depth[:, None], u.shape)
    return Patch(rows, cols, True, u, wide, wide)
