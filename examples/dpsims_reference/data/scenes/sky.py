"""The sky of a street scene, one colour per output pixel."""

from __future__ import annotations

import numpy as np

from dpsims_reference.data.scenes.canvas import Canvas, Floats
from dpsims_reference.data.scenes.looks import Look
from dpsims_reference.data.scenes.noise import look_up, noise_texture
from dpsims_reference.data.scenes.things import World


def render_sky(canvas: Canvas, world: World, look: Look, rng: np.random.Generator) -> Floats:
    """Gradient, clouds on a plane overhead, stars, and the halo around sun or moon."""
    height, width = canvas.size
    x, y = (np.arange(size, dtype=np.float32) + np.float32(0.5) for size in (width, height))
    horizon = np.float32(canvas.camera.horizon)
    up = np.clip((horizon - y) / horizon, 0, 1)[:, None]
    blend = (up**0.6)[..., None]
    low, high = np.array(look.horizon, np.float32), np.array(look.zenith, np.float32)
    sky = np.repeat(low + blend * (high - low), width, axis=1)
    if world.sun is not None:
        sky += _halo(world.sun, x / height, y / height, width / height, look)
    away = 1 / (up + np.float32(0.12))
    offset = rng.uniform(0, 256, 2).astype(np.float32) + np.float32(4096)
    u = (x - np.float32(canvas.camera.center))[None] / np.float32(height) * away * 26 + offset[0]
    v = away * 15 + offset[1]
    puffs = look_up(noise_texture(1.7), u, v)
    wisps = look_up(noise_texture(1.0), 3 * u, 3 * v)
    cover = np.clip((0.8 * puffs + 0.2 * wisps - 0.72 + 0.42 * look.clouds) * 4.5, 0, 1)
    cover *= np.clip(up * 5, 0.0, 0.92)
    if look.stars:
        twinkle = look_up(noise_texture(0.0), x[None] * 1.7 + offset[0], y[:, None] * 1.7)
        stars = np.clip((twinkle - 0.975) * 40, 0, 1) * (1 - cover) * look.stars
        sky += (stars * up)[..., None]
    shading = (np.float32(0.62) + np.float32(0.5) * puffs)[..., None]
    sky += cover[..., None] * (shading * np.array(look.cloud, np.float32) - sky)
    return sky


def _halo(
    sun: tuple[float, float, float], x: Floats, y: Floats, aspect: float, look: Look
) -> Floats:
    across, down = (x - np.float32(sun[0] * aspect))[None], (y - np.float32(sun[1]))[:, None]
    ring = np.clip(0.011 / (across * across + down * down + 0.02) - 0.01, 0, 1)
    strength = np.float32(0.09 if look.stars else 0.13)
    return ring[..., None] * strength * np.array(look.sun, np.float32)
