"""Turns a painted canvas into a picture under one look: light, sky, haze, glow, weather."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt

from dpsims_reference.data.scenes.canvas import (
    FRONT,
    LEFT,
    MATERIALS,
    PART,
    RIGHT,
    UP,
    Canvas,
    Floats,
    Surface,
)
from dpsims_reference.data.scenes.looks import Look, albedo_table
from dpsims_reference.data.scenes.noise import look_up, noise_texture
from dpsims_reference.data.scenes.sky import render_sky
from dpsims_reference.data.scenes.things import World

Rng = np.random.Generator
Parts = npt.NDArray[np.uint8]
ROUGHNESS = np.array([m.roughness for m in MATERIALS.values()], np.float32)
GRAIN = np.array([32 / m.grain for m in MATERIALS.values()], np.float32)
PANE = (1.0, 0.70, 0.34)


def light_canvas(canvas: Canvas, world: World, look: Look, rng: Rng) -> Floats:
    """Render to ``(H, W, 3)`` in [0, 1], display colours."""
    # one table of albedo x light for every (object, material, direction)
    lights = _light_table(world, look)
    colors: Floats = albedo_table(look, canvas.names, rng)[:, :, None] * lights
    seen = canvas.finish()
    index = seen.owner.astype(np.int32) * len(MATERIALS) + seen.part
    picture = colors.reshape(-1, 3).take(index * len(lights) + seen.facing, axis=0)
    if look.lit:
        pools = np.where(seen.part <= PART["grass"], canvas.cell, 0) * np.float32(look.lit)
        picture *= 1 + pools[..., None] * (np.array(PANE, np.float32) / lights[UP])
    picture *= _brightness(canvas, seen, rng)[..., None]
    glowing = _emission(canvas, seen.part, world, look, rng)
    picture += glowing
    horizon = np.array(look.horizon, np.float32)
    clear = np.exp(seen.depth * np.float32(-look.haze))[..., None]
    picture -= horizon
    picture *= clear
    picture += horizon
    if look.wet:
        _reflect(canvas, seen.part, picture, look)
    sky_share = (seen.part == PART["sky"]).astype(np.float32)[..., None]
    picture *= 1 - sky_share
    picture, glowing, sky_share = (_shrink(image) for image in (picture, glowing, sky_share))
    picture += sky_share * render_sky(canvas, world, look, rng)
    picture += _glow(glowing, look)
    _weather(picture, look, rng)
    return _develop(picture, look, rng)


def _brightness(canvas: Canvas, seen: Surface, rng: Rng) -> Floats:
    """Shading of the shapes times the grain of the materials."""
    shift = rng.integers(0, 256, 2).astype(np.float32) + np.float32(4096)
    texel = GRAIN.take(seen.part)
    grain = look_up(noise_texture(0.7), canvas.u * texel + shift[0], canvas.v * texel + shift[1])
    return seen.shade * (1 + ROUGHNESS.take(seen.part) * (2 * grain - 1))


def _light_table(world: World, look: Look) -> Floats:
    """Light on each direction that a surface may face; the sun's place decides who is in shade."""
    side = 0.0 if world.sun is None else (world.sun[0] - 0.5) * 2
    behind = 0.75 if world.sun is None else 0.2
    ambient, sunlight = np.array(look.ambient), np.array(look.sunlight)
    height = 1 - 0.45 * look.low_sun
    table = np.zeros((4, 3), np.float32)
    table[UP] = ambient + sunlight * height
    table[FRONT] = ambient * 0.85 + sunlight * behind
    # facades that face left are lit from the left
    table[LEFT] = ambient * 0.8 + sunlight * np.clip(0.42 - 0.6 * side, 0.03, 0.95)
    table[RIGHT] = ambient * 0.8 + sunlight * np.clip(0.42 + 0.6 * side, 0.03, 0.95)
    return table


def _emission(canvas: Canvas, part: Parts, world: World, look: Look, rng: Rng) -> Floats:
    """Light that comes from sun or moon, windows, street lamps and cars."""
    table = np.zeros((len(MATERIALS), 3), np.float32)
    table[PART["sun"]] = look.sun
    if look.lit > 0.1:
        table[PART["lamp"]] = np.array((3.4, 2.6, 1.5)) * min(1.0, 2 * look.lit)
        table[PART["tail"]] = (0.9, 0.03, 0.02)
        table[PART["head"]] = (1.9, 1.8, 1.5)
        table[PART["shop"]] = np.array(PANE) * look.lit * 0.8
    light = table.take(part, axis=0)
    if world.sun is not None and look.stars:
        disc = part == PART["sun"]
        seas = look_up(noise_texture(1.6), canvas.u[disc] * 40 + 70, canvas.v[disc] * 40 + 60)
        light[disc] *= (1 - 0.5 * np.clip(seas * 1.6 - 0.5, 0, 1))[:, None]
    panes = part == PART["window"]
    cell = (canvas.cell[panes] * 7 + rng.random(dtype=np.float32)) % 1
    pane = np.array(PANE, np.float32) * (0.4 + 0.6 * look.lit)
    light[panes] = np.where(cell < look.lit, 0.55 + 0.45 * (cell * 53 % 1), 0)[:, None] * pane
    # panes that are not lit mirror the sky
    sheen = np.float32(0.28) * np.array(look.horizon, np.float32)
    light[panes] += (cell >= look.lit)[:, None] * sheen * (0.3 + 0.9 * (cell * 91 % 1))[:, None]
    light[part == PART["glass"]] += 0.5 * sheen
    return light


def _reflect(canvas: Canvas, part: Parts, picture: Floats, look: Look) -> None:
    """Wet ground mirrors what stands behind it."""
    horizon = canvas.camera.horizon
    first = int(np.searchsorted(canvas.y, horizon + 0.5))
    rows = canvas.y[first:]
    u, v, part = canvas.u[first:], canvas.v[first:], part[first:]
    ripple = look_up(noise_texture(0.7), u * 16, v * 5) - 0.5
    depth = (rows - horizon)[:, None] * (1 + 0.12 * ripple)
    source = np.clip((horizon - 0.8 * depth) * canvas.oversampling, 0, len(canvas.y) - 1)
    mirrored = picture[source.astype(np.int32), np.arange(len(canvas.x))[None]]
    np.minimum(mirrored, 0.8, out=mirrored)
    ground = (part >= PART["road"]) & (part <= PART["curb"])
    share = ground * (0.25 + 0.35 * look_up(noise_texture(1.3), u * 9, v * 4))
    picture[first:] += share[..., None] * look.wet * (mirrored - picture[first:])


def _shrink(image: Floats) -> Floats:
    """Mean of the 2 x 2 points of each pixel."""
    return 0.25 * (image[::2, ::2] + image[1::2, ::2] + image[::2, 1::2] + image[1::2, 1::2])


def _glow(light: Floats, look: Look) -> Floats:
    """Bright things bleed into the air around them: two Gaussian blurs."""
    height, width = light.shape[:2]
    total = np.zeros_like(light)
    if look.lit < 0.1:
        return total
    for sigma, share in ((0.02 * height, 0.35), (0.08 * height, 0.4)):
        tall = (_gaussian(height, sigma) @ light.reshape(height, -1)).reshape(light.shape)
        wide = _gaussian(width, sigma) @ tall.swapaxes(0, 1).reshape(width, -1)
        total += np.float32(share) * wide.reshape(width, height, 3).swapaxes(0, 1)
    return total


@functools.lru_cache(maxsize=8)
def _gaussian(size: int, sigma: float) -> Floats:
    """The matrix that blurs a line of ``size`` pixels."""
    line = np.arange(size)
    weights = np.exp(-0.5 * ((line[:, None] - line[None]) / sigma) ** 2)
    return (weights / weights.sum(1, keepdims=True)).astype(np.float32)


def _weather(picture: Floats, look: Look, rng: Rng) -> None:
    """Falling snow or rain in front of everything."""
    height, width = picture.shape[:2]
    if look.flakes:
        for size, count in ((1, 0.010), (2, 0.0025)):
            total = int(count * height * width)
            y, x = rng.integers(height, size=total), rng.integers(width, size=total)
            for dy in range(size):
                for dx in range(size):
                    spot = (y + dy) % height, (x + dx) % width
                    picture[spot] += 0.75 * look.flakes * (1.05 - picture[spot])
    if look.streaks:
        length = max(3, height // 14)
        total = int(0.0035 * height * width)
        y, x = rng.integers(height, size=total), rng.integers(width, size=total)
        for step in range(length):
            spot = (y + step) % height, (x - step // 4) % width
            picture[spot] += 0.16 * look.streaks * (0.9 - picture[spot])


def _develop(picture: Floats, look: Look, rng: Rng) -> Floats:
    """Exposure, a soft shoulder for bright light, display gamma, a trace of film grain."""
    height, width = picture.shape[:2]
    exposed = np.maximum(picture, 0) * np.float32(1.35 * look.exposure)
    shown = np.sqrt(1 - np.exp(-exposed))
    offset = rng.integers(0, 256, 2)
    noise = np.roll(noise_texture(0.0), offset, (0, 1))
    tiles = (-(-height // 256), -(-width // 256))
    noise = np.tile(noise, tiles)[:height, :width]
    return np.clip(shown + np.float32(0.022) * (noise[..., None] - 0.5), 0, 1)
