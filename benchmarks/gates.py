"""Pass or fail: the ratios that need no GPU, and a run against an older one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.measure import Band, band, paired_ratio
from benchmarks.results import CaseResult, RunResult, VariantResult

# a variant is slower when its ratio has fallen by more than this and the bands lie apart
_FALL = 0.05


@dataclass(frozen=True)
class Gate:
    """A ratio that must be reached.

    Attributes:
        name: In words.
        component: Whose case.
        case: How the case's name starts.
        variants: Which variants may reach it; the best one counts.
        least: The median of the paired ratios must be at least this.
        memory: Most memory of that variant, in bytes of logits.
    """

    name: str
    component: str
    case: str
    variants: tuple[str, ...]
    least: float
    memory: float | None = None


_PREPARED = ("dpsims", "prepared", "prepared nhwc")
# each lies 10 to 30 % below what was measured where the goals were set: 2.0, 4.2, 14.9 and 1.56
GATES = (
    Gate("generator, 256x256", "generator", "OASIS 256x256 b1", _PREPARED, 1.8),
    Gate("generator, tiny", "generator", "OASIS 64x64 tiny b1", _PREPARED, 3.0),
    Gate(
        "focal loss",
        "focal",
        "ade20k",
        ("dpsims", "compile dpsims", "in place", "fused"),
        10.0,
        memory=1.1,
    ),
    Gate("G's phase through D", "training", "G through D", ("frozen D",), 1.4),
)


@dataclass(frozen=True)
class Verdict:
    """What a gate says, in one line."""

    passed: bool
    text: str


def check_gates(run: RunResult, components: Iterable[str]) -> list[Verdict]:
    """The gates of the components that were asked for; one that meets no case fails."""
    wanted = set(components)
    return [_judge(gate, run) for gate in GATES if gate.component in wanted]


def _judge(gate: Gate, run: RunResult) -> Verdict:
    cases = [c for c in run.cases if c.component == gate.component]
    case = next((c for c in cases if c.name.startswith(gate.case)), None)
    timed = [] if case is None else [v for v in case.timed() if v.name in gate.variants]
    baseline = None if case is None else case.variant(case.baseline)
    if case is None or not timed or not _timed(baseline):
        return Verdict(False, f"{gate.name}: FAILED: no measured variant among {gate.variants}")
    found = []
    for variant in timed:
        ratio = ratio_of(case, variant)
        share = _share(case, variant)
        light = gate.memory is None or (share is not None and share <= gate.memory)
        text = f"{gate.name}: {variant.name} {ratio.median:.2f}x (at least {gate.least:g}x)"
        if gate.memory is not None:
            known = "unknown" if share is None else f"{share:.2f}"
            text += f", memory {known} x logits (at most {gate.memory:g})"
        found.append((light and ratio.median >= gate.least, ratio.median, text))
    passed, _, text = max(found)
    return Verdict(passed, text + (": passed" if passed else ": FAILED"))


def compare(new: RunResult, old: RunResult) -> list[Verdict]:
    """Every ratio of an older run of the same kind of device against the new one's.

    A ratio fails when it has fallen by more than 5 % and its band (20th to 80th percentile) lies
    below the old one. A variant that is gone or no longer right fails too.
    """
    if new.device["name"] != old.device["name"]:
        text = f"compare: FAILED: another device: {new.device['name']}, {old.device['name']}"
        return [Verdict(False, text)]
    measured = {case.component for case in new.cases}
    verdicts = []
    for case in old.cases:
        if case.component not in measured:
            continue
        for before in case.variants:
            if not _timed(before) or before.name == case.baseline:
                continue
            verdicts.append(_against(case, before, new.case(case.key)))
    return verdicts


def _against(old: CaseResult, before: VariantResult, new: CaseResult | None) -> Verdict:
    name = f"{old.key}: {before.name}"
    after = None if new is None else new.variant(before.name)
    if new is None or after is None or not _timed(after) or not _timed(new.variant(new.baseline)):
        return Verdict(False, f"{name}: FAILED: it is not measured any more")
    was, now = ratio_of(old, before), ratio_of(new, after)
    slower = now.median < (1 - _FALL) * was.median and now.high < was.low
    text = f"{name}: {was.median:.2f}x -> {now.median:.2f}x"
    return Verdict(not slower, text + (": FAILED" if slower else ": passed"))


def ratio_of(case: CaseResult, variant: VariantResult) -> Band:
    """How many times faster than the case's baseline."""
    baseline = case.variant(case.baseline)
    if not _timed(baseline):
        return Band(float("nan"), float("nan"), float("nan"))
    assert baseline is not None
    return paired_ratio(baseline.seconds, variant.seconds)


def median_of(variant: VariantResult) -> float:
    """Median seconds."""
    return band(variant.seconds).median


def _timed(variant: VariantResult | None) -> bool:
    return variant is not None and variant.status == "ok"


def _share(case: CaseResult, variant: VariantResult) -> float | None:
    logits = case.axes.get("logits_bytes")
    if variant.peak_bytes is None or not isinstance(logits, int):
        return None
    return variant.peak_bytes / logits
