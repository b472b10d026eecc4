"""The page and its pictures, made from saved runs."""

from __future__ import annotations

import re

import pytest
from benchmark_runs import case_result, passing_run, run_result, variant_result
from PIL import Image

from benchmarks.plots import write_pictures
from benchmarks.report import newest, page, write_report
from benchmarks.results import ROOT, save


def test_a_table_shows_medians_ratios_shares_memory_and_errors():
    case = case_result(
        "focal",
        "ade20k b1",
        variant_result("one-hot", 0.4, 0.4, 0.4, peak_bytes=9 * 2**20, error=2e-6),
        variant_result("dpsims", 0.1, 0.2, 0.1, peak_bytes=2**20, error=1e-7),
        variant_result("fused", status="not available", reason="needs *CUDA*"),
        axes={"channels": 3, "dtype": "fp32", "logits_bytes": 10},
        bytes=10**7,
    )
    text = page(run_result(case), "cpu", [])
    rows = re.findall(r"   \* -(.*(?:\n     -.*)*)", text)
    cells = [[cell.strip() for cell in re.split(r"\n     -", row)] for row in rows]
    assert cells[0] == [
        "case",
        "variant",
        "ms",
        "times faster",
        "of the ceiling",
        "memory MiB",
        "error",
    ]
    assert cells[1] == ["ade20k b1", "one-hot", "400", "1", "2 %", "9", "2e-06"]
    assert cells[2] == ["", "dpsims", "100", "4.00 (2.80 to 4.00)", "10 %", "1", "1e-07"]
    assert cells[3][:4] == ["", "fused", "", r"not available: needs \*CUDA\*"]


def test_the_page_says_what_it_was_measured_on_and_what_not():
    text = page(
        passing_run(),
        "cpu",
        ["benchmarks-cpu-roofline-light.png", "benchmarks-cpu-memory-dark.png"],
    )
    assert "Test CPU, 1 thread, 2026-01-02, commit ``aaaaaaaaaaaa``" in text
    assert "copy 1 GB/s; float32 10 GFLOP/s" in text
    assert "torch 2.11" in text
    assert "triton" not in text
    assert "- generator, 256x256: prepared 2.00x (at least 1.8x): passed" in text
    assert "- focal: 1 cases: needs a CUDA device" in text
    assert "   :class: only-light" in text
    assert "   :class: only-dark" in text


def test_no_run_is_said_to_be_none():
    assert "Not yet measured on a GPU." in page(None, "gpu", [])


def test_the_newest_run_of_a_profile_counts(tmp_path):
    for date, profile in (("2026-01-09", "cpu"), ("2026-01-10", "cpu"), ("2026-02-01", "gpu")):
        save(run_result(date=date), tmp_path / f"{date}-{profile}.json")
    # not a run of this command
    (tmp_path / "presence_scan.json").write_text("{}")
    found = newest(tmp_path, "cpu")
    assert found is not None
    assert found.date == "2026-01-10"


def test_a_report_writes_both_parts_and_pictures_for_both_themes(tmp_path):
    save(passing_run(), tmp_path / "results" / "2026-01-02-cpu.json")
    (tmp_path / "docs").mkdir()
    written = write_report(tmp_path / "results", tmp_path / "docs")
    names = [path.name for path in written]
    assert names[0] == "benchmarks_cpu.inc"
    assert names[-1] == "benchmarks_gpu.inc"
    kinds = ("roofline", "latency", "memory")
    expected = [f"benchmarks-cpu-{k}-{t}.png" for k in kinds for t in ("light", "dark")]
    assert names[1:-1] == expected
    text = written[0].read_text()
    assert all(f"_static/{name}" in text for name in expected)


def test_pictures_are_bright_and_dark(tmp_path):
    for path in write_pictures(passing_run(), tmp_path):
        corner = Image.open(path).convert("L").getpixel((2, 2))
        assert (corner > 200) == path.name.endswith("-light.png")
        # something is drawn
        assert len(Image.open(path).convert("L").getcolors(256)) > 20


def test_a_run_without_numbers_has_no_pictures(tmp_path):
    assert write_pictures(run_result(), tmp_path) == []


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_the_committed_page_is_that_of_the_committed_results(profile):
    run = newest(ROOT / "benchmarks" / "results", profile)
    docs = ROOT / "docs"
    names = sorted(docs.glob(f"_static/benchmarks-{profile}-*.png"))
    text = (docs / f"benchmarks_{profile}.inc").read_text()
    pictures = re.findall(r"_static/(\S+)", text)
    assert text == page(run, profile, pictures)
    assert sorted(pictures) == [path.name for path in names]
