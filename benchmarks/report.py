"""The tables of ``docs/benchmarks.rst``, made from the JSON files in ``results``."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

from benchmarks.ceilings import floor_seconds
from benchmarks.components import COMPONENTS
from benchmarks.gates import check_gates, median_of, ratio_of
from benchmarks.plots import write_pictures
from benchmarks.results import CaseResult, RunResult, VariantResult, load

PROFILES = {"cpu": "CPU", "gpu": "GPU"}
_TITLES = {
    "focal": "Focal loss, forward and gradient",
    "spade_tail": "SPADE's tail",
    "attention": "Attention",
    "label_conv": "First convolution of the labels",
    "info_nce": "InfoNCE",
    "generator": "Generator inference",
    "training": "Training",
}
_HEADERS = "variant", "ms", "times faster", "of the ceiling", "memory MiB", "error"
_MARK = ".. Written by ``python -m benchmarks report``; changes here are lost.\n"


def write_report(results: Path, docs: Path) -> list[Path]:
    """Write the included tables and the pictures of the newest run of every profile.

    Args:
        results: Folder of JSON files.
        docs: Folder of the page.

    Returns:
        What was written.
    """
    written = []
    for profile in PROFILES:
        run = newest(results, profile)
        path = docs / f"benchmarks_{profile}.inc"
        pictures = [] if run is None else write_pictures(run, docs / "_static")
        path.write_text(page(run, profile, [p.name for p in pictures]), encoding="utf-8")
        written += [path, *pictures]
    return written


def newest(results: Path, profile: str) -> RunResult | None:
    """The last run of a profile by the name of its file, which starts with the date."""
    paths = sorted(results.glob(f"*-{profile}.json"))
    return load(paths[-1]) if paths else None


def page(run: RunResult | None, profile: str, pictures: list[str]) -> str:
    """The part of the page for one profile, as reStructuredText."""
    if run is None:
        return f"{_MARK}\nNot yet measured on a {PROFILES[profile]}.\n"
    parts = [_MARK, _conditions(run), _gates(run)]
    parts += [_picture(name) for name in pictures]
    for component, title in _TITLES.items():
        cases = [case for case in run.cases if case.component == component]
        if cases:
            parts.append(f"{title}\n{'^' * len(title)}\n\n" + _table(run, cases))
    parts.append(_not_run(run))
    return "\n".join(part for part in parts if part)


def _conditions(run: RunResult) -> str:
    versions = ", ".join(f"{n} {v}" for n, v in run.versions.items() if v != "none")
    state = " with local changes" if run.dirty else ""
    rates = [
        "; ".join(f"{name} {_rate(name, rate)}" for name, rate in process["ceilings"].items())
        for process in run.processes
    ]
    threads = f", {run.threads} thread{'s' * (run.threads != 1)}" if _on_cpu(run) else ""
    clock = f"Times are {run.clock}" + (", other work ran beside." if _on_cpu(run) else ".")
    return (
        f"{run.device['name']}{threads}, {run.date}, commit ``{run.commit[:12]}``{state}; "
        f"{versions}. {clock} Ceilings of each process: {' | '.join(dict.fromkeys(rates))}.\n"
    )


def _on_cpu(run: RunResult) -> bool:
    return bool(run.device["type"] == "cpu")


def _rate(name: str, rate: float) -> str:
    if name == "copy":
        return f"{rate / 1e9:.3g} GB/s"
    return f"{rate / 1e9:.3g} GFLOP/s" if rate < 1e12 else f"{rate / 1e12:.3g} TFLOP/s"


def _gates(run: RunResult) -> str:
    if not _on_cpu(run):
        return ""
    lines = [f"- {verdict.text}" for verdict in check_gates(run, COMPONENTS)]
    return "What ``--gate`` says of this run:\n\n" + "\n".join(lines) + "\n"


# what the pictures of plots.py show, in words
_SHOWN = {
    "roofline": "Share of the measured ceilings that baseline and fastest variant of every case "
    "reach, and the fastest ones under the roofs of copying and multiplying.",
    "latency": "Milliseconds an image of every form of the generators, by the number of images.",
    "memory": "Peak memory of every form of the focal loss, in sizes of the logits, by channels.",
}


def _picture(name: str) -> str:
    # the theme shows one of the two
    kind = "only-dark" if name.endswith("-dark.png") else "only-light"
    alt = _SHOWN[name.split("-")[2]]
    return f".. image:: _static/{name}\n   :class: {kind}\n   :alt: {alt}\n"


def _table(run: RunResult, cases: list[CaseResult]) -> str:
    lines = [".. list-table::", "   :header-rows: 1", ""]
    lines += _row(["case", *_HEADERS])
    for case in cases:
        for number, variant in enumerate(case.variants):
            lines += _row([case.name if number == 0 else "", *_cells(run, case, variant)])
    return "\n".join(lines) + "\n"


def _row(cells: list[str]) -> list[str]:
    marks = itertools.chain(["   * - "], itertools.repeat("     - "))
    return [f"{mark}{cell}".rstrip() for mark, cell in zip(marks, cells, strict=False)]


def _cells(run: RunResult, case: CaseResult, variant: VariantResult) -> list[str]:
    if variant.status != "ok":
        text = variant.status if not variant.reason else f"{variant.status}: {variant.reason}"
        return [variant.name, "", _escaped(text), "", "", ""]
    ratio = ratio_of(case, variant)
    times = "1" if variant.name == case.baseline else f"{ratio.median:.2f} "
    if variant.name != case.baseline:
        times += f"({ratio.low:.2f} to {ratio.high:.2f})"
    if math.isnan(ratio.median):
        times = ""
    floor = floor_seconds(case.flops, case.bytes, case.unit, run.ceilings(case))
    share = f"{100 * floor / median_of(variant):.0f} %" if floor else ""
    memory = "" if variant.peak_bytes is None else f"{variant.peak_bytes / 2**20:.4g}"
    milliseconds = f"{1e3 * median_of(variant):.4g}"
    return [variant.name, milliseconds, times, share, memory, f"{variant.error or 0:.0e}"]


def _escaped(text: str) -> str:
    """Plain text, whose stars and quotes mean nothing."""
    return "".join(f"\\{sign}" if sign in "\\*`|_" else sign for sign in text)


def _not_run(run: RunResult) -> str:
    if not run.not_run:
        return ""
    counts = Counter((key.partition("/")[0], why) for key, why in run.not_run.items())
    lines = [f"- {name}: {count} cases: {why}" for (name, why), count in counts.items()]
    return "Not run\n^^^^^^^\n\n" + "\n".join(lines) + "\n"
