"""Draws a street at random. Its lists are sorted far to near."""

from __future__ import annotations

import numpy as np

from dpsims_reference.data.scenes.canvas import Camera, Floats
from dpsims_reference.data.scenes.things import (
    Building,
    Car,
    Lamp,
    Person,
    Side,
    Thing,
    Tree,
    World,
)

Rng = np.random.Generator
KINDS = ("terraces", "houses", "park", "fields")
MIXES = {
    "city": (0.85, 0.0, 0.15, 0.0),
    "suburb": (0.1, 0.7, 0.2, 0.0),
    "avenue": (0.3, 0.1, 0.6, 0.0),
    "country": (0.0, 0.2, 0.1, 0.7),
}


def sample_world(rng: Rng, image_size: tuple[int, int]) -> World:
    """Draw a street for one picture of the given size."""
    height, width = image_size
    place = rng.choice(list(MIXES), p=(0.36, 0.26, 0.2, 0.18))
    camera = Camera(
        height=rng.uniform(1.8, 3.4),
        center=width * rng.uniform(0.3, 0.7),
        horizon=height * rng.uniform(0.42, 0.6),
        focal=0.85 * float(np.sqrt(height * width)),
    )
    half = rng.uniform(3.0, 4.6)
    middle = rng.uniform(-0.4, 0.6) * half * rng.choice((-1, 1))
    road = (middle - half, middle + half)
    left, right = (_sample_side(rng, place) for _ in range(2))
    buildings = _buildings(rng, road[0], -1, left) + _buildings(rng, road[1], 1, right)
    things = _roadside(rng, road[0], -1, left) + _roadside(rng, road[1], 1, right)
    things += _traffic(rng, road)
    num_hills = rng.integers(1, 4) if place in {"country", "suburb"} else rng.integers(0, 2)
    return World(
        camera=camera,
        road=road,
        sides=(left, right),
        dash=rng.uniform(4, 8) if rng.random() < 0.85 else 0.0,
        edge_lines=rng.random() < (0.7 if place == "country" else 0.3),
        crossing=rng.uniform(6, 14) if rng.random() < 0.3 and place != "country" else 0.0,
        sun=_sun(rng),
        hills=[_ridge(rng, layer) for layer in range(num_hills)],
        town=_ridge(rng, -1) if place in {"city", "avenue"} else None,
        buildings=sorted(buildings, key=lambda building: building.z[0], reverse=True),
        things=sorted(things, key=lambda thing: thing.z, reverse=True),
    )


def _sun(rng: Rng) -> tuple[float, float, float] | None:
    x, y, radius = rng.uniform(0.08, 0.92), rng.uniform(0.07, 0.28), rng.uniform(0.028, 0.05)
    return (x, y, radius) if rng.random() < 0.55 else None


def _ridge(rng: Rng, layer: int) -> Floats:
    """Heights at 64 columns: a soft ridge, lower the nearer, or (layer -1) the roofs of a town."""
    if layer < 0:
        steps = np.repeat(rng.uniform(0.03, 0.15, 32), 2)
        towers = rng.random(64) < 0.06
        return (steps + towers * rng.uniform(0.02, 0.12, 64)).astype(np.float32)
    knots = np.interp(np.linspace(0, 7, 64), np.arange(8), rng.uniform(0, 1, 8))
    kernel = np.hanning(17)
    smooth = np.convolve(np.pad(knots, 8, mode="edge"), kernel / kernel.sum(), mode="valid")
    return ((0.02 + 0.2 * smooth) * (0.75**layer)).astype(np.float32)


def _sample_side(rng: Rng, place: str) -> Side:
    kind = str(rng.choice(KINDS, p=MIXES[place]))
    if kind == "terraces":
        return Side(rng.uniform(2.0, 4.0), 0.0, kind)
    if kind == "houses":
        return Side(rng.uniform(1.3, 2.0), rng.uniform(3, 6), kind)
    paving = rng.uniform(1.5, 3.0) if kind == "park" else 0.0
    return Side(paving, 1e4, kind)


def _buildings(rng: Rng, edge: float, side: int, plan: Side) -> list[Building]:
    """A row of facades, or of houses with gardens, along one edge of the road."""
    if plan.kind not in {"terraces", "houses"}:
        return []
    terraces = plan.kind == "terraces"
    x = edge + side * (plan.paving + plan.lawn)
    # nothing starts beside or behind the camera, so that no wall fills the picture
    z = rng.uniform(2.5, 9.0) + abs(x) * 0.5
    row = []
    while z < 100:
        length = rng.uniform(8, 18) if terraces else rng.uniform(7, 11)
        if z > 60 and terraces:
            # the far end of a row is a few pixels wide
            length = 60.0
        floors = int(rng.integers(2, 7)) if terraces else int(rng.integers(1, 3))
        row.append(
            Building(
                x=x + side * (0.0 if terraces else rng.uniform(0, 2)),
                side=side,
                z=(z, z + length),
                height=3.1 * floors + 0.8,
                width=rng.uniform(9, 14) if terraces else rng.uniform(6, 9),
                window=rng.uniform(1.9, 3.0),
                style=int(rng.integers(4)),
                gabled=not terraces or (floors < 4 and rng.random() < 0.4),
            )
        )
        gap = rng.uniform(3, 7) if not terraces or rng.random() < 0.15 else 0.0
        z += length + gap
    return row


def _tree(rng: Rng, x: float, z: float, *, conifer: bool, height: float) -> Tree:
    drawn = rng.random((3, 7))
    angle, reach = 2 * np.pi * drawn[0], 0.08 + 0.15 * drawn[1]
    balls = np.empty((7, 3), np.float32)
    balls[:, 0] = reach * np.cos(angle)
    balls[:, 1] = 0.66 + 0.9 * reach * np.sin(angle)
    balls[:, 2] = 0.14 + 0.07 * drawn[2]
    return Tree(x, z, height, conifer, balls)


def _roadside(rng: Rng, edge: float, side: int, plan: Side) -> list[Thing]:
    """Trees, lamps and people beside the road."""
    things: list[Thing] = []
    curb = edge + side * 0.7
    spacing, first = rng.uniform(10, 20), rng.uniform(4.5, 14)
    if rng.random() < 0.75 and plan.paving > 0:
        things += [
            Lamp(curb, z, rng.uniform(5, 6.5), -side * 1.4)
            for z in np.arange(first, 65, max(spacing, 12) * 1.3)
        ]
    rows = {"terraces": 0.45, "houses": 0.75, "park": 1.0, "fields": 0.5}[plan.kind]
    if rng.random() < rows:
        conifer, tall = rng.random() < 0.25, rng.uniform(4.5, 8.5)
        for z in np.arange(first + spacing / 2, 80, spacing):
            beside = 1.2 if plan.lawn == 0 else plan.paving + rng.uniform(1.2, 3)
            things.append(_tree(rng, edge + side * beside, z, conifer=conifer,
                                height=tall * rng.uniform(0.8, 1.2)))  # fmt: skip
    if plan.lawn > 100:
        for _ in range(rng.integers(2, 9)):
            x = edge + side * (plan.paving + rng.uniform(5, 45))
            things.append(_tree(rng, x, rng.uniform(12, 90), conifer=rng.random() < 0.35,
                                height=rng.uniform(5, 11)))  # fmt: skip
    if plan.paving > 0:
        for _ in range(rng.integers(0, 5)):
            x = edge + side * rng.uniform(0.6, plan.paving)
            things.append(_person(rng, x, rng.uniform(4.5, 28)))
    return things


def _person(rng: Rng, x: float, z: float) -> Person:
    return Person(x, z, rng.uniform(1.55, 1.9), rng.random(), rng.random() < 0.85)


def _traffic(rng: Rng, road: tuple[float, float]) -> list[Thing]:
    """Cars in both lanes, some parked at the edges, now and then someone crossing."""
    middle, half = sum(road) / 2, (road[1] - road[0]) / 2
    # parked cars need a wide road, and push the traffic towards the middle
    parking = half > 3.8 and rng.random() < 0.5
    lane = half * (0.28 if parking else 0.45)
    lanes = ((middle - lane, True), (middle + lane, False))
    parked = ((road[0] + 1.0, True), (road[1] - 1.0, False))
    things: list[Thing] = []
    for spots, chance, nearest in ((lanes, 0.75, 7.0), (parked, 0.75 * parking, 5.5)):
        for x, oncoming in spots:
            z = rng.uniform(nearest, nearest + 18)
            while z < 70 and rng.random() < chance:
                tall = rng.random() < 0.25
                things.append(
                    Car(x, z, oncoming, rng.uniform(1.7, 1.95), rng.uniform(3.8, 4.8),
                        rng.uniform(1.75, 2.1) if tall else rng.uniform(1.4, 1.55), tall)
                )  # fmt: skip
                z += rng.uniform(6, 25)
    if rng.random() < 0.2:
        things.append(_person(rng, rng.uniform(*road), rng.uniform(7, 16)))
    return things
