"""Times of day, weathers and seasons, and the colours that things may have in them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from dpsims_reference.data.scenes.canvas import MATERIALS, PART, Floats

Rgb = tuple[float, float, float]
Palette = tuple[Rgb, ...]

WALLS: Palette = (
    (0.80, 0.68, 0.52), (0.72, 0.45, 0.34), (0.86, 0.80, 0.70), (0.62, 0.36, 0.28),
    (0.70, 0.72, 0.74), (0.88, 0.72, 0.50), (0.60, 0.66, 0.70), (0.84, 0.62, 0.54),
    (0.92, 0.90, 0.86), (0.58, 0.52, 0.46), (0.72, 0.76, 0.62),
)  # fmt: skip
ROOFS: Palette = (
    (0.52, 0.24, 0.18), (0.38, 0.30, 0.28), (0.30, 0.32, 0.36), (0.60, 0.32, 0.22),
)  # fmt: skip
PAINTS: Palette = (
    (0.75, 0.10, 0.10), (0.12, 0.24, 0.55), (0.88, 0.88, 0.88), (0.10, 0.10, 0.12),
    (0.55, 0.57, 0.60), (0.90, 0.70, 0.12), (0.12, 0.40, 0.32), (0.80, 0.38, 0.12),
    (0.40, 0.62, 0.80),
)  # fmt: skip
CLOTHES: Palette = (
    (0.80, 0.18, 0.20), (0.18, 0.34, 0.66), (0.92, 0.88, 0.82), (0.16, 0.18, 0.22),
    (0.88, 0.66, 0.20), (0.30, 0.52, 0.38), (0.58, 0.36, 0.60), (0.86, 0.50, 0.44),
)  # fmt: skip
DENIMS: Palette = ((0.16, 0.20, 0.34), (0.12, 0.12, 0.14), (0.42, 0.36, 0.28), (0.3, 0.3, 0.32))
SKINS: Palette = ((0.88, 0.68, 0.56), (0.74, 0.52, 0.38), (0.50, 0.34, 0.24), (0.34, 0.22, 0.16))
HAIRS: Palette = ((0.10, 0.08, 0.07), (0.30, 0.18, 0.10), (0.62, 0.46, 0.24), (0.5, 0.5, 0.5))
SUMMER: Palette = ((0.20, 0.42, 0.13), (0.28, 0.48, 0.15), (0.16, 0.36, 0.16), (0.36, 0.50, 0.16))
CONIFER: Rgb = (0.13, 0.31, 0.17)
AUTUMN: Palette = ((0.80, 0.42, 0.10), (0.72, 0.24, 0.10), (0.84, 0.60, 0.14), (0.50, 0.44, 0.14))
BLOSSOM: Palette = ((0.94, 0.66, 0.74), (0.96, 0.78, 0.82), (0.88, 0.54, 0.66), (0.46, 0.62, 0.26))
SNOWY: Palette = ((0.72, 0.78, 0.80), (0.82, 0.86, 0.90), (0.40, 0.48, 0.42), (0.62, 0.70, 0.70))


@dataclass(frozen=True)
class Look:
    """One mood. Colours are linear light; ``sunlight`` falls on what faces the sun."""

    zenith: Rgb
    horizon: Rgb
    sunlight: Rgb
    ambient: Rgb
    sun: Rgb
    cloud: Rgb
    clouds: float = 0.35
    haze: float = 0.002
    lit: float = 0.0
    wet: float = 0.0
    snow: float = 0.0
    stars: float = 0.0
    low_sun: float = 0.0
    streaks: float = 0.0
    flakes: float = 0.0
    exposure: float = 1.0
    grass: Rgb = (0.34, 0.50, 0.18)
    leaves: Palette = SUMMER


_NOON = Look(
    zenith=(0.10, 0.28, 0.72), horizon=(0.52, 0.70, 0.95), sunlight=(1.15, 1.05, 0.90),
    ambient=(0.52, 0.62, 0.78), sun=(6.0, 5.6, 4.6), cloud=(1.25, 1.25, 1.28),
)  # fmt: skip
_OVERCAST = Look(
    zenith=(0.40, 0.45, 0.52), horizon=(0.68, 0.70, 0.73), sunlight=(0.10, 0.10, 0.10),
    ambient=(0.76, 0.79, 0.84), sun=(1.05, 1.03, 0.98), cloud=(0.74, 0.75, 0.77), clouds=0.85,
    haze=0.005,
)  # fmt: skip
LOOKS: dict[str, Look] = {
    "noon": _NOON,
    "spring": replace(_NOON, zenith=(0.16, 0.40, 0.80), clouds=0.55, leaves=BLOSSOM,
                      grass=(0.38, 0.60, 0.20)),
    "autumn": replace(_NOON, zenith=(0.14, 0.30, 0.62), horizon=(0.80, 0.74, 0.66),
                      sunlight=(1.25, 0.95, 0.62), clouds=0.45, leaves=AUTUMN,
                      grass=(0.48, 0.46, 0.18), low_sun=0.4, haze=0.004),
    "sunset": Look(
        zenith=(0.09, 0.11, 0.32), horizon=(1.35, 0.50, 0.16), sunlight=(1.35, 0.58, 0.24),
        ambient=(0.34, 0.27, 0.36), sun=(7.0, 3.6, 1.4), cloud=(1.05, 0.40, 0.28), clouds=0.5,
        haze=0.005, lit=0.3, low_sun=1.0,
    ),
    "dawn": Look(
        zenith=(0.26, 0.36, 0.66), horizon=(1.10, 0.74, 0.66), sunlight=(0.85, 0.58, 0.48),
        ambient=(0.46, 0.44, 0.54), sun=(4.5, 3.4, 2.6), cloud=(1.0, 0.68, 0.66), clouds=0.6,
        haze=0.008, lit=0.12, low_sun=0.8,
    ),
    "dusk": Look(
        zenith=(0.03, 0.06, 0.22), horizon=(0.42, 0.26, 0.38), sunlight=(0.05, 0.05, 0.08),
        ambient=(0.17, 0.19, 0.34), sun=(1.7, 1.5, 1.3), cloud=(0.24, 0.17, 0.30), clouds=0.45,
        lit=0.55, stars=0.3, exposure=1.25, haze=0.004,
    ),
    "night": Look(
        zenith=(0.006, 0.010, 0.035), horizon=(0.05, 0.05, 0.10), sunlight=(0.06, 0.07, 0.11),
        ambient=(0.055, 0.065, 0.12), sun=(1.9, 1.9, 1.75), cloud=(0.05, 0.05, 0.08), clouds=0.3,
        lit=0.42, stars=1.0, exposure=1.6, haze=0.003,
    ),
    "overcast": _OVERCAST,
    "fog": replace(_OVERCAST, zenith=(0.66, 0.69, 0.72), horizon=(0.80, 0.81, 0.82), clouds=0.2,
                   haze=0.032, lit=0.15),
    "rain": replace(_OVERCAST, zenith=(0.22, 0.26, 0.31), horizon=(0.42, 0.45, 0.49),
                    ambient=(0.44, 0.48, 0.55), cloud=(0.36, 0.38, 0.42), wet=1.0, lit=0.35,
                    streaks=1.0, haze=0.009),
    "snow": replace(_OVERCAST, zenith=(0.56, 0.61, 0.68), horizon=(0.80, 0.83, 0.87), snow=1.0,
                    flakes=1.0, haze=0.010, lit=0.2, leaves=SNOWY, grass=(0.90, 0.92, 0.95)),
    "frost": replace(_NOON, zenith=(0.20, 0.42, 0.84), horizon=(0.78, 0.86, 1.0), snow=0.9,
                     leaves=SNOWY, grass=(0.88, 0.91, 0.96), low_sun=0.4),
}  # fmt: skip


def sample_look(rng: np.random.Generator, name: str | None) -> Look:
    """The named mood, or any, with its colours, haze and clouds varied a little."""
    chosen = str(rng.choice(list(LOOKS))) if name is None else name
    look = LOOKS[chosen]
    warm = rng.uniform(-0.06, 0.06)
    tint = np.array((1 + warm, 1.0, 1 - warm)) * rng.uniform(0.92, 1.08)

    def vary(rgb: Rgb) -> Rgb:
        red, green, blue = (float(value) for value in np.array(rgb) * tint)
        return red, green, blue

    return replace(
        look,
        zenith=vary(look.zenith), horizon=vary(look.horizon), sunlight=vary(look.sunlight),
        ambient=vary(look.ambient), haze=look.haze * rng.uniform(0.6, 1.5),
        clouds=min(1.0, look.clouds * rng.uniform(0.4, 1.6)),
        lit=look.lit * rng.uniform(0.7, 1.3), exposure=look.exposure * rng.uniform(0.92, 1.1),
    )  # fmt: skip


def albedo_table(look: Look, names: list[str], rng: np.random.Generator) -> Floats:
    """Linear albedo of every (object, material): ``(num_objects, num_materials, 3)``."""
    base = np.array([material.rgb for material in MATERIALS.values()], np.float32)
    base[PART["grass"]] = look.grass
    table = np.repeat(base[None], len(names), axis=0)
    palettes = {
        "wall": WALLS, "roof": ROOFS, "body": PAINTS, "shirt": CLOTHES, "awning": PAINTS,
        "trousers": DENIMS, "skin": SKINS, "hair": HAIRS, "leaf": look.leaves,
    }  # fmt: skip
    for part, palette in palettes.items():
        colors = np.array(palette, np.float32)[rng.integers(len(palette), size=len(names))]
        table[:, PART[part]] = colors * rng.uniform(0.85, 1.12, (len(names), 1))
    evergreen = [name == "conifer" for name in names]
    table[evergreen, PART["leaf"]] = np.array(SNOWY[2] if look.snow else CONIFER) * rng.uniform(
        0.85, 1.15, (sum(evergreen), 1)
    )
    hill = 0.5 * np.mean(look.leaves, axis=0) + 0.5 * np.array(look.grass) * 0.8
    table[:, PART["hill"]] = hill * rng.uniform(0.75, 1.05, (len(names), 1))
    if look.snow:
        white = np.array((0.9, 0.92, 0.96), np.float32)
        for part, cover in (("road", 0.5), ("mark", 0.35), ("paving", 0.7), ("curb", 0.6),
                            ("roof", 0.9), ("hill", 0.75), ("skyline", 0.2)):  # fmt: skip
            mix = np.float32(cover * look.snow)
            table[:, PART[part]] = table[:, PART[part]] * (1 - mix) + white * mix
    if look.wet:
        table[:, [PART["road"], PART["paving"], PART["curb"]]] *= np.float32(0.72)
    return table * table
