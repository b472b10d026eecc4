"""Runs as JSON."""

from __future__ import annotations

import getpass
import json
import platform

import pytest
import torch
from benchmark_runs import case_result, passing_run, run_result, variant_result

from benchmarks.results import ROOT, check_resumable, load, new_run, save
from dpsims.errors import InputError

RESULTS = sorted((ROOT / "benchmarks" / "results").glob("20*.json"))


def test_a_run_comes_back_as_it_was(tmp_path):
    run = passing_run()
    save(run, tmp_path / "deep" / "run.json")
    assert load(tmp_path / "deep" / "run.json") == run
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["run.json"]


def test_the_file_holds_raw_samples_and_what_they_were_measured_on(tmp_path):
    save(passing_run(), tmp_path / "run.json")
    values = json.loads((tmp_path / "run.json").read_text())
    assert values["schema"] == 1
    assert {"commit", "dirty", "versions", "device", "threads", "date", "clock"} <= set(values)
    assert values["processes"][0]["ceilings"]["copy"] == 1e9
    assert values["cases"][0]["variants"][0]["seconds"] == [9.0, 9.0]


def test_a_new_run_names_the_code_and_the_device_and_not_the_machine():
    run = new_run("cpu", torch.device("cpu"), "process CPU time")
    assert len(run.commit) == 40
    assert run.versions["torch"] == torch.__version__
    assert run.device["name"]
    text = json.dumps([run.device, run.versions])
    assert platform.node() not in text
    assert str(ROOT) not in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_runs_are_whole_and_private(path):
    run = load(path)
    text = path.read_text()
    assert run.cases
    assert not run.dirty
    assert platform.node() not in text
    assert getpass.getuser() not in text or getpass.getuser() == "root"
    assert not any(part in text for part in ("/home", "/tmp", "/root", "/work"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "must name a JSON file"),
        ("[]", "must name a run of schema 1; got run.json with None"),
        ('{"schema": 2}', "must name a run of schema 1; got run.json with 2"),
        ('{"schema": 1}', "all keys of schema 1; got run.json: 'cases'"),
        ('{"schema": 1, "cases": [], "colour": 3}', "colour"),
    ],
    ids=["no-json", "no-object", "other-schema", "missing-key", "unknown-key"],
)
def test_a_file_of_another_form_is_refused(text, message, tmp_path):
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "run.json")


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"must name a JSON file; got none\.json"):
        load(tmp_path / "none.json")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"status": "fine"}, "samples exactly when its status"),
        ({"seconds": []}, "samples exactly when its status"),
        ({"status": "wrong"}, "samples exactly when its status"),
    ],
    ids=["unknown-status", "ok-without-samples", "wrong-with-samples"],
)
def test_samples_and_status_must_agree(changes, message, tmp_path):
    run = passing_run()
    for name, value in changes.items():
        setattr(run.cases[0].variants[0], name, value)
    save(run, tmp_path / "run.json")
    with pytest.raises(InputError, match=message):
        load(tmp_path / "run.json")


def test_a_case_of_no_process_is_refused(tmp_path):
    case = case_result("focal", "a", variant_result("one-hot", 1.0))
    case.process = 1
    save(run_result(case), tmp_path / "run.json")
    with pytest.raises(InputError, match="process of focal/a must be known; got 1"):
        load(tmp_path / "run.json")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("commit", "b" * 40),
        ("dirty", True),
        ("device", {"type": "cpu", "name": "Other"}),
        ("threads", 2),
        ("versions", {"torch": "3"}),
        ("profile", "gpu"),
    ],
)
def test_only_the_same_code_on_the_same_device_goes_on(name, value):
    check_resumable(run_result(), run_result())
    with pytest.raises(InputError, match=f"resume: {name} must be that of the file"):
        check_resumable(run_result(), run_result(**{name: value}))
