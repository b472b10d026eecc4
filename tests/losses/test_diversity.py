import numpy as np
import pytest
import torch
from hypothesis import assume, given, strategies as st
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    assert_message,
    golden_cases,
)

from dpsims.errors import DTypeError, InputError
from dpsims.losses import diversity_ratio, diversity_threshold, hinge_diversity_loss

NORMS = ("mean", "sum")


def make(batch=3, shape=(2, 3, 4), width=5, seed=0, dtype=torch.float64):
    """Two features and two latents."""
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, *size, generator=source, dtype=dtype)
        for size in (shape, shape, (width,), (width,))
    ]


seeds = st.integers(0, 2**16)
norms = st.sampled_from(NORMS)
cases = st.builds(
    make,
    batch=st.integers(1, 4),
    shape=st.tuples(*[st.integers(1, 4)] * 3),
    width=st.integers(1, 5),
    seed=seeds,
)


@given(cases, norms, st.floats(0, 20))
def test_symmetric_and_between_zero_and_the_threshold(case, norm, threshold):
    a, b, za, zb = case
    loss = hinge_diversity_loss(a, b, za, zb, threshold=threshold, norm=norm)
    swapped = hinge_diversity_loss(b, a, zb, za, threshold=threshold, norm=norm)
    assert_equal(swapped, loss)
    assert 0 <= loss <= threshold * (1 + 1e-12)


@given(cases, norms, st.floats(1e-3, 1e3))
def test_equal_features_cost_the_threshold_and_have_no_gradient(case, norm, threshold):
    a, _, za, zb = case
    a.requires_grad_()
    b = a.detach().clone().requires_grad_()
    loss = hinge_diversity_loss(a, b, za, zb, threshold=threshold, norm=norm)
    loss.backward()
    assert_close64(loss.detach(), torch.tensor(threshold, dtype=torch.float64))
    assert_equal(a.grad, torch.zeros_like(a))
    assert_equal(b.grad, torch.zeros_like(b))


@given(cases, norms, st.floats(1e-2, 1e2))
def test_scaling(case, norm, scale):
    a, b, za, zb = case
    ratio = diversity_ratio(a, b, za, zb, norm=norm)
    assert_close64(diversity_ratio(scale * a, scale * b, za, zb, norm=norm), scale * ratio)
    both = diversity_ratio(scale * a, scale * b, scale * za, scale * zb, norm=norm)
    # latents of the smallest scale still differ by far more than 1e-6
    assume((za - zb).abs().mean(1).min() * scale > 1e-5)
    assert_close64(both, ratio, scale=10)


@given(cases)
def test_sum_is_the_mean_times_the_ratio_of_sizes(case):
    a, _, za, _ = case
    means, sums = (diversity_ratio(*case, norm=norm) for norm in NORMS)
    assert_close64(sums, means * a[0].numel() / za[0].numel())


@given(cases, norms, seeds)
def test_batch_order_does_not_matter(case, norm, seed):
    order = torch.randperm(len(case[0]), generator=torch.Generator().manual_seed(seed))
    shuffled = [tensor[order] for tensor in case]
    assert_close64(diversity_ratio(*shuffled, norm=norm), diversity_ratio(*case, norm=norm)[order])
    assert_close64(
        hinge_diversity_loss(*shuffled, threshold=1, norm=norm),
        hinge_diversity_loss(*case, threshold=1, norm=norm),
    )


@given(cases, norms)
def test_zero_with_zero_gradient_from_the_threshold_on(case, norm):
    a, b, za, zb = case
    a.requires_grad_()
    ratio = diversity_ratio(a, b, za, zb, norm=norm).detach()
    # the smallest ratio itself is the threshold: nothing is asked of any sample
    smallest = float(ratio.min())
    loss = hinge_diversity_loss(a, b, za, zb, threshold=smallest, norm=norm)
    (gradient,) = torch.autograd.grad(loss, a)
    assert loss == 0
    assert_equal(gradient, torch.zeros_like(a))
    assume(smallest > 0)
    loss = hinge_diversity_loss(a, b, za, zb, threshold=smallest * 1.01, norm=norm)
    (gradient,) = torch.autograd.grad(loss, a)
    assert loss > 0
    assert (gradient[ratio > smallest * 1.01] == 0).all()
    assert (gradient[ratio == smallest] != 0).any()


@given(cases)
def test_a_gradient_step_moves_active_outputs_apart(case):
    a, b, za, zb = case
    a.requires_grad_()
    before = diversity_ratio(a, b, za, zb).detach()
    loss = hinge_diversity_loss(a, b, za, zb, threshold=float(before.max()) + 1)
    (gradient,) = torch.autograd.grad(loss, a)
    after = diversity_ratio(a - 0.01 * gradient / gradient.abs().max(), b, za, zb)
    assert (after > before).all()


def test_gradients_reach_features_only():
    a, b, za, zb = (tensor.requires_grad_() for tensor in make())
    hinge_diversity_loss(a, b, za, zb, threshold=10).backward()
    assert a.grad.abs().max() > 0
    assert_equal(b.grad, -a.grad)
    assert za.grad is None
    assert zb.grad is None
    assert not diversity_threshold(a, za).requires_grad


@pytest.mark.parametrize("norm", NORMS)
def test_equals_numpy(norm):
    a, b, za, zb = make()
    expected, total, hinge = [], 0.0, []
    reduce = np.sum if norm == "sum" else np.mean
    for i in range(3):
        ratio = reduce(np.abs((a[i] - b[i]).numpy())) / reduce(np.abs((za[i] - zb[i]).numpy()))
        expected.append(ratio)
        hinge.append(max(0.0, 1.5 - ratio))
        for j in range(3):
            if i != j:
                gap = reduce(np.abs((za[i] - za[j]).numpy()))
                total += reduce(np.abs((a[i] - a[j]).numpy())) / gap
    assert_close64(diversity_ratio(a, b, za, zb, norm=norm), torch.tensor(expected).double())
    loss = hinge_diversity_loss(a, b, za, zb, threshold=1.5, norm=norm)
    assert_close64(loss, torch.tensor(np.mean(hinge)))
    assert_close64(diversity_threshold(a, za, norm=norm), torch.tensor(total / 6))
    literal = diversity_threshold(a, za, norm=norm, as_printed=True)
    assert_close64(literal, torch.tensor(total / 9))


@pytest.mark.parametrize("norm", NORMS)
def test_gradcheck(norm):
    a, b, za, zb = make(2, (1, 2, 2), 3)

    def run(a, b):
        ratio = diversity_ratio(a, b, za, zb, norm=norm)
        # between the two ratios, away from the kink: one sample counts, the other does not
        middle = float(diversity_ratio(*make(2, (1, 2, 2), 3), norm=norm).mean())
        return ratio, hinge_diversity_loss(a, b, za, zb, threshold=middle, norm=norm)

    assert torch.autograd.gradcheck(run, (a.requires_grad_(), b.requires_grad_()), fast_mode=False)


@given(seeds, st.integers(2, 4), norms)
def test_threshold_ignores_order_and_equal_latents(seed, batch, norm):
    features, _, latents, _ = make(batch, seed=seed)
    expected = diversity_threshold(features, latents, norm=norm)
    order = torch.arange(batch).flip(0)
    assert_close64(diversity_threshold(features[order], latents[order], norm=norm), expected)
    # a sample with the latent of the first one: that pair is left out, all others count
    features = torch.cat([features, make(1, seed=seed + 1)[0]])
    latents = torch.cat([latents, latents[:1]])
    count = batch * (batch - 1) / 2
    ratios = diversity_ratio(
        features[-1:].expand(batch - 1, -1, -1, -1),
        features[1:batch],
        latents[:1].expand(batch - 1, -1),
        latents[1:batch],
        norm=norm,
    )
    mean = (expected * count + ratios.sum()) / (count + batch - 1)
    assert_close64(diversity_threshold(features, latents, norm=norm), mean)
    literal = diversity_threshold(features, latents, norm=norm, as_printed=True)
    assert_close64(literal, mean * 2 * (count + batch - 1) / (batch + 1) ** 2)


def test_threshold_of_equal_latents_is_nan_where_values_cannot_be_read():
    features, _, latents, _ = make()
    latents = latents[:1].expand(3, -1)
    batched = torch.func.vmap(diversity_threshold)(features[None], latents[None])
    assert batched.isnan().all()
    with pytest.raises(InputError) as caught:
        diversity_threshold(features, latents)
    assert_message(caught.value, "diversity_threshold: latents must", "got 3 equal")


@pytest.mark.parametrize("gap", [0.0, 1e-30])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0])
def test_latents_that_cannot_be_told_apart_stay_finite(gap, distance):
    # under vmap no value can be read, as on another device
    a = make(2, dtype=torch.float32)[0]
    b, za = a + distance, torch.zeros(2, 5)
    value, gradient = torch.func.vmap(
        torch.func.grad_and_value(
            lambda a, b, z: hinge_diversity_loss(
                a[None], b[None], z[None], z[None] + gap, threshold=2.0
            )
        )
    )(a, b, za)[::-1]
    assert_equal(value, torch.full((2,), 2.0 if distance == 0 else 0.0))
    assert_equal(gradient, torch.zeros_like(a))
    if gap:  # equal is an error, close is not
        assert diversity_ratio(a, b, za, za + gap).isfinite().all()


def test_equal_latents_are_named():
    a, b, za, zb = make(14)
    with pytest.raises(InputError) as caught:
        hinge_diversity_loss(
            a, b, za, torch.where(torch.arange(14)[:, None] > 1, za, zb), threshold=1
        )
    assert_message(
        caught.value,
        "hinge_diversity_loss: latents_b must differ",
        "12 of 14 samples: 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, ...",
    )
    zb[5] = za[5]
    with pytest.raises(InputError, match=r"1 of 14 samples: 5$"):
        diversity_ratio(a, b, za, zb)


@pytest.mark.parametrize("position", range(4))
def test_nan_is_not_hidden(position):
    case = make()
    case[position][1].view(-1)[0] = torch.nan
    assert diversity_ratio(*case).isnan().tolist() == [False, True, False]
    assert hinge_diversity_loss(*case, threshold=1e-9).isnan()
    assert diversity_threshold(case[position % 2], case[2 + position % 2]).isnan()


def test_empty_batch_costs_nothing():
    a, b, za, zb = make(0)
    a.requires_grad_()
    loss = hinge_diversity_loss(a, b, za, zb, threshold=1)
    loss.backward()
    assert loss == 0
    assert diversity_ratio(a, b, za, zb).shape == (0,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype):
    a = torch.full((1, 64, 256, 256), 6e4, dtype=dtype, requires_grad=True)
    b = torch.full((1, 64, 256, 256), -6e4, dtype=dtype)
    za, zb = torch.zeros(1, 8, dtype=dtype), torch.ones(1, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ratio = diversity_ratio(a, b, za, zb)
        loss = hinge_diversity_loss(a, b, za, zb, threshold=2e5, norm="mean")
    loss.backward()
    assert ratio.dtype == loss.dtype == torch.float32
    exact = 2 * float(a.detach()[0, 0, 0, 0])
    # blockwise float32 sums of four million equal terms
    torch.testing.assert_close(ratio.detach(), torch.tensor([exact]), rtol=1e-5, atol=0)
    assert a.grad.isfinite().all()
    total = diversity_ratio(a.detach(), b, za, zb, norm="sum")
    assert total.isfinite().all()


def test_layouts_and_inputs():
    a, b, za, zb = make()
    expected = diversity_ratio(a, b, za, zb)
    last = diversity_ratio(a.to(memory_format=torch.channels_last), b.mT.contiguous().mT, za, zb)
    assert_close64(last, expected)
    strided = torch.stack([za, zb], dim=-1)
    assert_equal(diversity_ratio(a, b, strided[..., 0], strided[..., 1]), expected)
    one = b[:, :, :1, :1].expand_as(b)
    assert_close64(diversity_ratio(a, one, za, zb), diversity_ratio(a, one.contiguous(), za, zb))
    assert all(tensor._version == 0 for tensor in (a, b, za, zb))
    with torch.inference_mode():
        assert_equal(diversity_ratio(a, b, za, zb), expected)
    meta = [tensor.to("meta") for tensor in (a, b, za, zb)]
    assert diversity_ratio(*meta).shape == (3,)
    assert hinge_diversity_loss(*meta, threshold=1).shape == ()
    assert diversity_threshold(meta[0], meta[2]).shape == ()


@pytest.mark.compile
def test_compiled_equals_eager():
    def run(a, b, za, zb):
        ratio = diversity_ratio(a, b, za, zb)
        loss = hinge_diversity_loss(a, b, za, zb, threshold=1.2, norm="mean")
        return ratio, loss, diversity_threshold(a, za)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    case = make()
    case[0].requires_grad_()
    results = []
    for function in (compiled, run):
        ratio, loss, threshold = function(*case)
        (gradient,) = torch.autograd.grad(loss, case[0])
        results.append((ratio, loss, threshold, gradient))
    for one, other in zip(*results, strict=True):
        assert_close64(one, other)
    # equal latents cannot raise in a compiled function: the value stays finite
    ratio, loss, _ = compiled(case[0], case[1], case[2], case[2])
    assert ratio.isfinite().all()
    assert loss == 0


NAMES = ("features_a", "features_b", "latents_a", "latents_b")
BAD_TENSORS = [
    pytest.param(0, DTypeError, ["features_a", "ndarray"], lambda x: x.numpy(), id="array"),
    pytest.param(1, DTypeError, ["features_b", "NoneType"], lambda x: None, id="none"),
    pytest.param(0, InputError, ["features_a", "(B, C, H, W)"], lambda x: x[0], id="rank-3"),
    pytest.param(
        1, InputError, ["features_b", "W=4", "(3, 2, 3, 3)"], lambda x: x[..., :3], id="width"
    ),
    pytest.param(1, InputError, ["features_b", "C=2"], lambda x: x[:, :1], id="no-broadcast"),
    pytest.param(0, InputError, ["features_a", "empty"], lambda x: x[:, :, :0], id="no-rows"),
    pytest.param(2, InputError, ["latents_a", "B=3", "(2, 5)"], lambda x: x[:2], id="batch"),
    pytest.param(3, InputError, ["latents_b", "Z=5"], lambda x: x[:, :1], id="latent-width"),
    pytest.param(
        3, InputError, ["latents_b", "(3, 5, 1)"], lambda x: x[..., None], id="latent-rank"
    ),
    pytest.param(2, DTypeError, ["latents_a", "int64"], lambda x: x.long(), id="integer-latent"),
    pytest.param(0, DTypeError, ["features_a", "complex"], lambda x: x.cfloat(), id="complex"),
    pytest.param(
        3, InputError, ["latents_b", "device", "meta"], lambda x: x.to("meta"), id="device"
    ),
    pytest.param(1, InputError, ["features_b", "dense"], lambda x: x.to_sparse(), id="sparse"),
]


@pytest.mark.parametrize(("position", "error", "parts", "change"), BAD_TENSORS)
def test_bad_tensors(position, error, parts, change):
    case = make()
    case[position] = change(case[position])
    for owner, options in (("diversity_ratio", {}), ("hinge_diversity_loss", {"threshold": 1})):
        function = {"diversity_ratio": diversity_ratio}.get(owner, hinge_diversity_loss)
        with pytest.raises(error) as caught:
            function(*case, **options)
        assert_message(caught.value, f"{owner}: ", "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        pytest.param(InputError, ["threshold", ">= 0", "-1"], {"threshold": -1}, id="negative"),
        pytest.param(InputError, ["threshold", "nan"], {"threshold": float("nan")}, id="nan"),
        pytest.param(InputError, ["threshold", "inf"], {"threshold": float("inf")}, id="inf"),
        pytest.param(DTypeError, ["threshold", "bool"], {"threshold": True}, id="bool"),
        pytest.param(
            DTypeError, ["threshold", "Tensor"], {"threshold": torch.ones(())}, id="tensor"
        ),
        pytest.param(DTypeError, ["threshold", "str"], {"threshold": "1"}, id="string"),
        pytest.param(
            InputError,
            ["norm", "'mean', 'sum'", "'l1'"],
            {"threshold": 1, "norm": "l1"},
            id="norm",
        ),
    ],
)
def test_bad_options(error, parts, options):
    with pytest.raises(error) as caught:
        hinge_diversity_loss(*make(), **options)
    assert_message(caught.value, "hinge_diversity_loss: ", "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "build"),
    [
        pytest.param(
            InputError, ["features", "2 samples", "got 1"], lambda f, z: (f[:1], z[:1]), id="one"
        ),
        pytest.param(InputError, ["features", "got 0"], lambda f, z: (f[:0], z[:0]), id="empty"),
        pytest.param(InputError, ["latents", "B=3"], lambda f, z: (f, z[:2]), id="batch"),
        pytest.param(InputError, ["features", "(B, C, H, W)"], lambda f, z: (z, z), id="rank"),
        pytest.param(DTypeError, ["latents", "list"], lambda f, z: (f, z.tolist()), id="list"),
    ],
)
def test_bad_calibration(error, parts, build):
    features, _, latents, _ = make()
    with pytest.raises(error) as caught:
        diversity_threshold(*build(features, latents))
    assert_message(caught.value, "diversity_threshold: ", "; got ", *parts)


def test_bad_calibration_options():
    features, _, latents, _ = make()
    with pytest.raises(
        DTypeError, match="diversity_threshold: as_printed must be a bool; got int"
    ):
        diversity_threshold(features, latents, as_printed=1)
    with pytest.raises(InputError, match="diversity_threshold: norm must be one of"):
        diversity_threshold(features, latents, norm="max")


@pytest.mark.parametrize("case", golden_cases("h_eq6_paper_eq"))
@pytest.mark.parametrize("norm", NORMS)
def test_golden_equation_6(case, norm):
    golden = Golden(case)
    f1, f2 = (golden.f64(key).requires_grad_() for key in ("f1", "f2"))
    z1, z2 = golden.f64("z1"), golden.f64("z2")
    threshold = golden.f64(f"tau_{norm}").item()
    ratio = diversity_ratio(f1, f2, z1, z2, norm=norm)
    assert_golden64(ratio, golden, f"ratio_{norm}")
    loss = hinge_diversity_loss(f1, f2, z1, z2, threshold=threshold, norm=norm)
    assert_golden64(loss, golden, f"loss_{norm}")
    loss.backward()
    assert_golden64(f1.grad, golden, f"grad_f1_{norm}")
    assert_golden64(f2.grad, golden, f"grad_f2_{norm}")
    spheres = [z / z.norm(dim=1, keepdim=True) for z in (z1, z2)]
    on_sphere = diversity_ratio(f1, f2, *spheres, norm=norm)
    assert_golden64(on_sphere, golden, f"ratio_{norm}_zbar")


@pytest.mark.parametrize("case", golden_cases("h_eq7_paper_eq"))
@pytest.mark.parametrize("norm", NORMS)
def test_golden_equation_7(case, norm):
    golden = Golden(case)
    f, z = golden.f64("f"), golden.f64("z")
    assert_golden64(diversity_threshold(f, z, norm=norm), golden, f"tau_{norm}_offdiag")
    literal = diversity_threshold(f, z, norm=norm, as_printed=True)
    assert_golden64(literal, golden, f"tau_{norm}_B2")
    sphere = z / z.norm(dim=1, keepdim=True)
    literal = diversity_threshold(f, sphere, norm=norm, as_printed=True)
    assert_golden64(literal, golden, f"tau_{norm}_B2_zbar")


@pytest.mark.parametrize("case", golden_cases("h_dsgan"))
def test_golden_dsgan(case):
    # theirs: minus the mean ratio, 1e-5 added to the latent distance, no gradient to out2
    golden = Golden(case)
    out1, out2, z1, z2 = (golden.f64(key) for key in ("out1", "out2", "z1", "z2"))
    out1.requires_grad_()
    gaps = (z1 - z2).abs().mean(1)
    mean = (diversity_ratio(out1, out2, z1, z2) * gaps / (gaps + 1e-5)).mean()
    assert_golden64(-mean, golden, "errNE")
    (gradient,) = torch.autograd.grad(-mean, out1)
    assert_golden64(gradient, golden, "grad_out1")
    # a threshold beyond every ratio makes ours theirs, but for a constant
    loss = hinge_diversity_loss(out1, out2, z1, z2, threshold=100)
    torch.testing.assert_close(loss.detach() - 100, golden.f64("errNE"), rtol=1e-4, atol=0)


@pytest.mark.parametrize("case", golden_cases("h_msgan"))
def test_golden_msgan(case):
    # theirs: 1 / (ratio of means over the whole batch + 1e-5); the batch as one sample of ours
    golden = Golden(case)
    out1, out2, z1, z2 = (
        golden.f64(key)[None].flatten(1, 2) for key in ("out1", "out2", "z1", "z2")
    )
    out1.requires_grad_()
    out2.requires_grad_()
    ratio = diversity_ratio(out1, out2, z1.reshape(1, -1), z2.reshape(1, -1))
    loss = (1 / (ratio + 1e-5)).squeeze()
    assert_golden64(loss, golden, "loss_lz")
    loss.backward()
    shape = golden.f64("out1").shape
    assert_golden64(out1.grad.reshape(shape), golden, "grad_out1")
    assert_golden64(out2.grad.reshape(shape), golden, "grad_out2")
