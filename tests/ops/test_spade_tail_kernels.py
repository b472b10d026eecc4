"""The kernels of the SPADE tail, on a GPU or in Triton's interpreter, beside their contract."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from spade_tail_parts import (
    DEVICE,
    EPS,
    LAYOUTS,
    SIZES,
    assert_near,
    laid_out,
    make_case,
    oracle,
    statistics_arguments,
)

from dpsims.ops.spade_tail import _layout, _library, _tiling

pytest.importorskip("triton")
from dpsims.ops.spade_tail import _triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# the operators' own CPU form is held to the same answers
PIECES = [pytest.param(_triton, id="triton"), pytest.param(_library, id="library")]


def run_all(pieces, case, mode, slope, upsample, layout="contiguous"):
    """Moments, output and gradients by one implementation, and the float64 answer."""
    answer = oracle(case, mode=mode, slope=slope, upsample=upsample)
    x, m, g = (laid_out(v.to(DEVICE), layout, i) for i, v in enumerate(case))
    mean, var = statistics_arguments(answer, mode, x.dtype)
    found = pieces.moments(x)
    out, signs = pieces.apply(x, m, mean, var, EPS, slope, upsample, slope != 1)
    shares = None
    if mode == "batch":
        sums = pieces.sums(g, x, m, signs, mean, var, EPS, slope, upsample)
        shares = sums / (x.numel() // x.shape[1])
    grads = pieces.gradients(g, x, m, signs, mean, var, shares, EPS, slope, upsample)
    return (*found, out, *grads), signs, answer


def assert_all(results, case, answer, mode):
    """Roundings are counted at the sizes of what is added up, not of what is left."""
    mean, var, out, to_features, to_modulation = results
    x, _, g = case
    rstd = 1.0 if mode == "none" else (answer.var + EPS).rsqrt().max().item()
    # x - mean loses digits of mean, magnified by a small deviation
    lost = 1 + (x.double().abs().max().item() * rstd if mode != "none" else 0)
    size = (1 + 4) * g.double().abs().max().item()
    assert_near(mean, answer.mean, roundings=8, scale=x.double().abs().max().item())
    assert_near(var, answer.var, roundings=32, scale=x.double().square().max().item() / 8)
    assert_near(out, answer.out, roundings=8 * lost, scale=5)
    assert_near(to_modulation, answer.to_modulation, roundings=8 * lost, scale=size)
    factor = answer.out.shape[2] // x.shape[2]
    assert_near(
        to_features,
        answer.to_features,
        roundings=16 * lost * factor**2,
        scale=size * max(1.0, rstd),
    )


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize(
    ("mode", "slope"), [("batch", 0.2), ("batch", 1.0), ("fixed", 0.0), ("none", 0.2)]
)
def test_oracle(pieces, size, mode, slope):
    case = make_case(size)
    results, signs, answer = run_all(pieces, case, mode, slope, 1)
    assert_all(results, case, answer, mode)
    assert bool(signs.numel()) == (slope != 1)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts_and_dtypes(pieces, layout, dtype):
    case = make_case((2, 13, 7, 5), dtype=dtype)
    results, _, answer = run_all(pieces, case, "batch", 0.2, 1, layout)
    assert_all(results, case, answer, "batch")
    assert [value.dtype for value in results[2:]] == [dtype] * 3
    assert results[0].dtype == torch.float32


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize(
    ("layout", "upsample", "mode"),
    [(layout, 2, "batch") for layout in LAYOUTS]
    + [("contiguous", 3, "none"), ("channels_last", 3, "batch"), ("contiguous", 4, "batch")],
)
def test_upsampled_features(pieces, layout, upsample, mode):
    case = make_case((2, 9, 3, 5), upsample=upsample)
    results, _, answer = run_all(pieces, case, mode, 0.2, upsample, layout)
    assert_all(results, case, answer, mode)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("upsample", [1, 2])
def test_both_forms_fill_one_contract(layout, upsample):
    case = make_case((2, 13, 4, 5), upsample=upsample)
    ours, signs, _ = run_all(_triton, case, "batch", 0.2, upsample, layout)
    theirs, expected, _ = run_all(_library, case, "batch", 0.2, upsample, layout)
    assert torch.equal(signs, expected)
    for one, other in zip(ours, theirs, strict=True):
        assert one.stride() == other.stride()


def test_signs_survive_packing():
    for layout in ("contiguous", "channels_last"):
        x = laid_out(make_case((2, 11, 3, 5)).features, layout)
        for upsample in (1, 2, 3, 4):
            positive = torch.rand(2, 11, 3 * upsample, 5 * upsample) > 0.5
            signs = _layout.pack_signs(positive, x, upsample)
            assert signs.shape == _layout.empty_signs(x, upsample).shape
            assert torch.equal(_layout.unpack_signs(signs, x, upsample), positive)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "upsample"), list(zip(DTYPES, (1, 2, 3), strict=True)), ids=str)
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_folded_modulation(pieces, layout, dtype, upsample, slope):
    case = make_case((2, 13, 4, 5), upsample=upsample, dtype=dtype)
    features, modulation = (laid_out(v.to(DEVICE), layout, i) for i, v in enumerate(case[:2]))
    fine = case.features.double().repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    scale, shift = case.modulation.double().chunk(2, 1)
    # both halves, and a view of the first one alone
    for given, expected in (
        (modulation, fine * scale + shift),
        (modulation[:, :13], fine * scale),
    ):
        found = pieces.modulate(features, given, slope, upsample)
        assert found.dtype == dtype
        size = (fine * scale).abs().max().item() + 4
        expected = torch.where(expected > 0, expected, slope * expected)
        assert_near(found, expected, roundings=4, scale=size)
        empty = _layout.empty_result(features, upsample)
        assert found.stride() == empty.stride()
    assert pieces.modulate(features[:0], modulation[:0], slope, upsample).shape[0] == 0


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_nan_and_infinity_reach_the_output():
    case = make_case((2, 4, 3, 5))
    case.features[0, 1, 2, 3] = torch.nan
    case.features[1, 2, 0, 0] = torch.inf
    case.modulation[0, 0, 1, 1] = torch.nan
    (mean, var, out, dx, dm), *_ = run_all(_triton, case, "batch", 0.2, 1)
    assert mean.isfinite().tolist() == [True, False, False, True]
    assert var.isfinite().tolist() == [True, False, False, True]
    assert bool(out[:, 1:3].isnan().all())
    assert out[:, 0].isnan().sum() == 1
    assert bool(dx[:, :3].isnan().all())
    assert bool(torch.cat((out[:, 3], dx[:, 3], dm[:, 3])).isfinite().all())


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_moments_do_not_cancel(layout):
    # many tiles per program, a mean 10,000 deviations away, and a first tile unlike the others
    x = torch.randn(3, 2, 40, 64) + 1e4
    x[0, :, :16] += 100
    mean, var = _triton.moments(laid_out(x.to(DEVICE), layout))
    wide = x.double()
    # a rounding of the input's size is 1e-3 in the mean; the shift is exact, the sums are not
    torch.testing.assert_close(mean.cpu().double(), wide.mean((0, 2, 3)), rtol=2e-7, atol=0)
    expected = wide.var((0, 2, 3), correction=0)
    torch.testing.assert_close(var.cpu().double(), expected, rtol=2e-5, atol=0)


def test_moments_of_several_programs_and_tiles(monkeypatch):
    x = torch.randn(3, 2, 9, 9) * 2 + 7
    expected = torch.var_mean(x.double(), (0, 2, 3), correction=0)
    for programs, most in ((1, 2), (3, 64), (1024, 1)):
        monkeypatch.setattr(_tiling, "_PROGRAMS", programs)
        monkeypatch.setattr(_tiling, "_MAX_TILES", most)
        monkeypatch.setattr(_tiling, "_TILE", 64)
        mean, var = _triton.moments(x.to(DEVICE))
        torch.testing.assert_close(mean.cpu().double(), expected[1], rtol=1e-6, atol=0)
        torch.testing.assert_close(var.cpu().double(), expected[0], rtol=1e-5, atol=0)
        case = make_case((3, 2, 9, 9))
        results, _, answer = run_all(_triton, case, "batch", 0.2, 1)
        assert_all(results, case, answer, "batch")


def test_wide_indices_give_the_same(monkeypatch):
    case = make_case((2, 5, 3, 7))
    expected, *_ = run_all(_triton, case, "batch", 0.2, 1)
    monkeypatch.setattr(_tiling, "_INT32", 1)
    assert _tiling.tile_sizes(case.features, 1, case.features)["WIDE"]
    for one, other in zip(run_all(_triton, case, "batch", 0.2, 1)[0], expected, strict=True):
        assert torch.equal(one, other)


def test_large_images_get_wide_indices():
    x = torch.empty(1, 64, 8192, 8192, device="meta", dtype=torch.bfloat16)
    assert _tiling.tile_sizes(x, 1, x)["WIDE"]
    assert not _tiling.tile_sizes(x[..., :4096, :4096], 1, torch.empty(8, 8, 9, 9))["WIDE"]


def test_two_runs_are_bit_equal():
    case = make_case((4, 7, 9, 11), dtype=torch.bfloat16)
    first, second = (run_all(_triton, case, "batch", 0.2, 1)[0] for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_empty_batches():
    x, m = torch.empty(0, 3, 4, 4, device=DEVICE), torch.empty(0, 6, 4, 4, device=DEVICE)
    mean, var = torch.zeros(2, 3, device=DEVICE)
    out, signs = _triton.apply(x, m, mean, var, EPS, 0.2, 1, True)
    assert out.shape == (0, 3, 4, 4)
    sums = _triton.sums(x, x, m, signs, mean, var, EPS, 0.2, 1)
    assert torch.equal(sums.cpu(), torch.zeros(2, 3))
    grads = _triton.gradients(x, x, m, signs, mean, var, sums, EPS, 0.2, 1)
    assert [grad.shape[0] for grad in grads] == [0, 0]


# passes over the data


@pytest.fixture
def traffic(monkeypatch):
    """Addresses that kernels read and write, each counted as often as it is asked for."""
    if DEVICE != "cpu":
        pytest.skip("the interpreter shows addresses, a GPU does not")
    from triton.runtime.interpreter import InterpreterBuilder

    seen = {"read": Counter(), "written": Counter()}

    def note(kind, pointers, mask):
        size = pointers.get_element_ty().primitive_bitwidth // 8
        where = np.broadcast_to(mask.data, pointers.data.shape)
        for address in pointers.data[where].ravel().tolist():
            seen[kind][int(address), size] += 1

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def noted_load(self, ptrs, mask, *rest):
        note("read", ptrs, mask)
        return load(self, ptrs, mask, *rest)

    def noted_store(self, ptrs, value, mask, *rest):
        note("written", ptrs, mask)
        return store(self, ptrs, value, mask, *rest)

    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", noted_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", noted_store)
    return seen


def moved(traffic, maps):
    """Bytes moved to and from the given maps, and how often their busiest byte moved."""
    total, most = 0, 0
    for kind in traffic.values():
        for value in maps:
            first = value.data_ptr()
            last = first + value.untyped_storage().nbytes()
            times = [(n, size) for (at, size), n in kind.items() if first <= at < last]
            total += sum(size for _, size in times)
            most = max([most, *(n for n, _ in times)])
    for kind in traffic.values():
        kind.clear()
    return total, most


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("upsample", "slope", "dtype"),
    [(1, 0.2, torch.bfloat16), (1, 1.0, torch.float32), (2, 0.2, torch.float32)],
)
def test_every_map_moves_once(traffic, layout, upsample, slope, dtype):
    """5 passes in training, 4 in evaluation and 9 backward; bits of the signs come on top."""
    case = make_case((2, 16, 8, 8), upsample=upsample, dtype=dtype)
    x, m, g = (laid_out(value, layout) for value in case)
    scalars = (EPS, slope, upsample)
    one, whole = x.numel() * x.element_size(), g.numel() * g.element_size()
    bits = g.numel() // 8 if slope != 1 else 0

    mean, var = _triton.moments(x)
    assert moved(traffic, [x]) == (one, 1)
    out, signs = _triton.apply(x, m, mean, var, *scalars, slope != 1)
    assert signs.numel() == bits
    assert moved(traffic, [x, m, out, signs]) == (one + 3 * whole + bits, 1)
    plain, nothing = _triton.apply(x, m, mean, var, *scalars, False)
    assert nothing.numel() == 0
    assert torch.equal(plain, out)
    assert moved(traffic, [x, m, plain]) == (one + 3 * whole, 1)

    sums = _triton.sums(g, x, m, signs, mean, var, *scalars)
    reduced = moved(traffic, [g, x, m, signs])
    assert reduced == (one + 2 * whole + bits, 1)
    dx, dm = _triton.gradients(g, x, m, signs, mean, var, sums, *scalars)
    applied = moved(traffic, [g, x, m, signs, dx, dm])
    assert applied == (2 * one + 4 * whole + bits, 1)
    if upsample == 1:
        assert reduced[0] + applied[0] == 9 * whole + 2 * bits
