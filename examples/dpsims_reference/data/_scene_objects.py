"""Paints trees, lamps, cars and people. Nothing here depends on the look."""

from __future__ import annotations

import numpy as np

from dpsims_reference.data._scene_canvas import UP, Canvas, look_up, noise_texture
from dpsims_reference.data._scene_shapes import NEAREST, front_plane
from dpsims_reference.data._scene_things import Car, Lamp, Person, Thing, Tree


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
    owner = canvas.add("conifer" if tree.conifer else "tree")
    size = tree.height
    patch = front_plane(
        canvas, tree.z, (tree.x - 0.48 * size, tree.x + 0.48 * size), (0, 1.1 * size)
    )
    if patch.mask.size == 0:
        return
    a, b = (patch.u - np.float32(tree.x)) / np.float32(size), patch.v / np.float32(size)
    texel = np.float32(9.0)
    lumps = look_up(noise_texture(1.2), patch.u * texel + 37 * owner, patch.v * texel) - 0.5
    across = np.abs(a)
    trunk = (across < 0.03 - 0.012 * b) & (b < 0.55)
    canvas.fill(patch, "trunk", owner, mask=trunk, shade=0.75 + 6 * a)
    if tree.conifer:
        tier = (b * 6.0) % 1.0
        field = 0.30 * (1.04 - b) * (1.15 - 0.5 * tier) + 0.06 * lumps - across
        crown, light = (field > 0) & (b > 0.12), 0.45 + 0.55 * (1 - tier) * (0.6 + 0.4 * b)
    else:
        x, y, r = (tree.balls[:, n, None, None] for n in range(3))
        gap = ((a - x) ** 2 + (b - y) ** 2) / (r * r)
        nearest = gap.argmin(0)
        crown = gap.min(0) < 1.0 + 1.1 * lumps
        light = (b - y[:, 0, 0][nearest]) / r[:, 0, 0][nearest]
        light = np.clip(0.72 + 0.3 * light + 0.35 * (b - 0.66), 0.25, 1.1)
    canvas.fill(patch, "leaf", owner, mask=crown, shade=light + 0.5 * lumps)


def _paint_lamp(canvas: Canvas, lamp: Lamp) -> None:
    owner = canvas.add("lamp")
    # at least one pixel wide: a thinner post would come and go from row to row
    half = max(0.055, 0.5 * lamp.z / canvas.camera.focal)
    top = lamp.height
    post = front_plane(canvas, lamp.z, (lamp.x - half, lamp.x + half), (0, top))
    canvas.fill(post, "pole", owner)
    tip = lamp.x + lamp.arm
    span = (min(lamp.x, tip), max(lamp.x, tip))
    arm = front_plane(canvas, lamp.z, span, (top - half, top + half))
    canvas.fill(arm, "pole", owner)
    wide, thick = max(0.5, 1.1 * half), max(0.17, 0.9 * half)
    head = front_plane(canvas, lamp.z, (tip - wide, tip + wide), (top - 2 * thick, top + thick))
    across, up = (head.u - np.float32(tip)) / wide, (head.v - np.float32(top)) / thick
    canvas.fill(head, "pole", owner, mask=across**2 + up**2 < 1)
    canvas.fill(head, "lamp", owner, mask=(across**2 + (up + 0.5) ** 2 < 0.9) & (up < -0.15))


def _paint_car(canvas: Canvas, car: Car) -> None:
    """The body as slices from far to near, then the end that faces us."""
    owner = canvas.add("car")
    half, high = car.width / 2, car.height
    shoulder = 0.6 * high
    near = 14 * car.z < 5 * canvas.camera.focal
    # heights along the car from our end to the far end, as parts of the height
    profile = (0.62, 0.97, 1.0, 0.97, 0.6) if not car.tall else (0.97, 1.0, 1.0, 0.97, 0.6)
    if car.oncoming:
        profile = profile[::-1]
    for wheel in (0.8, 0.14):
        z = car.z + wheel * car.length
        tyres = front_plane(canvas, z, (car.x - half, car.x + half), (0, 0.5))
        canvas.fill(tyres, "tyre", owner, mask=np.abs(tyres.u - car.x) > half - 0.22)
    for n in (4, 3, 2, 1) if near else (2,):
        z = car.z + car.length * n / 4
        top = high * profile[n]
        patch = front_plane(canvas, z, (car.x - half, car.x + half), (0.25, top))
        across = np.abs(patch.u - np.float32(car.x))
        lean = half - 0.55 * np.clip(patch.v - shoulder, 0, None)
        inside = across < lean
        canvas.fill(patch, "body", owner, mask=inside, facing=UP,
                    shade=(0.55 + 0.4 * patch.v / high).astype(np.float32))  # fmt: skip
        if top > shoulder + 0.1:
            pane = (patch.v > shoulder + 0.04) & (patch.v < high * 0.92) & inside
            pillar = 0.05 if n > 1 and near else 0.13
            canvas.fill(patch, "glass", owner, mask=pane & (across < lean - pillar),
                        shade=np.float32(0.7) + 0.4 * patch.v / high)  # fmt: skip
    _paint_car_end(canvas, car, owner, profile[0] * high)


def _paint_car_end(canvas: Canvas, car: Car, owner: int, top: float) -> None:
    half, high = car.width / 2, car.height
    end = front_plane(canvas, car.z, (car.x - half, car.x + half), (0.16, top))
    if end.mask.size == 0:
        return
    across = np.abs(end.u - np.float32(car.x))
    v = end.v
    lean = half - 0.5 * np.clip(v - 0.6 * high, 0, None) - 0.1 * (v < 0.3)
    inside = across < lean
    canvas.fill(end, "body", owner, mask=inside, shade=np.float32(0.62) + 0.38 * v / top)
    if canvas.maps_only:
        return
    lights = (across > half * 0.58) & (across < half * 0.94) & (v > 0.4 * high) & (v < 0.53 * high)
    canvas.fill(end, "head" if car.oncoming else "tail", owner, mask=inside & lights)
    canvas.fill(end, "tyre", owner, mask=inside & (v < 0.3))
    grille = (across < half * 0.42) & (v > 0.3 * high) & (v < 0.42 * high)
    canvas.fill(end, "glass" if car.oncoming else "tyre", owner, mask=inside & grille)
    if car.tall and not car.oncoming:
        pane = (v > 0.62 * high) & (v < 0.9 * high) & (across < lean - 0.12)
        canvas.fill(end, "glass", owner, mask=pane)


def _paint_person(canvas: Canvas, person: Person) -> None:
    owner = canvas.add("person")
    size, reach = person.height, 0.2 * person.height
    patch = front_plane(canvas, person.z, (person.x - reach, person.x + reach), (0, size))
    if patch.mask.size == 0:
        return
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
