"""The backbone table: the script that tries architectures, and the page in step with its file."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.backbone_list import FAMILIES, SHORTLIST, model_names
from benchmarks.backbone_page import marks, with_table
from benchmarks.backbone_trial import are_nominal
from benchmarks.backbones import reason_of, save

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "backbones.rst"
# what every result says, and of what kind; the rest only where a model works
ALWAYS = {"name": str, "family": str, "pretrained_tags": int, "licences": dict}
ALWAYS |= {"works": bool, "reason": str, "options": dict}
WORKING = {"image_size": int, "network_size": list, "minimum_size": int, "padded_to": int}
WORKING |= {"resized_to": list | None, "reductions": list}
WORKING |= {"channels": list, "map_sizes": list, "one_scale": bool, "parameters": int}
WORKING |= {"forward_seconds": float, "both_seconds": float, "peak_bytes": int}
LIMITS = argparse.Namespace(seconds=60)


def assert_report(report):
    """A report that the page can be made from, and that does not contradict itself."""
    assert report["benchmark"] == "backbones"
    assert report["schema"] == 1
    for key in ("torch", "timm", "python", "processor", "date"):
        assert isinstance(report[key], str)
    names = [result["name"] for result in report["results"]]
    assert len(set(names)) == len(names)
    for result in report["results"]:
        wanted = ALWAYS | WORKING if result["works"] else ALWAYS
        assert set(wanted) <= set(result) <= set(ALWAYS | WORKING), result["name"]
        assert all(isinstance(result[key], kind) for key, kind in wanted.items()), result["name"]
        assert sum(result["licences"].values()) == result["pretrained_tags"]
        assert bool(result["reason"]) == (not result["works"])
        if result["works"]:
            levels = len(result["reductions"])
            assert levels == len(result["channels"]) == len(result["map_sizes"])
            assert 0 < result["forward_seconds"] < result["both_seconds"]
            assert result["reductions"] == sorted(result["reductions"])


def run(names, *flags, check=True):
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.backbones", *names, *flags],
        cwd=ROOT,
        capture_output=True,
        check=check,
        text=True,
        timeout=300,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three models, two of them in the first process."""
    folder = tmp_path_factory.mktemp("backbones")
    begin, end = marks(folder / "found.json")
    (folder / "page.rst").write_text(f"Above\n\n{begin}old\n{end}\nBelow\n")
    names = ["test_vit", "test_resnet", "levit_conv_128s"]
    done = run(names, *flags(folder), "--per-process=2")
    assert [line.split("] ")[1].split(":")[0] for line in done.stdout.splitlines()] == names
    return folder


def flags(folder):
    return [f"--json={folder / 'found.json'}", f"--page={folder / 'page.rst'}", "--repeats=1"]


def test_three_models_and_their_page(folder):
    report = json.loads((folder / "found.json").read_text())
    assert_report(report)
    found = {result["name"]: result for result in report["results"]}
    # in the order of families
    assert list(found) == ["levit_conv_128s", "test_resnet", "test_vit"]
    assert found["test_resnet"]["family"] == "resnet"
    assert found["test_resnet"]["map_sizes"] == [[16, 16], [8, 8], [4, 4], [2, 2]]
    assert found["test_resnet"]["parameters"] == 372_688
    assert found["test_vit"]["one_scale"]
    # it takes one size and has three maps
    assert found["levit_conv_128s"]["network_size"] == [224, 224]
    assert found["levit_conv_128s"]["reductions"] == [16, 32, 64]
    page = (folder / "page.rst").read_text()
    assert page.startswith(
        "Above\n\n.. begin: tables from benchmarks/results/found.json\n\n3 archi"
    )
    assert page.endswith("\n\n.. end: tables from benchmarks/results/found.json\n\nBelow\n")
    assert "old" not in page
    assert "   resnet,``test_resnet``,any from 32," in page
    assert ",0.37,4 8 16 32,32 48 192 96,1,apache-2.0 (1)\n" in page
    assert "   levit,``levit_conv_128s``,resized 224x224," in page
    assert with_table(page, folder / "found.json") == page


def test_a_model_that_fails_does_not_stop_the_others(folder):
    names = ["test_resnet", "test_resnet.nope", "test_convnext"]
    run(names, *flags(folder), f"--json={folder / 'failed.json'}")
    report = json.loads((folder / "failed.json").read_text())
    assert_report(report)
    found = {result["name"]: result for result in report["results"]}
    assert [found[name]["works"] for name in names] == [True, False, True]
    reason = found["test_resnet.nope"]["reason"]
    assert reason.startswith("BackboneError: ConditionedBackbone: model must have a tag that timm")
    source = folder / "failed.json"
    page = with_table("".join(marks(source)), source)
    assert "3 architectures of 2 families; 2 work." in page
    assert f'   resnet,``test_resnet.nope``,"``{reason}``"\n' in page


def test_results_of_two_settings_are_not_mixed(folder):
    done = run(["test_resnet"], *flags(folder), "--size=96", check=False)
    assert done.returncode == 1
    assert "the file holds results with image_size 64; remove it" in done.stderr


# the committed file and page


@pytest.mark.parametrize("name", ["backbones.json", "backbones-256.json"])
def test_the_page_is_made_from_the_file(name):
    text = PAGE.read_text(encoding="utf-8")
    assert all(mark in text for mark in marks(RESULTS / name))
    assert with_table(text, RESULTS / name) == text, "run: python -m benchmarks.backbones"


def test_a_page_without_marks_stays():
    assert with_table("text", RESULTS / "backbones.json") == "text"


def test_the_short_list_is_measured_at_the_papers_size():
    report = json.loads((RESULTS / "backbones-256.json").read_text())
    assert_report(report)
    assert report["image_size"] == 256
    assert {result["name"] for result in report["results"]} == set(SHORTLIST.split())
    assert all(result["works"] for result in report["results"])


def test_the_file_holds_every_listed_architecture_of_every_family():
    report = json.loads((RESULTS / "backbones.json").read_text())
    assert_report(report)
    assert {result["name"] for result in report["results"]} == set(model_names())
    assert {result["family"] for result in report["results"]} == set(FAMILIES)
    assert len(model_names()) == len(set(model_names())) >= 60
    working = [result for result in report["results"] if result["works"]]
    assert len({result["family"] for result in working}) >= 25


# parts


@pytest.mark.parametrize(
    ("side", "reductions", "sizes", "one_scale", "wanted"),
    [
        (64, (4, 8, 16, 32), (16, 8, 4, 2), False, True),
        (65, (16, 32), (5, 3), False, True),
        (65, (16,), (6,), False, False),
        # no padding: an Inception
        (80, (4, 8), (16, 7), False, True),
        (80, (4, 8), (15, 7), False, False),
        # 64 pixels are five patches of 14
        (64, (4, 7, 14, 28), (20, 10, 5, 3), True, True),
        (64, (4, 7, 14, 28), (20, 10, 5, 2), True, False),
        (64, (4, 7, 14, 28), (24, 12, 6, 3), True, False),
    ],
)
def test_sizes_that_strides_allow(side, reductions, sizes, one_scale, wanted):
    assert are_nominal(side, reductions, sizes, one_scale=one_scale) == wanted


@pytest.mark.parametrize(
    ("code", "text", "wanted"),
    [
        (-signal.SIGALRM, "", "more than 60 s"),
        (-signal.SIGKILL, "", "the process died of SIGKILL"),
        (-signal.SIGSEGV, "x.Warning: y", "the process died of SIGSEGV"),
        (
            1,
            "a.py:1: W: old\nTraceback:\n  File: x\ndpsims.errors.InputError: size must\n fit",
            "InputError: size must fit",
        ),
        (1, "RuntimeError: " + "long " * 99, "RuntimeError: long long"),
        (1, "nothing known", "nothing known"),
    ],
    ids=["alarm", "killed", "segfault", "error", "long", "unknown"],
)
def test_why_a_process_ended(code, text, wanted):
    reason = reason_of(code, text, LIMITS)
    assert reason.startswith(wanted)
    assert len(reason) <= 300


def test_a_saved_report_is_one_line_a_model(tmp_path):
    report = {"benchmark": "backbones", "results": [{"name": "a"}, {"name": "b"}]}
    save(report, tmp_path / "new" / "report.json")
    text = (tmp_path / "new" / "report.json").read_text()
    assert json.loads(text) == report
    assert '  {"name": "a"},\n  {"name": "b"}\n' in text
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["report.json"]
