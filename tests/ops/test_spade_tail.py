"""The public SPADE tail: relations, an oracle, every order of gradients, and who runs when."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, strategies as st
from spade_tail_parts import EPS, LAYOUTS, SIZES, assert_near, laid_out, make_case, oracle
from support import assert_close64, assert_equal, assert_message
from torch.nn import functional as F

from dpsims.errors import DTypeError, InputError
from dpsims.nn.norm import BatchNorm2d
from dpsims.nn.spade import SPADE
from dpsims.nn.spade_block import SPADEResBlock
from dpsims.ops._launch import triton_kernel
from dpsims.ops.spade_tail import _autograd, _choice, _library, api
from dpsims.ops.spade_tail.api import ChannelStatistics, channel_moments, spade_tail

IMPLS = ("reference", "closed_form")
MODES = ("batch", "fixed", "none")
sizes = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))
resolve = _choice.resolve_spade_tail_impl


def statistics(case, mode):
    if mode == "none":
        return None
    mean, var = channel_moments(case.features)
    count = case.features.numel() // case.features.shape[1] if mode == "batch" else None
    return ChannelStatistics(mean, var, EPS, count)


def run(case, mode, impl, slope=0.2, upsample=1):
    """Output and gradients of features and modulation."""
    leaves = [value.detach().requires_grad_() for value in case[:2]]
    out = spade_tail(*leaves, statistics(case, mode), slope=slope, upsample=upsample, impl=impl)
    return out, *torch.autograd.grad(out, leaves, case.grad)


# relations


@pytest.mark.parametrize("impl", IMPLS)
@given(size=sizes, seed=st.integers(0, 99), upsample=st.integers(1, 3))
def test_without_modulation_it_is_batch_norm(impl, size, seed, upsample):
    size = (size[0] + 1, *size[1:])
    x = make_case(size, dtype=torch.float64, seed=seed).features
    zeros = x.new_zeros(size[0], 2 * size[1], size[2] * upsample, size[3] * upsample)
    norm = BatchNorm2d(size[1], affine=False).double()
    twin = copy.deepcopy(norm)
    found = norm.statistics(x, upsample=upsample)
    repeated = x.repeat_interleave(upsample, 2).repeat_interleave(upsample, 3)
    expected = twin(repeated)
    assert_close64(spade_tail(x, zeros, found, upsample=upsample, impl=impl), expected, scale=100)
    for name, value in twin.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, rtol=1e-10, atol=1e-12)


def test_one_pixel_is_enough_if_it_is_repeated():
    norm = BatchNorm2d(3, affine=False)
    assert_equal(norm.statistics(torch.ones(1, 3, 1, 1), upsample=2).var, torch.zeros(3))
    with pytest.raises(InputError, match="at least two values per channel"):
        norm.statistics(torch.ones(1, 3, 1, 1))


@pytest.mark.parametrize("impl", IMPLS)
def test_slopes(impl):
    case = make_case((2, 3, 4, 5), dtype=torch.float64)
    plain = spade_tail(case.features, case.modulation, impl=impl)
    for slope in (0.0, 0.2, 1.0):
        out = spade_tail(case.features, case.modulation, slope=slope, impl=impl)
        assert_close64(out, F.leaky_relu(plain, slope))


@pytest.mark.parametrize("impl", IMPLS)
@given(size=sizes, seed=st.integers(0, 99), mode=st.sampled_from(MODES), shift=st.floats(-50, 50))
def test_a_shift_of_the_features_leaves_the_tail_alone(impl, size, seed, mode, shift):
    if mode == "none":
        return
    case = make_case((size[0] + 1, *size[1:]), dtype=torch.float64, seed=seed)
    moved = case._replace(features=case.features + shift)
    for one, other in zip(run(moved, mode, impl), run(case, mode, impl), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-7, atol=1e-7)


# oracle and gradients


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("slope", "upsample"), [(0.2, 1), (1.0, 1), (0.2, 2), (0.0, 3)])
def test_oracle(impl, size, mode, slope, upsample):
    case = make_case(size, upsample=upsample, dtype=torch.float64)
    answer = oracle(case, mode=mode, slope=slope, upsample=upsample)
    out, to_features, to_modulation = run(case, mode, impl, slope, upsample)
    torch.testing.assert_close(out, answer.out, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(to_features, answer.to_features, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(to_modulation, answer.to_modulation, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_float32(impl, layout):
    # 50,000 values: the sums take the fast way where there are two
    case = make_case((2, 13, 48, 41))
    answer = oracle(case, mode="batch", slope=0.2)
    case = case._make(laid_out(value, layout, i) for i, value in enumerate(case))
    mean, var = channel_moments(case.features)
    assert_near(mean, answer.mean, roundings=4, scale=5)
    assert_near(var, answer.var, roundings=16, scale=16)
    out, to_features, to_modulation = run(case, "batch", impl)
    # a mean of 2.5 deviations is taken away, values reach 10
    assert_near(out, answer.out, roundings=32, scale=10)
    sure = answer.margin > 1e-4
    for found, expected in (
        (to_features, answer.to_features),
        (to_modulation, answer.to_modulation),
    ):
        keep = sure if found.shape == sure.shape else torch.cat((sure, sure), 1)
        assert_near(found[keep], expected[keep], roundings=64, scale=20)
    if impl == "closed_form" and layout == "channels_last":
        assert out.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("upsample", [1, 2])
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_gradients_of_first_and_second_order(impl, mode, upsample, slope):
    case = make_case((2, 2, 2, 1), upsample=upsample, dtype=torch.float64, seed=3)
    given_statistics = statistics(case, mode)

    def tail(x, m):
        found = given_statistics
        if mode == "batch":
            # finite differences move the moments too
            found = ChannelStatistics(*channel_moments(x), EPS, x.numel() // 2)
        return spade_tail(x, m, found, slope=slope, upsample=upsample, impl=impl)

    leaves = [value.requires_grad_() for value in case[:2]]
    assert torch.autograd.gradcheck(tail, leaves, fast_mode=False)
    assert torch.autograd.gradgradcheck(tail, leaves, fast_mode=False)


def test_fused_pieces_have_gradients_of_every_order():
    case = make_case((2, 2, 2, 1), dtype=torch.float64, seed=3)

    def tail(x, m):
        return _autograd.tail(x, m, *channel_moments(x), 4, None, EPS, 0.2, 1, fused=True)

    leaves = [value.requires_grad_() for value in case[:2]]
    assert torch.autograd.gradcheck(tail, leaves, fast_mode=False)
    assert torch.autograd.gradgradcheck(tail, leaves, fast_mode=False)
    assert_close64(tail(*leaves).detach(), tail(*(leaf.detach() for leaf in leaves)))


def test_triton_kernels_are_what_the_fused_tail_runs(monkeypatch):
    pytest.importorskip("triton")
    case = make_case((2, 5, 3, 4))
    answer = oracle(case, mode="batch", slope=0.2)
    called = []
    for name in ("apply", "sums", "gradients"):

        def note(*args, name=name):
            called.append(name)
            return triton_kernel(_library._KERNELS, name)(*args)

        monkeypatch.setattr(_library, name, note)
    if torch.cuda.is_available():
        case = case._make(value.cuda() for value in case)
    leaves = [value.requires_grad_() for value in case[:2]]
    moments = channel_moments(case.features)
    out = _autograd.tail(*leaves, *moments, 24, None, EPS, 0.2, 1, fused=True)
    to_features, to_modulation = torch.autograd.grad(out, leaves, case.grad)
    assert called == ["apply", "sums", "gradients"]
    assert_near(out, answer.out, roundings=64, scale=5)
    assert_near(to_features, answer.to_features, roundings=64, scale=10)
    assert_near(to_modulation, answer.to_modulation, roundings=64, scale=10)


def test_fused_is_reached_through_the_public_functions(monkeypatch):
    monkeypatch.setattr(api, "resolve_for", lambda *args, **kwargs: "fused")
    case = make_case((2, 5, 3, 4))
    answer = oracle(case, mode="batch", slope=0.2)
    out, to_features, to_modulation = run(case, "batch", "auto")
    assert out.grad_fn.fused
    assert_near(out, answer.out, roundings=64, scale=5)
    assert_near(to_features, answer.to_features, roundings=64, scale=10)
    assert_near(to_modulation, answer.to_modulation, roundings=64, scale=10)


@pytest.mark.parametrize("impl", IMPLS)
def test_nan_propagates(impl):
    case = make_case((2, 3, 4, 5))
    case.features[0, 1, 2, 3] = torch.nan
    case.modulation[1, 2, 0, 0] = torch.nan
    out, to_features, _ = run(case, "batch", impl)
    assert bool(out[:, 1].isnan().all())
    assert out[:, 2].isnan().sum() == 1
    assert bool(to_features[:, 1:].isnan().all())
    assert bool(torch.cat((out[:, 0], to_features[:, 0])).isfinite().all())


@pytest.mark.parametrize("impl", IMPLS)
def test_inputs_are_not_written_to(impl):
    case = make_case((2, 3, 4, 5))
    before = [value.clone() for value in case]
    run(case, "batch", impl)
    for value, old in zip(case, before, strict=True):
        assert_equal(value, old)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,) * 2, (torch.float32, torch.bfloat16)])
def test_half_maps_are_near(dtypes):
    case = make_case((2, 3, 8, 8))
    x, m = (value.to(dtype) for value, dtype in zip(case[:2], dtypes, strict=True))
    answer = oracle(case._replace(features=x, modulation=m), mode="batch", slope=0.2)
    found = ChannelStatistics(*channel_moments(x), EPS, 128)
    out = spade_tail(x, m, found, slope=0.2)
    assert out.dtype == dtypes[0]
    assert_near(out, answer.out, roundings=64, scale=10)


# the operators


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
@pytest.mark.parametrize("upsample", [1, 2])
def test_operators_keep_their_contract(layout, upsample):
    case = make_case((2, 5, 3, 4), upsample=upsample)
    x, m, g = (laid_out(value, layout) for value in case)

    def check(operator, args):
        assert set(torch.library.opcheck(operator, args).values()) == {"SUCCESS"}

    check(_library.moments, (x,))
    mean, var = _library.moments(x)
    scalars = (EPS, 0.2, upsample)
    check(_library.apply, (x, m, mean, var, *scalars, True))
    check(_library.apply, (x, m, None, None, *scalars, False))
    _, signs = _library.apply(x, m, mean, var, *scalars, True)
    check(_library.sums, (g, x, m, signs, mean, var, *scalars))
    sums = _library.sums(g, x, m, signs, mean, var, *scalars)
    check(_library.gradients, (g, x, m, signs, mean, var, sums, *scalars))
    check(_library.gradients, (g, x, m, signs, None, None, None, *scalars))


@pytest.mark.compile
@pytest.mark.parametrize("form", ["fused", "closed_form", "auto"])
def test_compiles_whole_and_equal(form):
    torch._dynamo.reset()
    case = make_case((2, 5, 3, 4))
    mean, var = channel_moments(case.features)

    def tail(x, m):
        if form == "fused":
            return _autograd.tail(x, m, mean, var, 24, None, EPS, 0.2, 1, fused=True)
        found = ChannelStatistics(*channel_moments(x), EPS, 24)
        return spade_tail(x, m, found, slope=0.2, impl=form)

    leaves = [value.requires_grad_() for value in case[:2]]
    whole = torch.compile(tail, fullgraph=True, backend="aot_eager")
    results = []
    for function in (tail, whole):
        out = function(*leaves)
        results.append((out, *torch.autograd.grad(out, leaves, case.grad)))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_torch_func_and_meta_tensors():
    case = make_case((2, 3, 16, 16), dtype=torch.float64)
    answer = oracle(case, mode="batch", slope=0.2)

    def loss(x):
        found = ChannelStatistics(*channel_moments(x), EPS, 512)
        return (spade_tail(x, case.modulation, found, slope=0.2) * case.grad).sum()

    torch.testing.assert_close(torch.func.grad(loss)(case.features), answer.to_features)
    meta = [value.to("meta") for value in case]
    assert spade_tail(meta[0], meta[1]).shape == (2, 3, 16, 16)
    assert channel_moments(meta[0])[0].shape == (3,)


# blocks


@pytest.mark.parametrize("norm", ["batch", "instance", "none"])
@pytest.mark.parametrize("training", [True, False])
def test_blocks_take_the_closed_form_where_maps_are_large(monkeypatch, norm, training):
    torch.manual_seed(0)
    block = SPADEResBlock(6, 4, 2, hidden_channels=4, norm=norm).double()
    with torch.no_grad():
        for name, buffer in block.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    block.train(training)
    results = []
    for small, impl in ((2**40, "reference"), (0, "closed_form")):
        monkeypatch.setattr(_choice, "_SMALL", small)
        assert _choice.resolve_for("auto", torch.ones(2, 6, 5, 4).double(), size=240) == impl
        twin = copy.deepcopy(block)
        x = make_case((2, 6, 5, 4), dtype=torch.float64).features.requires_grad_()
        cond = make_case((2, 2, 5, 4), dtype=torch.float64, seed=1).features
        out = twin(x, cond)
        grads = torch.autograd.grad(out.sin().sum(), [x, *twin.parameters()])
        results.append((out, *grads, *twin.buffers()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_spade_takes_statistics_from_outside():
    spade, norm = SPADE(3, 2).double(), BatchNorm2d(3, affine=False).double()
    x, cond = make_case((2, 3, 5, 4), dtype=torch.float64).features, torch.rand(2, 2, 5, 4)
    found = norm.statistics(x)
    out = spade(x, cond.double(), statistics=found, slope=0.2)
    assert_close64(out, F.leaky_relu(spade(x, cond.double()), 0.2), scale=100)
    assert norm.num_batches_tracked == 1
    norm.eval()
    assert norm.statistics(x).num_values is None
    assert_equal(norm.statistics(x).mean, norm.running_mean)


# the choice


@pytest.mark.parametrize(
    ("settings", "impl"),
    [
        pytest.param({"device": "cuda"}, "fused", id="cuda"),
        pytest.param({"device": "cuda", "compiling": True}, "fused", id="cuda-compiled"),
        pytest.param({"device": "cuda", "has_triton": False}, "reference", id="no-triton"),
        pytest.param({"device": "cuda", "dtypes": [torch.float64]}, "reference", id="float64"),
        pytest.param({"device": "cuda", "transformed": True}, "reference", id="cuda-func"),
        pytest.param({}, "closed_form", id="cpu"),
        pytest.param({"size": 2**18}, "closed_form", id="cpu-large"),
        pytest.param({"size": 2**18 - 1}, "reference", id="cpu-small"),
        pytest.param({"compiling": True}, "reference", id="cpu-compiled"),
        pytest.param({"transformed": True}, "reference", id="cpu-func"),
        pytest.param({"dtypes": [torch.bfloat16]}, "reference", id="cpu-half"),
        pytest.param({"dtypes": [torch.float32, torch.float64]}, "reference", id="mixed"),
        pytest.param({"device": "meta"}, "reference", id="meta"),
    ],
)
def test_auto(settings, impl):
    resolved = resolve("auto", **settings)
    assert resolved.impl == impl
    assert resolved.reason


@pytest.mark.parametrize(
    ("impl", "settings", "part"),
    [
        pytest.param("fused", {}, "need a CUDA device, not cpu", id="cpu"),
        pytest.param("fused", {"device": "cuda", "has_triton": False}, "triton", id="triton"),
        pytest.param(
            "fused", {"device": "cuda", "dtypes": [torch.float64]}, "float16", id="float64"
        ),
        pytest.param("closed_form", {"dtypes": [torch.float16]}, "one dtype", id="half"),
        pytest.param("closed_form", {"transformed": True}, "torch.func", id="func"),
        pytest.param("sdpa", {}, "one of 'auto', 'reference'", id="unknown"),
    ],
)
def test_what_was_asked_for_runs_or_raises(impl, settings, part):
    with pytest.raises(InputError) as caught:
        resolve(impl, **settings)
    assert_message(caught.value, "spade_tail: impl must", part, repr(impl))
    assert resolve("reference", **settings).impl == "reference"


# bad inputs


@pytest.mark.parametrize(
    ("change", "error", "parts"),
    [
        pytest.param({"features": None}, DTypeError, ("features must", "NoneType"), id="none"),
        pytest.param(
            {"modulation": torch.ones(2, 3, 4, 5)}, InputError, ("C2=6", "(2, 3, 4, 5)"), id="half"
        ),
        pytest.param({"upsample": 2}, InputError, ("modulation must", "H=8, W=10"), id="upsample"),
        pytest.param({"upsample": 0}, InputError, ("upsample must be at least 1",), id="no-size"),
        pytest.param({"upsample": 2.0}, DTypeError, ("upsample must be an int",), id="float"),
        pytest.param({"slope": 1.5}, InputError, ("slope must", "<= 1"), id="steep"),
        pytest.param({"slope": -0.1}, InputError, ("slope must", ">= 0"), id="negative"),
        pytest.param(
            {"statistics": (1, 2)}, DTypeError, ("ChannelStatistics", "tuple"), id="tuple"
        ),
        pytest.param(
            {"statistics": ChannelStatistics(torch.ones(2), torch.ones(3))},
            InputError,
            ("mean must", "(C=3,)"),
            id="mean",
        ),
        pytest.param(
            {"statistics": ChannelStatistics(torch.ones(3), torch.ones(3), -1.0)},
            InputError,
            ("eps must",),
            id="eps",
        ),
        pytest.param({"impl": "fused"}, InputError, ("CUDA",), id="fused-on-cpu"),
    ],
)
def test_bad_inputs(change, error, parts):
    inputs = {"features": torch.ones(2, 3, 4, 5), "modulation": torch.ones(2, 6, 4, 5), **change}
    with pytest.raises(error) as caught:
        spade_tail(**inputs)
    assert_message(caught.value, "spade_tail: ", *parts)


def test_bad_features_of_moments():
    with pytest.raises(InputError) as caught:
        channel_moments(torch.ones(2, 3, 4))
    assert_message(caught.value, "channel_moments: features must", "(2, 3, 4)")
    assert_equal(torch.stack(channel_moments(torch.ones(0, 3, 2, 2))), torch.zeros(2, 3))
