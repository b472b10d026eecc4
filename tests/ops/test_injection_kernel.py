"""The injection's kernels in Triton's interpreter and compiler, which need no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from injection_cases import bounds, draw, exact, layouts
from support import assert_equal

triton = pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# of a batch of maps, and the number of tokens
SIZES = (
    (2, 1, 1, 1, 1),
    (2, 16, 7, 5, 3),
    (1, 64, 5, 7, 64),
    (1, 100, 7, 5, 8),
    (2, 64, 3, 49, 8),
)
CASES = [
    (dtype, size, layout) for dtype in DTYPES for size in SIZES for layout in ("contiguous",)
] + [
    (dtype, (2, 3, 7, 5, 3), layout)
    for dtype in DTYPES
    for layout in ("contiguous", "channels-last", "transposed", "gaps")
]
# large logits, where a rounded key would show
CASES += [(dtype, (2, 64, 3, 49, 8), "sharp") for dtype in DTYPES]
IDS = ["-".join([str(d)[6:], "x".join(map(str, size)), layout]) for d, size, layout in CASES]


def inputs(case):
    dtype, size, layout = case
    features, *tokens = draw(size, dtype=dtype)
    grad = draw(size, seed=1, dtype=dtype)[0]
    if layout == "sharp":
        tokens[0] = 8 * tokens[0]
        layout = "contiguous"
    # a gradient has strides of its own
    grad = grad.mT.contiguous().mT if layout == "contiguous" else grad
    return [grad, layouts(features)[layout], *(x.float() for x in tokens)]


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory):
    """What the kernels give for every case."""
    folder = tmp_path_factory.mktemp("injection")
    torch.save([inputs(case) for case in CASES], folder / "cases.pt")
    done = subprocess.run(
        [
            sys.executable,
            Path(__file__).with_name("injection_worker.py"),
            folder / "cases.pt",
            folder / "results.pt",
        ],
        env={**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "1"},
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "results.pt")


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_kernels_equal_the_equation(interpreted, index):
    args = inputs(CASES[index])
    got = [interpreted[index]["out"], *interpreted[index]["gradients"]]
    for name, value, wanted, bound in zip(
        ("out", "features", "tokens"), got, exact(*args), bounds(*args), strict=True
    ):
        error = (value.double() - wanted).abs()
        assert (error <= bound).all(), f"{name}: {(error / bound).max():.2f} of the bound"
    dtype, _, layout = CASES[index]
    assert got[0].dtype == got[1].dtype == dtype
    if layout == "channels-last":
        assert got[0].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_kernels_read_each_map_once_and_write_it_once(interpreted, index):
    # reads and writes of the forward; of the features and the gradient in the backward
    counts = interpreted[index]["counts"]
    if CASES[index][2] == "gaps":
        # entries of other maps lie within the same range of addresses
        counts = counts[1:2] + counts[3:]
    assert set(counts) == {1.0}


def test_few_programs_give_the_same_gradients(interpreted):
    for result in interpreted:
        few, many = result["few programs"], result["gradients"]
        assert_equal(few[0], many[0])
        # the same sum in another order
        torch.testing.assert_close(few[1], many[1], rtol=1e-4, atol=1e-4)


def test_nan_reaches_the_pixels_that_read_it_and_no_others(interpreted):
    out = interpreted[-1]["with nan"]
    bad = out.isnan().any(1)
    assert bad[0, 0, 1]
    assert bad.sum() == 1
    assert interpreted[-1]["with nan token"].isnan().flatten(1).all(1).tolist() == [True, False]


def test_values_of_zero_return_the_features(interpreted):
    for case, result in zip(CASES, interpreted, strict=True):
        assert_equal(result["closed"], inputs(case)[1])


def test_kernels_compile_for_compute_capability_9(tmp_path):
    worker = Path(__file__).with_name("compile_injection_worker.py")
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, str(worker)],
        env=env,
        check=False,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("compiled") == 4
