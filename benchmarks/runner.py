"""Run cases one after the other: first whether they are right, then how long they take."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.cases import (
    Case,
    Inputs,
    Outputs,
    Place,
    Run,
    UnavailableError,
    Variant,
    copied,
    random_generator,
)
from benchmarks.ceilings import floor_seconds, measure_ceilings
from benchmarks.measure import (
    Clock,
    WallClock,
    band,
    clock_for,
    interleave,
    paired_ratio,
    relative_error,
)
from benchmarks.memory import use_of
from benchmarks.results import ROOT, CaseResult, RunResult, VariantResult, save
from dpsims.errors import InputError

_WALL_ROUNDS = 10
_NEEDS_CUDA = "needs a CUDA device"


@dataclass(frozen=True)
class Plan:
    """How long to measure, and where to write.

    Attributes:
        path: The JSON file.
        rounds: Most rounds of a case.
        seconds: Wall time after which no further case starts.
        budget: Factor on every case's own budget.
        say: Where progress goes, a line at a time.
    """

    path: Path
    rounds: int = 20
    seconds: float = float("inf")
    budget: float = 1.0
    say: Callable[[str], None] = print


def run_cases(cases: Sequence[Case], place: Place, run: RunResult, plan: Plan) -> RunResult:
    """Measure what ``run`` does not hold yet, and save after every case.

    Cases that wait long for a compiler come last. What could not run is noted with its reason.
    """
    clock = clock_for(place.device)
    started = time.monotonic()
    ceilings = measure_ceilings(place.device, clock, smoke=place.profile == "smoke")
    run.processes.append({"ceilings": ceilings})
    plan.say("ceilings: " + ", ".join(f"{n} {r / 1e9:.1f} G/s" for n, r in ceilings.items()))
    for case in sorted(cases, key=lambda case: case.late):
        if run.case(case.key) is not None:
            plan.say(f"{case.key}: already in the file")
            continue
        if time.monotonic() - started > plan.seconds:
            run.not_run[case.key] = f"no time left: the limit is {plan.seconds:.0f} s"
            plan.say(f"{case.key}: not run: {run.not_run[case.key]}")
            continue
        result = run_case(case, place, clock, plan)
        result.process = len(run.processes) - 1
        run.cases.append(result)
        run.not_run.pop(case.key, None)
        save(run, plan.path)
        for line in describe(result, ceilings):
            plan.say(line)
    save(run, plan.path)
    return run


def skip_cases(cases: Sequence[Case], run: RunResult, plan: Plan) -> None:
    """Say of every case that it waits for a GPU."""
    for case in cases:
        run.not_run[case.key] = _NEEDS_CUDA
        plan.say(f"{case.key}: not run: {_NEEDS_CUDA}")


def run_case(case: Case, place: Place, clock: Clock, plan: Plan) -> CaseResult:
    """Check every variant, then measure the right ones."""
    torch.compiler.reset()

    def draw(seed: int) -> Inputs:
        return case.inputs(random_generator(place.device, seed))

    inputs = draw(0)
    variants, runs = _checked(case, inputs, place)
    for variant, result in zip(case.variants, variants, strict=True):
        if result.name in runs:
            use = use_of(variant, runs[result.name], inputs, place.device)
            result.peak_bytes, result.flops = use
    del inputs
    budget = case.budget * plan.budget
    own = {variant.name for variant in case.variants if variant.consumes}
    samples = interleave(runs, draw, clock, rounds=plan.rounds, budget=budget, consuming=own)
    walls: dict[str, list[float]] = {}
    if case.wall and place.device.type == "cuda":
        walls = interleave(
            runs, draw, WallClock(), rounds=_WALL_ROUNDS, budget=budget, consuming=own
        )
    for result in variants:
        result.seconds = samples.get(result.name, [])
        result.wall_seconds = walls.get(result.name, [])
    # a form that looks up what others multiply shows that nothing has to be multiplied
    counted = [result.flops for result in variants if result.flops is not None]
    return CaseResult(
        component=case.component,
        name=case.name,
        axes=case.axes,
        baseline=case.baseline,
        tolerance=case.tolerance,
        unit=case.unit,
        flops=min(counted, default=0),
        bytes=case.bytes,
        process=0,
        variants=variants,
    )


def _checked(
    case: Case, inputs: Inputs, place: Place
) -> tuple[list[VariantResult], dict[str, Run]]:
    """Every variant's verdict, and the functions of the right ones."""
    results: list[VariantResult] = []
    runs: dict[str, Run] = {}
    try:
        expected = case.reference(inputs)
    except failures() as error:
        text = f"reference: {_in_short(error)}"
        return [VariantResult(v.name, "failed", text) for v in case.variants], {}
    for variant in case.variants:
        result, run = _check(variant, inputs, expected, case.tolerance, place)
        results.append(result)
        if run is not None:
            runs[variant.name] = run
    return results, runs


def _check(
    variant: Variant, inputs: Inputs, expected: Outputs, tolerance: float, place: Place
) -> tuple[VariantResult, Run | None]:
    """Build a variant and compare it; only a right one comes back with its function."""
    if variant.name.startswith("compile") and not place.compiled:
        return VariantResult(variant.name, "not available", "--no-compile"), None
    try:
        if variant.reference is not None:
            expected = variant.reference(inputs)
        run = variant.build()
        _poison(expected, place.device)
        error = relative_error(run(copied(inputs) if variant.consumes else inputs), expected)
    except UnavailableError as reason:
        return VariantResult(variant.name, "not available", str(reason)), None
    except failures() as reason:
        if variant.optional and isinstance(reason, InputError):
            return VariantResult(variant.name, "not available", str(reason)), None
        return VariantResult(variant.name, "failed", _in_short(reason)), None
    if not error <= tolerance:
        text = f"relative error {error:.2e}, allowed {tolerance:.0e}"
        # JSON has no infinity
        return VariantResult(variant.name, "wrong", text), None
    return VariantResult(variant.name, "ok", error=error), run


def _in_short(error: Exception) -> str:
    """The first line of a message, without the paths that it may hold."""
    line = next(iter(str(error).splitlines()), "")
    return f"{type(error).__name__}: {line.replace(str(ROOT), '')}"[:300]


def failures() -> tuple[type[Exception], ...]:
    """What a compiler or a kernel raises; one broken variant must not end the run."""
    found: tuple[type[Exception], ...] = (RuntimeError, ValueError, TypeError, AttributeError)
    if importlib.util.find_spec("triton") is None:
        return found
    from triton.errors import TritonError

    return (*found, TritonError)


def _poison(expected: Outputs, device: torch.device) -> None:
    """Leave NaN in the memory that the next results will likely get."""
    for tensor in expected:
        torch.empty(tensor.shape, device=device).fill_(float("nan"))


def describe(result: CaseResult, ceilings: dict[str, float]) -> list[str]:
    """The case as lines of text."""
    floor = floor_seconds(result.flops, result.bytes, result.unit, ceilings)
    baseline = result.variant(result.baseline)
    lines = [result.key]
    for variant in result.variants:
        if variant.status != "ok":
            lines.append(f"  {variant.name:<16} {variant.status}: {variant.reason}")
            continue
        median = band(variant.seconds).median
        text = f"  {variant.name:<16} {1e3 * median:10.3f} ms"
        if baseline is not None and baseline.status == "ok":
            ratio = paired_ratio(baseline.seconds, variant.seconds)
            text += f"  {ratio.median:6.2f}x [{ratio.low:.2f}-{ratio.high:.2f}]"
        if floor and median:
            text += f"  {100 * floor / median:5.1f} % of the ceiling"
        if variant.peak_bytes is not None:
            text += f"  {variant.peak_bytes / 2**20:8.1f} MiB"
        lines.append(text)
    return lines
