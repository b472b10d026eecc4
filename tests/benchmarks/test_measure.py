"""Statistics, clocks and rounds of the benchmarks."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, strategies as st

from benchmarks.cases import Variant
from benchmarks.ceilings import floor_seconds, measure_ceilings
from benchmarks.measure import (
    ProcessClock,
    band,
    clock_for,
    interleave,
    paired_ratio,
    relative_error,
)
from benchmarks.memory import use_of
from dpsims.errors import InputError

SEEN = Variant("seen", lambda: None)
TIMES = st.lists(st.floats(1e-4, 1e3), min_size=1, max_size=30)


class CountingClock:
    name = "calls"

    def __init__(self):
        self.calls = []

    def seconds(self, run, inputs):
        self.calls.append((run(inputs), inputs["round"]))
        return float(len(self.calls))


def rounds_of(names, rounds, **options):
    clock = CountingClock()
    runs = {name: lambda inputs, name=name: name for name in names}
    samples = interleave(
        runs, lambda number: {"round": number}, clock, rounds=rounds, budget=1e9, **options
    )
    return samples, clock.calls


# --- statistics


@given(TIMES)
def test_a_band_is_ordered_and_inside_the_samples(samples):
    low, median, high = band(samples)
    # interpolation between equal numbers rounds
    slack = 1e-12 * max(samples)
    edges = [min(samples), low, median, high, max(samples)]
    assert all(a <= b + slack for a, b in pairwise(edges))


@given(TIMES, st.floats(0.01, 100))
def test_a_band_scales_with_its_samples(samples, factor):
    scaled = band([factor * sample for sample in samples])
    assert scaled == pytest.approx([factor * value for value in band(samples)])


def test_the_band_is_the_fifth_of_known_numbers():
    assert band([1.0, 2.0, 3.0, 4.0, 5.0, 6.0]) == pytest.approx((2.0, 3.5, 5.0))


@given(TIMES)
def test_a_variant_is_as_fast_as_itself(samples):
    assert paired_ratio(samples, samples) == (1.0, 1.0, 1.0)


def test_ratios_are_taken_round_by_round():
    # the machine became ten times slower, both variants alike
    slow, fast = [2.0, 20.0, 200.0], [1.0, 10.0, 100.0]
    assert paired_ratio(slow, fast) == (2.0, 2.0, 2.0)


def test_a_time_of_zero_has_a_ratio():
    assert math.isfinite(paired_ratio([0.0, 1.0], [0.0, 0.0]).median)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: band([]), "band: samples must hold at least one number; got none"),
        (lambda: paired_ratio([1.0, 2.0], [1.0]), "as many rounds as the baseline's 2; got 1"),
    ],
    ids=["no-samples", "other-rounds"],
)
def test_statistics_name_what_is_wrong(call, message):
    with pytest.raises(InputError, match=message):
        call()


# --- rounds


def test_every_round_runs_every_variant_once_and_starts_with_another():
    samples, calls = rounds_of("abc", 4)
    assert [name for name, _ in calls] == list("abcbcacababc")
    assert [number for _, number in calls] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
    assert {name: len(times) for name, times in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_budget_ends_the_rounds_but_not_below_the_least():
    clock = CountingClock()
    runs = {"a": lambda inputs: "a"}
    samples = interleave(runs, lambda n: {"round": n}, clock, rounds=50, budget=-1.0, least=3)
    assert len(samples["a"]) == 3


def test_no_variant_means_no_samples():
    samples, calls = rounds_of("", 3)
    assert (samples, calls) == ({}, [])


def test_the_process_clock_counts_work_and_not_sleep():
    def work(inputs):
        return (inputs["x"] @ inputs["x"],)

    clock = clock_for(torch.device("cpu"))
    assert isinstance(clock, ProcessClock)
    assert clock.seconds(work, {"x": torch.ones(600, 600)}) > 1e-4


# --- errors


def test_equal_tensors_have_no_error():
    x = torch.randn(3, 4)
    assert relative_error((x, x), (x.double(), x.double())) == 0.0


def test_one_unwritten_entry_of_many_is_seen():
    x = torch.ones(1000, 1000)
    holed = x.clone()
    holed[7, 7] = 0.0
    assert relative_error((holed,), (x,)) == 1.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_result_that_is_not_finite_never_passes(bad):
    x = torch.ones(4)
    wrong = x.clone()
    wrong[0] = bad
    assert not relative_error((x, wrong, x), (x, x, x)) <= 1e9


def test_another_number_or_shape_of_results_is_infinitely_wrong():
    x = torch.ones(2, 3)
    assert relative_error((x,), (x, x)) == math.inf
    assert relative_error((x.T,), (x,)) == math.inf


def test_a_true_zero_is_compared_absolutely():
    assert relative_error((torch.full((2,), 0.5),), (torch.zeros(2),)) == pytest.approx(0.5**0.5)


# --- memory, operations, ceilings


def test_memory_and_operations_of_a_product_are_exact():
    def run(inputs):
        product = inputs["a"] @ inputs["b"]
        return (product.exp().sum(),)

    inputs = {"a": torch.ones(5, 7), "b": torch.ones(7, 3)}
    use = use_of(SEEN, run, inputs, torch.device("cpu"))
    assert use.flops == 2 * 5 * 7 * 3
    # the product, its exponential and their sum are alive together
    assert use.peak_bytes == 4 * (15 + 15 + 1)


def test_weights_that_a_step_writes_to_are_not_its_memory():
    weight = torch.ones(1000)

    def run(inputs):
        weight.add_(inputs["x"])
        return (weight[:3],)

    use = use_of(SEEN, run, {"x": torch.ones(1000)}, torch.device("cpu"))
    assert use.peak_bytes == 0


def test_what_cannot_be_seen_is_not_guessed():
    hidden = Variant("hidden", lambda: None, opaque=True)
    use = use_of(hidden, lambda inputs: (), {}, torch.device("cpu"))
    assert use == (None, None)


def test_ceilings_are_positive_and_floors_follow_the_slower_of_the_two():
    ceilings = measure_ceilings(torch.device("cpu"), ProcessClock(), smoke=True)
    assert set(ceilings) == {"copy", "float32"}
    assert all(rate > 0 for rate in ceilings.values())
    rates = {"copy": 10.0, "float32": 100.0}
    assert floor_seconds(200, 10, "float32", rates) == 2.0
    assert floor_seconds(200, 50, "float32", rates) == 5.0
    assert floor_seconds(None, 0, "float32", rates) == 0.0
    # a unit that this device does not have counts as float32
    assert floor_seconds(200, 10, "tf32", rates) == 2.0
