"""Noise for surfaces and clouds: one tileable picture, looked up at any coordinates."""

from __future__ import annotations

import functools

import numpy as np

from dpsims_reference.data.scenes.canvas import Floats


@functools.cache
def noise_texture(smoothness: float, *, size: int = 256) -> Floats:
    """A tileable noise image in [0, 1]; its spectrum falls as frequency to ``-smoothness``."""
    white = np.random.default_rng(20240605).standard_normal((size, size))
    frequency = np.fft.fftfreq(size) * size
    radius = np.hypot(frequency[:, None], frequency[None])
    radius[0, 0] = np.inf
    noise = np.fft.ifft2(np.fft.fft2(white) * radius**-smoothness).real
    noise = 0.5 + 0.22 * noise / noise.std()
    texture = np.clip(noise, 0, 1).astype(np.float32)
    texture.setflags(write=False)
    return texture


def look_up(texture: Floats, u: Floats, v: Floats) -> Floats:
    """The texture at ``(u, v)``, in texels, repeated without end."""
    size = len(texture)
    row, column = v.astype(np.int32) & (size - 1), u.astype(np.int32) & (size - 1)
    return texture.ravel().take(row * size + column)
