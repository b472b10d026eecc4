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


# Triton says that a default of its own will change
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION:UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", ["forward", "backward"])
def test_kernels_compile_for_compute_capability_9(name, dtype, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from dpsims.ops.attention import _triton

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    forward = name == "forward"
    kernel = _triton._inject_kernel if forward else _triton._gradients_kernel
    features = torch.empty(1, 64, 64, 64, dtype=dtype, device="meta")
    blocks = (_triton.forward_blocks if forward else _triton.backward_blocks)(features, 8)
    options = {key: blocks.pop(key) for key in ("num_warps", "num_stages")}
    half = dtype == torch.bfloat16
    constants = {**blocks, "FLAT": True, "HALF": half, "EMULATED": False, "fx": 1, "ox": 1}
    pointers = dict.fromkeys(("features", "out", "grad"), "*bf16" if half else "*fp32")
    pointers |= dict.fromkeys(("keys", "biases", "values", "packed"), "*fp32")
    signature = {
        key: "constexpr" if key in constants else pointers.get(key, "i32")
        for key in kernel.arg_names
    }
    constants = {key: value for key, value in constants.items() if key in signature}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
    # what a program may hold on the smallest GPUs that run it
    assert compiled.metadata.shared <= 99 * 1024
    assert "cubin" in compiled.asm
