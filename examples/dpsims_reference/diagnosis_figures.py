"""Pictures of a diagnosis: one of its figures, one of how they moved during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpsims_reference.diagnosis import Diagnosis

_BEFORE, _AFTER, _INK = "#b0b7c3", "#2456a6", "#333333"
_HISTORY = (
    ("gates", "gate/"),
    ("share of variance from noise", "noise_share/"),
    ("distance of images between noises", "noise_diversity"),
)


def write_diagnosis(
    out: Path, found: Diagnosis, history: Sequence[dict[str, float]] = ()
) -> list[Path]:
    """Write diagnosis.txt and diagnosis.png, and diagnosis-history.png if there is a history.

    Returns:
        The files written.
    """
    out.mkdir(parents=True, exist_ok=True)
    written = [out / "diagnosis.txt", out / "diagnosis.png"]
    written[0].write_text(found.table() + "\n", encoding="utf-8")
    plot_diagnosis(written[1], found)
    if len(history) > 1:
        written.append(out / "diagnosis-history.png")
        plot_history(written[2], history)
    return written


def plot_diagnosis(path: Path, found: Diagnosis) -> None:
    """Gates, noise per scale, and kurtosis and effective rank before and after conditioning."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    gates, shares, kurtosis, rank = figure.subplots(2, 2).flat
    _bars(gates, [gate.name for gate in found.noise.gates], [g.value for g in found.noise.gates])
    gates.set_title("gates: 0 adds nothing", fontsize=10)
    gates.axvline(0, color=_INK, linewidth=0.8)
    scales = found.noise.scales
    names = [f"{scale.name}  {scale.size[0]}x{scale.size[1]}" for scale in scales]
    _bars(shares, names, [100 * scale.share for scale in scales])
    shares.set_title("variance of each map that comes from the noise, %", fontsize=10)
    shares.set_xlim(left=0)
    levels = found.conditioning.levels
    labels = [f"{level.size[0]}x{level.size[1]}\n{level.channels} ch" for level in levels]
    _pairs(kurtosis, labels, [(lv.before.kurtosis, lv.after.kurtosis) for lv in levels])
    kurtosis.set_title("kurtosis of D's features (3: normal)", fontsize=10)
    kurtosis.set_yscale("log")
    # plain numbers, not powers of ten
    kurtosis.yaxis.set_major_formatter("{x:g}")
    kurtosis.yaxis.set_minor_formatter("{x:g}")
    kurtosis.axhline(3, color=_INK, linewidth=0.8, linestyle=":")
    _pairs(
        rank,
        labels,
        [
            (lv.before.effective_rank / lv.channels, lv.after.effective_rank / lv.channels)
            for lv in levels
        ],
    )
    rank.set_title("effective rank of D's features / channels", fontsize=10)
    rank.set_ylim(0, 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def plot_history(path: Path, records: Sequence[dict[str, float]]) -> None:
    """Gates, noise shares and diversity over the steps, from ``diagnosis.jsonl``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    steps = np.array([record["step"] for record in records])
    for axis, (title, prefix) in zip(figure.subplots(1, len(_HISTORY)), _HISTORY, strict=True):
        names = [name for name in records[0] if name.startswith(prefix)]
        for name in names:
            values = [record.get(name, np.nan) for record in records]
            axis.plot(steps, values, linewidth=1.4, label=name.removeprefix(prefix))
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
        _plain(axis)
        if len(names) > 1:
            axis.legend(fontsize=6, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _bars(axis: Any, names: Sequence[str], values: Sequence[float]) -> None:
    places = np.arange(len(names))[::-1]
    axis.barh(places, values, color=_AFTER, height=0.6)
    axis.set_yticks(places, names, fontsize=7)
    _plain(axis)


def _pairs(axis: Any, names: Sequence[str], values: Sequence[tuple[float, float]]) -> None:
    places = np.arange(len(names))
    for offset, index, colour, label in ((-0.2, 0, _BEFORE, "before"), (0.2, 1, _AFTER, "after")):
        heights = [pair[index] for pair in values]
        axis.bar(places + offset, heights, width=0.38, color=colour, label=label)
    axis.set_xticks(places, names, fontsize=7)
    axis.legend(fontsize=7, frameon=False)
    _plain(axis)


def _plain(axis: Any) -> None:
    axis.tick_params(labelsize=7)
    axis.spines[["top", "right"]].set_visible(False)
