"""Pictures of a run, each in a light and a dark form."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.ceilings import floor_seconds
from benchmarks.gates import median_of
from benchmarks.results import CaseResult, RunResult, VariantResult

_THEMES = {
    "light": {"paper": "#ffffff", "ink": "#1a1a1a", "grid": "#d9d9d9"},
    "dark": {"paper": "#131416", "ink": "#e6e6e6", "grid": "#3c3f44"},
}
# Okabe and Ito's colours without black: distinct without red-green vision, on white and on black
_COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#d55e00", "#0072b2", "#b8a800", "#999999")
_MARKERS = "osD^vPX*"
# a text beside a point, in points of type
_NEAR: dict[str, Any] = {"textcoords": "offset points", "fontsize": 8}
Drawer = Callable[[Any, RunResult, dict[str, str]], bool]


def write_pictures(run: RunResult, folder: Path) -> list[Path]:
    """Draw what the run has numbers for.

    Returns:
        The PNG files, light before dark.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, Drawer] = {
        "roofline": _roofline,
        "latency": _latency,
        "memory": _memory,
    }
    written = []
    for kind, draw in kinds.items():
        for theme, colours in _THEMES.items():
            with mpl.rc_context(_style(colours)):
                figure = Figure(figsize=(8.4, 4.2), dpi=130, layout="constrained")
                if not draw(figure, run, colours):
                    break
                path = folder / f"benchmarks-{run.profile}-{kind}-{theme}.png"
                # without the version of the library, equal numbers give equal files
                metadata = {"Software": None}
                figure.savefig(path, facecolor=colours["paper"], metadata=metadata)
            written.append(path)
    return written


def _style(colours: dict[str, str]) -> Any:
    ink = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"),
        colours["ink"],
    )
    return {
        **ink,
        "axes.facecolor": colours["paper"],
        "axes.grid": True,
        "grid.color": colours["grid"],
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "font.size": 9,
        "legend.fontsize": 8,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }


def _roofline(figure: Any, run: RunResult, colours: dict[str, str]) -> bool:
    """Shares of the ceilings, and the roofline of the cases that multiply."""
    cases = [case for case in run.cases if (case.flops or case.bytes) and _fastest(case)]
    if not cases:
        return False
    shares, roof = figure.subplots(1, 2, width_ratios=(2, 3))
    _draw_shares(shares, run, cases, colours)
    _draw_roof(roof, run, [case for case in cases if case.flops and case.bytes], colours)
    return True


def _draw_shares(
    axes: Any, run: RunResult, cases: list[CaseResult], colours: dict[str, str]
) -> None:
    """A ring for every case's baseline and a mark for its fastest variant."""
    components = list(dict.fromkeys(case.component for case in cases))[::-1]
    for row, component in enumerate(components):
        for case in cases:
            baseline, fastest = case.variant(case.baseline), _fastest(case)
            if case.component != component or baseline is None or fastest is None:
                continue
            floor = floor_seconds(case.flops, case.bytes, case.unit, run.ceilings(case))
            if baseline.seconds:
                share = 100 * floor / median_of(baseline)
                axes.plot(share, row - 0.14, "o", mfc="none", mec=colours["ink"], markersize=4)
            share = 100 * floor / median_of(fastest)
            axes.plot(share, row + 0.14, "o", color=_colour(run, component), markersize=5)
    axes.set_xscale("log")
    axes.axvline(100, color=colours["ink"], linewidth=1.2)
    axes.set_yticks(range(len(components)), components)
    axes.set_ylim(-0.6, len(components) - 0.4)
    low = axes.get_xlim()[0]
    ticks = [tick for tick in (0.01, 0.1, 1, 10, 100) if tick >= low]
    axes.set_xticks(ticks, [f"{tick:g} %" for tick in ticks])
    axes.set_title("Share of the ceiling: ○ baseline, ● fastest", loc="left")


def _draw_roof(
    axes: Any, run: RunResult, cases: list[CaseResult], colours: dict[str, str]
) -> None:
    """Operations per second by operations per byte, under the roof of every unit."""
    axes.set_title("Fastest variants under the measured roofs", loc="left")
    axes.set_xlabel("operations per byte that must move")
    axes.set_ylabel("GFLOP/s")
    if not cases:
        return
    intensities = [case.flops / case.bytes for case in cases]
    ceilings = run.ceilings(cases[0])
    ends = min(intensities) / 2, 2 * max(intensities)
    steps = [ends[0] * (ends[1] / ends[0]) ** (i / 200) for i in range(201)]
    for unit in dict.fromkeys(case.unit for case in cases):
        rate = ceilings.get(unit, ceilings["float32"])
        roof = [min(rate, ceilings["copy"] * step) / 1e9 for step in steps]
        axes.loglog(steps, roof, color=colours["ink"], linewidth=1.2)
        axes.annotate(f"copy, {unit} product", (ends[1], roof[-1]), (0, 4), ha="right", **_NEAR)
    for number, component in enumerate(dict.fromkeys(case.component for case in cases)):
        own = [case for case in cases if case.component == component]
        x = [case.flops / case.bytes for case in own]
        y = [case.flops / _seconds(case) / 1e9 for case in own]
        colour = _colour(run, component)
        axes.plot(x, y, _MARKERS[number], color=colour, label=component, markersize=5)
    axes.legend(loc="best")


def _latency(figure: Any, run: RunResult, colours: dict[str, str]) -> bool:  # noqa: ARG001
    """Milliseconds an image by batch, one panel a model that has several batches."""
    found: dict[str, list[CaseResult]] = {}
    for case in run.cases:
        if case.component == "generator" and not case.axes["compiled"]:
            found.setdefault(f"{case.axes['model']}, {case.axes['dtype']}", []).append(case)
    models = {name: cases for name, cases in found.items() if len(cases) > 1}
    if not models:
        return False
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    names = list(dict.fromkeys(v.name for c in models.values() for k in c for v in k.timed()))
    for axes, (model, cases) in zip(panels, models.items(), strict=True):
        for name in names:
            pairs = sorted(
                (int(case.axes["batch"]), 1e3 * median_of(v) / int(case.axes["batch"]))
                for case in cases
                for v in case.timed()
                if v.name == name
            )
            axes.plot(*_columns(pairs), **_look(names.index(name)), label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_title(model, loc="left")
        axes.set_xlabel("images at once")
        batches = sorted({int(case.axes["batch"]) for case in cases})
        axes.set_xticks(batches, [str(batch) for batch in batches])
        axes.minorticks_off()
        _plain_ticks(axes)
    panels[0].set_ylabel("ms per image")
    panels[0].legend()
    return True


def _memory(figure: Any, run: RunResult, colours: dict[str, str]) -> bool:  # noqa: ARG001
    """Extra memory of the focal loss, in logits, by channels."""
    cases = [case for case in run.cases if case.component == "focal"]
    cases = [case for case in cases if case.axes["dtype"] == cases[0].axes["dtype"]]
    names = dict.fromkeys(v.name for case in cases for v in case.timed() if v.peak_bytes)
    if len({case.axes["channels"] for case in cases}) < 2:
        return False
    axes = figure.subplots()
    for number, name in enumerate(names):
        pairs = sorted(
            (int(case.axes["channels"]), (v.peak_bytes or 0) / int(case.axes["logits_bytes"]))
            for case in cases
            for v in case.timed()
            if v.name == name
        )
        axes.plot(*_columns(pairs), **_look(number), label=name)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("channels of the logits (classes and the fake one)")
    axes.set_ylabel("peak memory / logits")
    axes.set_title("Focal loss and its gradient: memory beyond the logits", loc="left")
    # one-hot is far above all others
    axes.legend(loc="center right", bbox_to_anchor=(1, 0.66))
    return True


def _plain_ticks(axes: Any) -> None:
    """Ticks at 1, 2 and 5 of every power of ten, or at all digits, as plain numbers."""
    low, high = axes.get_ylim()
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for digits in ((1, 2, 5), range(1, 10)):
        ticks = [m * 10.0**p for p in powers for m in digits if low <= m * 10.0**p <= high]
        if len(ticks) > 2:
            break
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])


def _columns(pairs: list[tuple[int, float]]) -> tuple[list[int], list[float]]:
    return [x for x, _ in pairs], [y for _, y in pairs]


def _colour(run: RunResult, component: str) -> str:
    """The same in every picture of a run."""
    components = list(dict.fromkeys(case.component for case in run.cases))
    return _COLOURS[components.index(component) % len(_COLOURS)]


def _look(number: int) -> dict[str, Any]:
    number %= len(_COLOURS)
    return {"color": _COLOURS[number], "marker": _MARKERS[number], "markersize": 5}


def _fastest(case: CaseResult) -> VariantResult | None:
    return min(case.timed(), key=median_of, default=None)


def _seconds(case: CaseResult) -> float:
    fastest = _fastest(case)
    assert fastest is not None
    return max(median_of(fastest), 1e-9)
