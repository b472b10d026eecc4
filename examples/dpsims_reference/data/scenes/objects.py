"""Paints trees, lamps, cars and people. Nothing here depends on the look."""

from __future__ import annotations

import numpy as np

from dpsims_reference.data.scenes.canvas import UP, Canvas
from dpsims_reference.data.scenes.noise import look_up, noise_texture
from dpsims_reference.data.scenes.shapes import NEAREST, front_plane
from dpsims_reference.data.scenes.things import Car, Lamp, Person, Thing, Tree


def paint_thing(canvas: Canvas, thing: Thing) -> None:
    """Paint one thing over what is already there."""
    if isinstance(thing, Tree):
        _paint_tree(canvas, thing)
    elif isinstance(thing, Lamp):
        _paint_lamp(canvas, thing)
    elif isinstance(thing, Car):
        _paint_car(canvas, thing)
    elif isinstance(thing, Person):
        _paint_person(canvas, thing)


def mark_ground(canvas: Canvas, thing: Thing) -> None:
    """Put the soft shadow under a thing, or the pool of light under a lamp, on bare ground."""
    x, strength = thing.x, 0.4
    if isinstance(thing, Tree):
        reach, near, far, strength = 0.33 * thing.height, -1.6, 1.6, 0.5
    elif isinstance(thing, Car):
        reach, near, far, strength = 0.75 * thing.width, -0.5, thing.length + 0.5, 0.85
    elif isinstance(thing, Lamp):
        x, reach, near, far = x + thing.arm, 4.0, -4.5, 4.5
    else:
        reach, near, far = 0.4, -0.35, 0.35
    cam = canvas.camera
    first, last = max(thing.z + near, NEAREST), max(thing.z + far, NEAREST + 0.5)
    rows, cols = canvas.window(
        cam.column(x - reach, first if x < reach else last), cam.row(0, last),
        cam.column(x + reach, first if x > -reach else last), cam.row(0, first),
    )  # fmt: skip
    if rows.start == rows.stop or cols.start == cols.stop:
        return
    across = (canvas.u[rows, cols] - np.float32(x)) * np.float32(1 / reach)
    middle, half = np.float32((first + last) / 2), np.float32((last - first) / 2)
    along = (canvas.v[rows, cols] - middle) / half
    cover = np.clip(np.float32(1.3) - across * across - along * along, 0, 1)
    if isinstance(thing, Lamp):
        np.maximum(canvas.cell[rows, cols], cover, out=canvas.cell[rows, cols])
    else:
        canvas.shade[rows, cols] *= 1 - np.float32(strength) * cover


def _paint_tree(canvas: Canvas, tree: Tree) -> None:
    size = tree.height
    patch = front_plane(
        canvas, tree.z, (tree.x - 0.48 * size, tree.x + 0.48 * size), (0, 1.1 * size)
    )
    if patch.empty:
        return
    owner = canvas.add("conifer" if tree.conifer else "tree")
    a, b = (patch.u - np.float32(tree.x)) / np.float32(size), patch.v / np.float32(size)
    texel = np.float32(9.0)
    lumps = look_up(noise_texture(1.2), patch.u * texel + 37 * owner, patch.v * texel) - 0.5
    across = np.abs(a)
    trunk = (across < 0.03 - 0.012 * b) & (b < 0.55)
    canvas.fill(patch, "trunk", owner, mask=trunk, shade=0.75 + 6 * a)
    if tree.conifer:
        tier = (b * 6.0) % 1.0
        crown = 0.30 * (1.04 - b) * (1.15 - 0.5 * tier) + 0.06 * lumps > across
        light = 0.45 + 0.55 * (1 - tier) * (0.6 + 0.4 * b)
        canvas.fill(patch, "leaf", owner, mask=crown & (b > 0.12), shade=light + 0.5 * lumps)
        return
    x, y, r = (tree.balls[:, n, None, None] for n in range(3))
    gap = ((a - x) ** 2 + (b - y) ** 2) / (r * r)
    crown = gap.min(0) < 1.0 + 1.1 * lumps
    if canvas.maps_only:
        canvas.fill(patch, "leaf", owner, mask=crown)
        return
    nearest = gap.argmin(0)
    light = (b - y[:, 0, 0][nearest]) / r[:, 0, 0][nearest]
    light = np.clip(0.72 + 0.3 * light + 0.35 * (b - 0.66), 0.25, 1.1)
    canvas.fill(patch, "leaf", owner, mask=crown, shade=light + 0.5 * lumps)


def _paint_lamp(canvas: Canvas, lamp: Lamp) -> None:
    # at least one pixel wide: a thinner post would come and go from row to row
    half = max(0.055, 0.5 * lamp.z / canvas.camera.focal)
    wide, thick = max(0.5, 1.1 * half), max(0.17, 0.9 * half)
    tip, top = lamp.x + lamp.arm, lamp.height
    span = (min(lamp.x - half, tip - wide), max(lamp.x + half, tip + wide))
    patch = front_plane(canvas, lamp.z, span, (0, top + thick))
    if patch.empty:
        return
    owner = canvas.add("lamp")
    u, up = patch.u, patch.v - np.float32(top)
    post = (np.abs(u - np.float32(lamp.x)) < half) & (up < half)
    arm = (np.abs(u - np.float32((lamp.x + tip) / 2)) < abs(lamp.arm) / 2) & (np.abs(up) < half)
    reach = ((u - np.float32(tip)) / np.float32(wide)) ** 2
    high = up / np.float32(thick)
    canvas.fill(patch, "pole", owner, mask=post | arm | (reach + high**2 < 1), shade=1.0)
    canvas.fill(patch, "lamp", owner, mask=(reach + (high + 0.5) ** 2 < 0.9) & (high < -0.15))


def _paint_car(canvas: Canvas, car: Car) -> None:
    """The body as slices from far to near, then the end that faces us."""
    half, high = car.width / 2, car.height
    end = front_plane(canvas, car.z, (car.x - half, car.x + half), (0.0, high))
    far_edge = canvas.camera.column(car.x - half * (1 if car.x > 0 else -1), car.z + car.length)
    if end.empty and not 0 <= far_edge <= canvas.size[1]:
        return
    owner = canvas.add("car")
    near = 14 * car.z < 5 * canvas.camera.focal
    # heights along the car from our end to the far end, as parts of the height
    profile = (0.62, 0.97, 1.0, 0.97, 0.6) if not car.tall else (0.97, 1.0, 1.0, 0.97, 0.6)
    if car.oncoming:
        profile = profile[::-1]
    for wheel in (0.8, 0.14) if near else (0.14,):
        z = car.z + wheel * car.length
        tyres = front_plane(canvas, z, (car.x - half, car.x + half), (0, 0.5))
        canvas.fill(tyres, "tyre", owner, mask=np.abs(tyres.u - car.x) > half - 0.22)
    for n in (4, 3, 2, 1) if near else (2,):
        _paint_car_slice(canvas, car, owner, n, profile[n] * high)
    _paint_car_end(canvas, car, owner, profile[0] * high)


def _paint_car_slice(canvas: Canvas, car: Car, owner: int, n: int, top: float) -> None:
    """The cross-section ``n`` quarters along the car."""
    half, shoulder = car.width / 2, 0.6 * car.height
    span = (car.x - half, car.x + half)
    patch = front_plane(canvas, car.z + car.length * n / 4, span, (0.25, top))
    across = np.abs(patch.u - np.float32(car.x))
    lean = half - 0.55 * np.maximum(patch.v - shoulder, 0)
    inside = across < lean
    shade = (0.55 + 0.4 * patch.v / car.height).astype(np.float32)
    canvas.fill(patch, "body", owner, mask=inside, facing=UP, shade=shade)
    if top > shoulder + 0.1 and not canvas.maps_only:
        pane = (patch.v > shoulder + 0.04) & (patch.v < car.height * 0.92)
        pillar = 0.05 if n > 1 else 0.13
        canvas.fill(
            patch, "glass", owner, mask=pane & (across < lean - pillar), shade=shade + 0.15
        )


def _paint_car_end(canvas: Canvas, car: Car, owner: int, top: float) -> None:
    half, high = car.width / 2, car.height
    end = front_plane(canvas, car.z, (car.x - half, car.x + half), (0.16, top))
    across = np.abs(end.u - np.float32(car.x))
    v = end.v
    lean = half - 0.5 * np.maximum(v - 0.6 * high, 0) - 0.1 * (v < 0.3)
    inside = across < lean
    canvas.fill(end, "body", owner, mask=inside, shade=np.float32(0.62) + 0.38 * v / top)
    if canvas.maps_only:
        return
    lights = (across > half * 0.58) & (across < half * 0.94) & (v > 0.4 * high) & (v < 0.53 * high)
    canvas.fill(end, "head" if car.oncoming else "tail", owner, mask=inside & lights)
    canvas.fill(end, "tyre", owner, mask=inside & (v < 0.3))
    grille = (across < half * 0.42) & (v > 0.3 * high) & (v < 0.42 * high)
    canvas.fill(end, "glass" if car.oncoming else "tyre", owner, mask=grille)
    if car.tall and not car.oncoming:
        pane = (v > 0.62 * high) & (v < 0.9 * high) & (across < lean - 0.12)
        canvas.fill(end, "glass", owner, mask=pane)


def _paint_person(canvas: Canvas, person: Person) -> None:
    size, reach = person.height, 0.2 * person.height
    patch = front_plane(canvas, person.z, (person.x - reach, person.x + reach), (0, size))
    if patch.empty:
        return
    owner = canvas.add("person")
    a, b = (patch.u - np.float32(person.x)) / np.float32(size), patch.v / np.float32(size)
    spread = np.float32(0.035 + 0.05 * person.stride) * np.clip(1 - 1.6 * b, 0, 1) + 0.03
    thick = max(0.036, 0.4 * person.z / canvas.camera.focal / size)
    legs = (np.abs(np.abs(a) - spread) < thick) & (b < 0.5)
    canvas.fill(patch, "trousers", owner, mask=legs, shade=0.7 + 0.6 * b)
    across = np.abs(a)
    torso = (b > 0.46) & (b < 0.83) & (across < 0.095 + 0.05 * np.sin(np.pi * (0.95 - b) / 0.5))
    canvas.fill(patch, "shirt", owner, mask=torso, shade=0.55 + 0.55 * b - 0.8 * a)
    hands = (b > 0.42) & (b < 0.48) & (np.abs(across - 0.135) < 0.025)
    head = a**2 + (0.8 * (b - 0.9)) ** 2 < 0.064**2
    canvas.fill(patch, "skin", owner, mask=head | hands, shade=1.0 - 1.5 * a)
    hair = head & ((b > 0.93) | (across > 0.05)) if person.bare_head else head & (b > 0.9)
    canvas.fill(patch, "hair" if person.bare_head else "shirt", owner, mask=hair)
