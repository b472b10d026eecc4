"""The things of a street: positions and sizes in metres.

``x`` is metres right of the camera, ``z`` metres ahead.
"""

from __future__ import annotations

from typing import NamedTuple

from dpsims_reference.data.scenes.canvas import Camera, Floats


class Building(NamedTuple):
    """A block beside the street; the facade stands at ``x`` from ``z[0]`` to ``z[1]``."""

    x: float
    side: int
    z: tuple[float, float]
    height: float
    width: float
    window: float
    style: int
    gabled: bool


class Tree(NamedTuple):
    """A trunk with a crown of balls ``(x, y, radius)`` in units of the height, or a conifer."""

    x: float
    z: float
    height: float
    conifer: bool
    balls: Floats


class Lamp(NamedTuple):
    """A lamp post whose arm reaches over the street."""

    x: float
    z: float
    height: float
    arm: float


class Car(NamedTuple):
    """A car seen from behind, or from the front when it comes towards us."""

    x: float
    z: float
    oncoming: bool
    width: float
    length: float
    height: float
    tall: bool


class Person(NamedTuple):
    """Someone on foot; ``stride`` in [0, 1] opens the legs."""

    x: float
    z: float
    height: float
    stride: float
    bare_head: bool


Thing = Tree | Lamp | Car | Person


class Side(NamedTuple):
    """One side of the street: how far paving and lawn reach, and what stands beyond."""

    paving: float
    lawn: float
    kind: str


class World(NamedTuple):
    """A whole street. Hills and the far town are heights above the horizon, as parts of ``H``."""

    camera: Camera
    road: tuple[float, float]
    sides: tuple[Side, Side]
    dash: float
    edge_lines: bool
    crossing: float
    sun: tuple[float, float, float] | None
    hills: list[Floats]
    town: Floats | None
    buildings: list[Building]
    things: list[Thing]
