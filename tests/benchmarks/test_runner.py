"""Cases are checked, then timed, then saved, one after the other."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from benchmark_runs import PLACE, doubling_case, run_result

from benchmarks.cases import UnavailableError, Variant, label_map, plain, random_generator
from benchmarks.measure import ProcessClock
from benchmarks.results import load
from benchmarks.runner import Plan, describe, run_case, run_cases, skip_cases
from dpsims.errors import InputError


def plan_for(tmp_path, lines=None, **options):
    lines = [] if lines is None else lines
    return Plan(tmp_path / "run.json", rounds=3, say=lines.append, **options)


def results_of(case, tmp_path, place=PLACE):
    found = run_case(case, place, ProcessClock(), plan_for(tmp_path))
    return {variant.name: variant for variant in found.variants}


def test_freed_memory_of_the_results_size_holds_nan_before_a_variant_runs(tmp_path, monkeypatch):
    made = []

    def watched(*args, **kwargs):
        made.append(torch.zeros(*args, **kwargs))
        return made[-1]

    def build():
        assert all(bool(tensor.isnan().all()) for tensor in made)
        return plain(lambda inputs: 2 * inputs["x"])

    monkeypatch.setattr("benchmarks.runner.torch.empty", watched)
    assert results_of(doubling_case("case", Variant("next", build)), tmp_path)["next"].error == 0
    assert [tensor.shape for tensor in made] == [(5,), (5,)]


def refusing(error):
    def build():
        raise error

    return build


def test_a_right_variant_is_timed_and_weighed(tmp_path):
    found = results_of(doubling_case(), tmp_path)["plain"]
    assert (found.status, found.reason, len(found.seconds)) == ("ok", "", 3)
    assert found.error == 0.0
    assert found.peak_bytes == 20


def test_a_wrong_variant_is_never_timed(tmp_path):
    calls = []

    def wrong(inputs):
        calls.append(1)
        return (2.001 * inputs["x"],)

    case = doubling_case("case", Variant("wrong", lambda: wrong))
    found = results_of(case, tmp_path)
    assert found["wrong"].status == "wrong"
    assert found["wrong"].seconds == []
    assert "relative error 5.00e-04, allowed 1e-05" in found["wrong"].reason
    # one call to compare, none to time
    assert len(calls) == 1
    assert found["plain"].status == "ok"


@pytest.mark.parametrize("kind", ["nan", "shape"])
def test_what_looks_like_a_result_is_not_one(kind, tmp_path):
    def run(inputs):
        x = inputs["x"]
        return (x * float("nan") if kind == "nan" else 2 * x[:-1],)

    found = results_of(doubling_case("case", Variant("bad", lambda: run)), tmp_path)
    assert found["bad"].status == "wrong"


@pytest.mark.parametrize(
    ("variant", "status", "reason"),
    [
        (Variant("v", refusing(UnavailableError("no such kernel"))), "not available", "no such"),
        (Variant("v", refusing(InputError("impl must")), optional=True), "not available", "impl"),
        (Variant("v", refusing(InputError("impl must"))), "failed", "InputError: impl must"),
        (Variant("v", refusing(RuntimeError("first\nsecond"))), "failed", "RuntimeError: first"),
        (Variant("compile v", lambda: None), "not available", "--no-compile"),
    ],
    ids=["unavailable", "optional-refused", "refused", "failed", "no-compile"],
)
def test_what_cannot_run_says_why(variant, status, reason, tmp_path):
    found = results_of(doubling_case("case", variant), tmp_path)[variant.name]
    assert found.status == status
    assert reason in found.reason
    assert "second" not in found.reason
    assert found.seconds == []


def test_a_failing_reference_fails_the_case_alone(tmp_path):
    case = doubling_case(reference=refusing(torch.OutOfMemoryError("too large")).__call__)
    case = dataclasses.replace(case, reference=lambda inputs: refusing(RuntimeError("large"))())
    found = results_of(case, tmp_path)
    assert found["plain"].status == "failed"
    assert "reference: RuntimeError: large" in found["plain"].reason


def test_a_variant_may_have_a_truth_of_its_own(tmp_path):
    other = Variant("triple", lambda: plain(lambda i: 3 * i["x"]), lambda i: (3 * i["x"],))
    assert results_of(doubling_case("case", other), tmp_path)["triple"].status == "ok"


def test_a_variant_that_overwrites_its_inputs_harms_no_other(tmp_path):
    eater = Variant("eater", lambda: lambda inputs: (inputs["x"].mul_(2),), consumes=True)
    case = doubling_case("case", eater, Variant("late", lambda: plain(lambda i: i["x"] + i["x"])))
    found = results_of(case, tmp_path)
    assert {variant.status for variant in found.values()} == {"ok"}
    # what is written in place needs no memory
    assert found["eater"].peak_bytes == 0


def test_every_case_is_saved_before_the_next_one_starts(tmp_path):
    plan = plan_for(tmp_path)
    seen = []

    def watching(rng):
        seen.append(len(load(plan.path).cases) if plan.path.exists() else 0)
        return {"x": torch.randn(5, generator=rng)}

    cases = [dataclasses.replace(doubling_case(name), inputs=watching) for name in "abc"]
    run = run_cases(cases, PLACE, run_result(processes=[]), plan)
    assert sorted(set(seen)) == [0, 1, 2]
    assert [case.name for case in load(plan.path).cases] == ["a", "b", "c"]
    assert load(plan.path) == run


def test_an_interrupted_run_keeps_what_it_had_and_goes_on(tmp_path):
    plan = plan_for(tmp_path)

    def interrupted(rng):
        raise KeyboardInterrupt

    cases = [doubling_case("a"), dataclasses.replace(doubling_case("b"), inputs=interrupted)]
    with pytest.raises(KeyboardInterrupt):
        run_cases(cases, PLACE, run_result(processes=[]), plan)
    kept = load(plan.path)
    assert [case.name for case in kept.cases] == ["a"]
    before = kept.cases[0]

    lines = []
    again = plan_for(tmp_path, lines)
    run = run_cases([doubling_case("a"), doubling_case("b")], PLACE, kept, again)
    assert "focal/a: already in the file" in lines
    assert [case.name for case in run.cases] == ["a", "b"]
    assert run.cases[0] == before
    # each process has ceilings of its own
    assert [case.process for case in run.cases] == [0, 1]
    assert len(run.processes) == 2


def test_late_cases_come_last_and_no_case_starts_after_the_limit(tmp_path):
    lines = []
    cases = [doubling_case("late", late=True), doubling_case("early")]
    run = run_cases(cases, PLACE, run_result(processes=[]), plan_for(tmp_path, lines))
    assert [case.name for case in run.cases] == ["early", "late"]
    run = run_cases(cases, PLACE, run_result(processes=[]), plan_for(tmp_path, lines, seconds=-1))
    assert run.cases == []
    assert set(run.not_run) == {"focal/early", "focal/late"}
    assert any("not run: no time left" in line for line in lines)


def test_what_waits_for_a_gpu_is_named_line_by_line(tmp_path):
    lines, run = [], run_result()
    skip_cases([doubling_case("a"), doubling_case("b")], run, plan_for(tmp_path, lines))
    assert lines == [f"focal/{name}: not run: needs a CUDA device" for name in "ab"]
    assert set(run.not_run) == {"focal/a", "focal/b"}


def test_a_description_has_a_line_for_every_variant(tmp_path):
    wrong = Variant("wrong", lambda: plain(lambda inputs: inputs["x"]))
    case = doubling_case("case", wrong, bytes=40)
    found = run_case(case, PLACE, ProcessClock(), plan_for(tmp_path))
    header, first, second = describe(found, {"copy": 1e9, "float32": 1e9})
    assert header == "focal/case"
    assert "1.00x [1.00-1.00]" in first
    assert "of the ceiling" in first
    assert "wrong: relative error" in second


def test_label_maps_hold_regions_of_all_classes():
    rng = random_generator(torch.device("cpu"), 0)
    labels = label_map(rng, 5, 2, 40, 64)
    assert labels.shape == (2, 40, 64)
    assert labels.dtype == torch.uint8
    assert set(labels.flatten().tolist()) == set(range(5))
    assert bool((labels[:, :16, :16] == labels[:, :1, :1]).all())
