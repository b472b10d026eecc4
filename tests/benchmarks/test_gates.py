"""When a run passes and when it does not."""

from __future__ import annotations

import copy

import pytest
from benchmark_runs import case_result, passing_run, run_result, variant_result

from benchmarks.components import COMPONENTS
from benchmarks.gates import GATES, check_gates, compare


def scaled(run, factor):
    """The same run, whose variants other than the baselines take ``factor`` times as long."""
    run = copy.deepcopy(run)
    for case in run.cases:
        for variant in case.variants:
            if variant.name != case.baseline:
                variant.seconds = [factor * second for second in variant.seconds]
    return run


def failed(verdicts):
    return [verdict.text for verdict in verdicts if not verdict.passed]


def test_every_gate_passes_where_every_ratio_is_reached():
    verdicts = check_gates(passing_run(), COMPONENTS)
    assert len(verdicts) == len(GATES)
    assert failed(verdicts) == []


@pytest.mark.parametrize("number", range(len(GATES)), ids=lambda n: GATES[n].name)
def test_a_gate_fails_below_its_ratio(number):
    verdicts = check_gates(scaled(passing_run(), 1.6), COMPONENTS)
    assert not verdicts[number].passed
    assert "FAILED" in verdicts[number].text
    assert GATES[number].name in verdicts[number].text


def test_a_gate_takes_the_best_variant_that_is_light_enough():
    run = run_result(
        case_result(
            "focal",
            "ade20k b1",
            variant_result("one-hot", 1.0),
            variant_result("dpsims", 0.5, peak_bytes=105),
            variant_result("compile dpsims", 0.05),
            variant_result("fused", 0.08, peak_bytes=100),
            axes={"logits_bytes": 100},
        )
    )
    (verdict,) = check_gates(run, ["focal"])
    assert verdict.passed
    assert verdict.text.startswith("focal loss: fused 12.50x (at least 10x), memory 1.00 x logits")


@pytest.mark.parametrize("peak", [111, None], ids=["heavy", "unknown"])
def test_speed_alone_does_not_pass_where_memory_counts(peak):
    case = case_result(
        "focal",
        "ade20k b1",
        variant_result("one-hot", 1.0),
        variant_result("dpsims", 0.01, peak_bytes=peak),
        axes={"logits_bytes": 100},
    )
    (verdict,) = check_gates(run_result(case), ["focal"])
    assert not verdict.passed


@pytest.mark.parametrize("kind", ["no-case", "no-variant", "no-baseline"])
def test_a_gate_that_meets_nothing_measured_fails(kind):
    slow = variant_result("one-hot", 1.0) if kind != "no-baseline" else variant_result("one-hot")
    fast = variant_result("dpsims", 0.01) if kind != "no-variant" else variant_result("dpsims")
    name = "cityscapes" if kind == "no-case" else "ade20k"
    (verdict,) = check_gates(run_result(case_result("focal", name, slow, fast)), ["focal"])
    assert not verdict.passed
    assert "no measured variant" in verdict.text


def test_only_gates_of_the_components_that_ran_are_asked():
    assert [v.text.partition(":")[0] for v in check_gates(passing_run(), ["training"])] == [
        "G's phase through D"
    ]
    assert check_gates(passing_run(), ["info_nce"]) == []


# --- against an older run


def one_case(*seconds):
    return run_result(
        case_result(
            "focal",
            "a",
            variant_result("one-hot", *[1.0] * len(seconds)),
            variant_result("dpsims", *seconds),
        )
    )


def test_a_run_is_no_slower_than_itself():
    verdicts = compare(passing_run(), passing_run())
    assert verdicts
    assert failed(verdicts) == []


def test_a_fall_beyond_the_bands_fails_and_says_both_ratios():
    (text,) = failed(compare(one_case(0.2, 0.2, 0.2), one_case(0.1, 0.1, 0.1)))
    assert text == "focal/a: dpsims: 10.00x -> 5.00x: FAILED"


@pytest.mark.parametrize(
    "seconds",
    [
        # 4 % slower, however sure
        (0.104, 0.104, 0.104, 0.104),
        # 50 % slower in the median, with a band that reaches the old one
        (0.09, 0.15, 0.15, 0.09),
    ],
    ids=["small-fall", "bands-overlap"],
)
def test_a_small_or_doubtful_fall_passes(seconds):
    assert failed(compare(one_case(*seconds), one_case(0.1, 0.1, 0.1, 0.1))) == []


def test_a_variant_that_is_gone_or_wrong_fails():
    gone = run_result(case_result("focal", "a", variant_result("one-hot", 1.0)))
    (text,) = failed(compare(gone, one_case(0.1)))
    assert text == "focal/a: dpsims: FAILED: it is not measured any more"


def test_components_that_did_not_run_are_not_compared():
    only_focal = one_case(0.1)
    old = one_case(0.1)
    old.cases += passing_run().cases[:1]
    assert len(compare(only_focal, old)) == 1


def test_another_device_is_not_compared():
    other = run_result(device={"type": "cpu", "name": "Other"})
    (verdict,) = compare(run_result(), other)
    assert not verdict.passed
    assert "another device" in verdict.text
