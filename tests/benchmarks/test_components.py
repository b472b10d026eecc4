"""Every component runs, on tiny shapes, and every variant of it is right."""

from __future__ import annotations

import itertools

import pytest
import torch
from benchmark_runs import PLACE

from benchmarks.cases import Place
from benchmarks.cli import main
from benchmarks.components import COMPONENTS, list_cases
from benchmarks.gates import GATES
from benchmarks.measure import ProcessClock
from benchmarks.results import load
from benchmarks.runner import Plan, run_case
from dpsims.errors import InputError

GPU = Place(torch.device("cuda"), "gpu")
CPU = Place(torch.device("cpu"), "cpu")
# what a machine without a GPU, or --no-compile, leaves out
ABSENT = ("fused", "compile", "graph")


@pytest.mark.parametrize("component", COMPONENTS)
def test_a_component_runs_from_the_gate_to_the_numbers(component, tmp_path):
    plan = Plan(tmp_path / "run.json", rounds=2, budget=0.0, say=lambda line: None)
    cases = list_cases([component], PLACE)
    assert cases
    for case in cases:
        found = run_case(case, PLACE, ProcessClock(), plan)
        for variant in found.variants:
            if variant.name.startswith(ABSENT):
                assert variant.status in ("ok", "not available"), variant
                continue
            assert variant.status == "ok", (case.key, variant)
            assert len(variant.seconds) >= 2
            assert variant.peak_bytes is not None
            assert variant.peak_bytes > 0


@pytest.mark.parametrize("place", [PLACE, CPU, GPU], ids=lambda place: place.profile)
def test_cases_are_named_once_and_have_their_baseline(place):
    # building the list touches no device, so a machine without a GPU can say what it leaves out
    cases = list_cases(list(COMPONENTS), place)
    keys = [case.key for case in cases]
    assert len(keys) == len(set(keys))
    for case in cases:
        names = [variant.name for variant in case.variants]
        assert len(names) == len(set(names))
        assert case.baseline in names
        assert case.component == case.key.partition("/")[0]


def test_the_attention_cases_are_the_papers():
    axes = [case.axes for case in list_cases(["attention"], GPU)]
    found = {(a["side"], a["tokens"], a["dtype"], a["pass"]) for a in axes if a["kind"] == "cross"}
    passes = ("forward", "forward+backward")
    wanted = itertools.product((8, 16, 32, 64), (1, 8, 64), ("fp32", "bf16"), passes)
    assert set(wanted) <= found
    names = {v.name for case in list_cases(["attention"], GPU) for v in case.variants}
    assert {"eager", "sdpa", "compile", "fused", "graph fused"} <= names


def test_the_generator_cases_have_batches_1_8_and_64():
    axes = [case.axes for case in list_cases(["generator"], GPU)]
    assert {a["batch"] for a in axes} == {1, 8, 64}


@pytest.mark.parametrize("gate", GATES, ids=lambda gate: gate.name)
def test_every_gate_names_a_case_of_the_cpu_profile(gate):
    cases = [c for c in list_cases([gate.component], CPU) if c.name.startswith(gate.case)]
    assert len(cases) == 1 or cases[0].name == min(c.name for c in cases)
    names = {variant.name for variant in cases[0].variants}
    assert names & set(gate.variants)


def test_gpu_cases_fit_in_their_time():
    # rounds and checks beside the budget take about as long again; compilers have the rest
    assert sum(case.budget for case in list_cases(list(COMPONENTS), GPU)) < 8 * 60


def test_an_unknown_component_is_refused():
    with pytest.raises(InputError, match=r"names must be among focal, .*; got 'fokal'"):
        list_cases(["fokal"], PLACE)


# --- the command


def run_smoke(path, *arguments):
    options = "--profile", "smoke", "--no-compile", "--rounds", "2", "--budget", "0"
    return main([*options, "--components", "focal", "--out", str(path), *arguments])


def test_the_command_measures_resumes_and_compares(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert run_smoke(path) == 0
    assert "focal/tiny" in capsys.readouterr().out
    first = load(path)
    assert [case.component for case in first.cases] == ["focal"]

    assert run_smoke(path) == 2
    assert "must name a new file, or come with --resume; got run.json" in capsys.readouterr().out

    assert run_smoke(path, "--resume") == 0
    assert "focal/tiny 5x8x12 b2 fp32: already in the file" in capsys.readouterr().out
    assert load(path).cases == first.cases

    assert main(["check", str(path), "--compare", str(path)]) == 0
    assert "passed" in capsys.readouterr().out


def test_a_missed_gate_and_a_wrong_variant_fail_the_command(tmp_path, capsys):
    path = tmp_path / "run.json"
    # the tiny shapes hold no case of a gate
    assert run_smoke(path, "--gate") == 1
    assert "focal loss: FAILED" in capsys.readouterr().out

    run = load(path)
    variant = run.cases[0].variants[1]
    variant.status, variant.seconds, variant.reason = "wrong", [], "relative error 1"
    path.write_text("")
    from benchmarks.results import save

    save(run, path)
    assert main(["check", str(path)]) == 1
    assert "wrong: relative error 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--components", "fokal"], "got 'fokal'"),
        (["--peer", "oasis"], "peer: each must be"),
        (["--compare", "none.json"], "must name a JSON file; got none.json"),
    ],
    ids=["component", "peer", "compare"],
)
def test_bad_arguments_are_named(arguments, message, tmp_path, capsys):
    out = ["--profile", "smoke", "--out", str(tmp_path / "run.json")]
    assert main([*out, *arguments]) == 2
    assert message in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_a_gpu_profile_needs_a_gpu(tmp_path, capsys):
    assert main(["--profile", "gpu", "--out", str(tmp_path / "run.json")]) == 2
    assert "--profile gpu must run on a machine with a CUDA device" in capsys.readouterr().out


def test_the_cpu_profile_names_what_waits_for_a_gpu(tmp_path, capsys):
    path = tmp_path / "run.json"
    options = "--profile", "cpu", "--no-compile", "--rounds", "1", "--budget", "0"
    assert main([*options, "--cases", "info_nce/3x128x256 b1 ", "--out", str(path)]) == 0
    shown = capsys.readouterr().out
    assert "info_nce/3x128x256 b1 fp32 forward+backward: not run: needs a CUDA device" in shown
    assert list(load(path).not_run) == ["info_nce/3x128x256 b1 fp32 forward+backward"]
