import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from scipy.stats import chisquare
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    assert_message,
    golden_cases,
)

from dpsims.errors import DTypeError, InputError
from dpsims.losses import PatchInfoNCE, info_nce
from dpsims.losses._patches import draw_positions, gather_pixels


def vectors(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def make(count=3, dim=4, negatives=5, shared=True, seed=0):
    sizes = ((count, dim), (count, dim), (negatives, dim) if shared else (count, negatives, dim))
    return [vectors(*size, seed=3 * seed + i) for i, size in enumerate(sizes)]


seeds = st.integers(0, 2**16)
cases = st.builds(
    make,
    count=st.integers(1, 4),
    dim=st.integers(1, 5),
    negatives=st.integers(1, 6),
    shared=st.booleans(),
    seed=seeds,
)
temperatures = st.floats(0.01, 10)


@given(cases, temperatures, st.booleans())
def test_equals_cross_entropy_of_the_logits(case, temperature, normalize):
    queries, positives, negatives = case
    if normalize:
        queries, positives, negatives = (F.normalize(x, dim=-1) for x in case)
    different = torch.einsum(
        "pd,...nd->pn" if negatives.ndim == 2 else "pd,pnd->pn", queries, negatives
    )
    logits = torch.cat([(queries * positives).sum(1, keepdim=True), different], 1) / temperature
    target = torch.zeros(len(queries), dtype=torch.long)
    for reduction in ("mean", "sum", "none"):
        expected = F.cross_entropy(logits, target, reduction=reduction)
        actual = info_nce(*case, temperature=temperature, normalize=normalize, reduction=reduction)
        # rounding of logits of size |v|^2 / temperature
        scale = 10 * (1 + logits.abs().max().item())
        assert_close64(actual, expected, scale=scale)


@given(cases, temperatures)
def test_bounds(case, temperature):
    loss = info_nce(*case, temperature=temperature, reduction="none")
    count = case[2].shape[-2]
    assert (loss >= 0).all()
    assert (loss <= math.log1p(count * math.exp(2 / temperature)) * (1 + 1e-12)).all()


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 5), seeds)
def test_identical_vectors(count, negatives, dim, seed):
    vector = vectors(1, dim, seed=seed)
    loss = info_nce(
        vector.expand(count, dim), vector.expand(count, dim), vector.expand(negatives, dim)
    )
    assert_close64(loss, torch.tensor(math.log(negatives + 1)).double(), scale=1e4)


@given(st.integers(1, 6), temperatures)
def test_orthogonal_negatives(count, temperature):
    basis = torch.eye(count + 1, dtype=torch.float64)
    loss = info_nce(basis[:1], basis[:1], basis[1:], temperature=temperature)
    expected = math.log1p(count * math.exp(-1 / temperature))
    # the loss is a difference of numbers near 1 / temperature
    torch.testing.assert_close(
        loss.item(), expected, rtol=1e-12, atol=1e-15 * (1 + 1 / temperature)
    )


@given(cases, st.lists(st.floats(1e-3, 1e3), min_size=3, max_size=3))
def test_lengths_do_not_matter(case, lengths):
    scaled = [length * x for length, x in zip(lengths, case, strict=True)]
    assert_close64(info_nce(*scaled), info_nce(*case), scale=10)


@given(cases, seeds)
def test_rotations_do_not_matter(case, seed):
    dim = case[0].shape[1]
    rotation = torch.linalg.qr(vectors(dim, dim, seed=seed)).Q
    rotated = [x @ rotation for x in case]
    for normalize in (True, False):
        assert_close64(
            info_nce(*rotated, normalize=normalize),
            info_nce(*case, normalize=normalize),
            scale=100,
        )


@given(cases, seeds)
def test_order_does_not_matter(case, seed):
    queries, positives, negatives = case
    source = torch.Generator().manual_seed(seed)
    shuffled = negatives[..., torch.randperm(negatives.shape[-2], generator=source), :]
    loss = info_nce(*case, reduction="none")
    assert_close64(info_nce(queries, positives, shuffled, reduction="none"), loss)
    order = torch.randperm(len(queries), generator=source)
    own = negatives if negatives.ndim == 2 else negatives[order]
    moved = info_nce(queries[order], positives[order], own, reduction="none")
    assert_close64(moved, loss[order])


@given(cases, temperatures)
def test_another_negative_never_lowers_the_loss(case, temperature):
    queries, positives, negatives = case
    fewer = negatives[..., 1:, :] if negatives.shape[-2] > 1 else negatives
    less = info_nce(queries, positives, fewer, temperature=temperature, reduction="none")
    more = info_nce(*case, temperature=temperature, reduction="none")
    assert (more >= less * (1 - 1e-12) - 1e-12).all()


@given(cases)
def test_shared_negatives_are_repeated_ones(case):
    queries, positives, negatives = case
    if negatives.ndim == 2:
        repeated = negatives.expand(len(queries), -1, -1)
        assert_close64(info_nce(queries, positives, repeated), info_nce(*case))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("shared", [True, False])
def test_gradcheck_first_and_second_order(normalize, shared):
    case = [x.requires_grad_() for x in make(2, 3, 2, shared=shared)]

    def run(*case):
        return info_nce(*case, normalize=normalize)

    assert torch.autograd.gradcheck(run, case, fast_mode=False)
    assert torch.autograd.gradgradcheck(run, case, fast_mode=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-7, 6e4, 1e30])
def test_extreme_vectors_stay_finite(dtype, size):
    case = [
        (size * x).to(dtype).clamp(-6e4, 6e4) if dtype == torch.float16 else (size * x).to(dtype)
        for x in make()
    ]
    case = [x.requires_grad_() for x in case]
    loss = info_nce(*case, temperature=0.07)
    loss.backward()
    assert loss.dtype == (dtype if dtype == torch.float64 else torch.float32)
    assert loss.isfinite()
    for x in case:
        assert x.grad.isfinite().all()
        # the documented growth, times 1 / temperature and two unit vectors
        assert x.grad.abs().max() <= (1e3 if dtype == torch.float16 else 1e6) * 2 / 0.07
    if size == 0:
        assert loss.item() == pytest.approx(math.log(6), rel=1e-6)


def test_float16_that_overflows_without_normalisation_in_float32():
    x = torch.full((2, 8), 6e4, dtype=torch.float16)
    y = torch.full((3, 8), -6e4, dtype=torch.float16)
    loss = info_nce(x, x, y, temperature=0.3)
    torch.testing.assert_close(
        loss.item(), math.log1p(3 * math.exp(-2 / 0.3)), rtol=1e-4, atol=1e-6
    )


def test_autocast_changes_nothing():
    case = [x.float() for x in make()]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(info_nce(*case), info_nce(*case))
        inside = info_nce(*case)
    assert_equal(inside, info_nce(*case))
    mixed = info_nce(case[0], case[1].bfloat16(), case[2].double())
    assert mixed.dtype == torch.float64


@pytest.mark.parametrize("position", range(3))
def test_nan_is_not_hidden(position):
    case = make()
    case[position][1, 2] = torch.nan
    loss = info_nce(*case, reduction="none")
    assert loss.isnan().tolist() == ([False, True, False] if position < 2 else [True] * 3)
    assert info_nce(*case).isnan()


def test_no_queries_cost_nothing():
    queries, positives, negatives = (x.requires_grad_() for x in make())
    loss = info_nce(queries[:0], positives[:0], negatives)
    loss.backward()
    assert loss == 0
    assert_equal(negatives.grad, torch.zeros_like(negatives))
    assert info_nce(queries[:0], positives[:0], negatives, reduction="none").shape == (0,)


def test_layouts_and_transforms():
    case = make(shared=False)
    expected = info_nce(*case)
    strided = [x.mT.contiguous().mT for x in case]
    assert_close64(info_nce(*strided), expected)
    one = case[2][:1, :1].expand_as(case[2])
    assert_close64(info_nce(*case[:2], one), info_nce(*case[:2], one.contiguous()))
    assert all(x._version == 0 for x in case)
    with torch.inference_mode():
        assert_equal(info_nce(*case), expected)
    assert info_nce(*(x.to("meta") for x in case)).shape == ()
    batched = torch.func.vmap(info_nce)(*(torch.stack([x, 2 * x.flip(0)]) for x in case))
    assert_close64(batched, expected.expand(2))


# PatchInfoNCE

CHANNELS = (3, 2)
SIZES = ((5, 4), (2, 3))


def maps(batch=2, channels=CHANNELS, sizes=SIZES, seed=0, dtype=torch.float64):
    return [
        vectors(batch, width, *size, seed=100 * seed + level, dtype=dtype)
        for level, (width, size) in enumerate(zip(channels, sizes, strict=True))
    ]


def build(channels=CHANNELS, dtype=torch.float64, **options):
    options = {
        "embed_dim": 4,
        "num_patches": 3,
        "num_negatives": 4,
        "num_conv_blocks": 1,
        **options,
    }
    return PatchInfoNCE(list(channels), **options).to(dtype)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(1, 30), st.integers(1, 30), seeds)
def test_drawn_positions_are_distinct_and_in_range(height, width, count, batch, seed):
    positions = draw_positions(torch.empty(batch, 1, height, width), count, seeded(seed))
    total = height * width
    assert positions.shape == (batch, min(count, total))
    assert ((positions >= 0) & (positions < total)).all()
    assert all(len(set(row)) == len(row) for row in positions.tolist())


def test_drawn_positions_are_uniform():
    counts = np.zeros((2, 6))
    positions = draw_positions(torch.empty(20000, 1, 2, 3), 2, seeded())
    for place in range(2):
        counts[place] = np.bincount(positions[:, place], minlength=6)
    # a fixed seed: this cannot flake, and a bias of 5 % would give a p-value below 1e-9
    assert min(chisquare(row).pvalue for row in counts) > 1e-3


def oracle(loss, fake, real, generator):
    """The module's loss as loops over levels, images and patches."""
    total = 0
    for level, (query_map, key_map) in enumerate(zip(fake, real, strict=True)):
        conv, mlp = loss.convs[level], loss.mlps[level]
        patches = draw_positions(query_map, loss.num_patches, generator)
        others = draw_positions(query_map, loss.num_negatives + 1, generator)
        query_map, key_map = conv(query_map).flatten(2), conv(key_map).flatten(2)
        terms = []
        for image in range(len(query_map)):
            for position in patches[image].tolist():
                negatives = [other for other in others[image].tolist() if other != position]
                negatives = negatives[: loss.num_negatives]
                terms.append(
                    info_nce(
                        mlp(query_map[image, None, :, position]),
                        mlp(key_map[image, None, :, position]),
                        mlp(key_map[image][:, negatives].T),
                        temperature=loss.temperature,
                        normalize=loss.normalize,
                    )
                )
        total = total + torch.stack(terms).mean()
    return total


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(2, 4)), min_size=1, max_size=3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(0, 2),
    st.booleans(),
    seeds,
)
def test_equals_loops_over_images_and_patches(
    sizes, batch, num_patches, num_negatives, num_conv_blocks, normalize, seed
):
    channels = [2, 3, 1][: len(sizes)]
    loss = build(
        channels,
        num_patches=num_patches,
        num_negatives=num_negatives,
        num_conv_blocks=num_conv_blocks,
        normalize=normalize,
    )
    fake, real = (maps(batch, channels, sizes, seed=seed + i) for i in range(2))
    expected = oracle(loss, fake, real, seeded(seed))
    assert_close64(loss(fake, real, generator=seeded(seed)), expected, scale=10)


def test_own_position_is_never_a_negative():
    # every pixel has its own number, so every negative shows in the loss
    loss = build((1,), num_patches=9, num_negatives=8, num_conv_blocks=0, normalize=False)
    seen = []
    loss.mlps[0] = torch.nn.Identity()
    real = torch.arange(9, dtype=torch.float64).view(1, 1, 3, 3)
    queries = torch.full_like(real, 5.0)
    value = loss([queries], [real], generator=seeded())
    for own in range(9):
        order = torch.tensor([own, *(other for other in range(9) if other != own)])
        logits = 5 * order.double() / 0.3
        seen.append(torch.logsumexp(logits, 0) - logits[0])
    assert_close64(value, torch.stack(seen).mean())


@pytest.mark.parametrize(("num_patches", "num_negatives"), [(4, 7), (16, 15), (40, 99), (1, 1)])
def test_every_patch_has_the_same_number_of_negatives(num_patches, num_negatives):
    # identical embeddings: every term is log(1 + number of negatives)
    loss = build((2,), num_patches=num_patches, num_negatives=num_negatives, num_conv_blocks=0)
    flat = [torch.ones(3, 2, 4, 4, dtype=torch.float64)]
    expected = math.log1p(min(num_negatives, 15))
    value = loss(flat, flat, generator=seeded())
    assert value.item() == pytest.approx(expected, rel=1e-12)


def test_levels_add_up():
    loss = build()
    fake, real = maps(seed=0), maps(seed=1)
    source = seeded()
    parts = []
    for level in range(2):
        single = build(CHANNELS[level : level + 1])
        single.convs[0], single.mlps[0] = loss.convs[level], loss.mlps[level]
        parts.append(single(fake[level : level + 1], real[level : level + 1], generator=source))
    assert_close64(loss(fake, real, generator=seeded()), parts[0] + parts[1])


def test_a_map_of_one_pixel_costs_nothing():
    loss = build((3,), num_patches=128, num_negatives=128)
    fake, real = maps(2, (3,), ((1, 1),), seed=0), maps(2, (3,), ((1, 1),), seed=1)
    fake[0].requires_grad_()
    value = loss(fake, real)
    value.backward()
    assert value == 0
    assert_equal(fake[0].grad, torch.zeros_like(fake[0]))
    assert all((parameter.grad == 0).all() for parameter in loss.parameters())


def test_gradients_reach_fake_features_and_projectors_only():
    loss = build()
    fake, real = ([level.requires_grad_() for level in maps(seed=seed)] for seed in (0, 1))
    loss(fake, real, generator=seeded()).backward()
    assert all(level.grad.abs().max() > 0 for level in fake)
    assert all(level.grad is None for level in real)
    both = [parameter.grad.clone() for parameter in loss.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in both)
    # the projector learns from the real side too
    frozen = [level.detach() for level in fake]
    other = torch.autograd.grad(loss(frozen, real, generator=seeded()), list(loss.parameters()))
    for gradient, expected in zip(other, both, strict=True):
        assert_close64(gradient, expected)


def test_gradcheck_of_the_module():
    loss = build((2,), num_patches=2, num_negatives=2, embed_dim=2)
    fake, real = maps(1, (2,), ((2, 2),), seed=0), maps(1, (2,), ((2, 2),), seed=1)

    def run(fake, *weights):
        named = dict(zip(dict(loss.named_parameters()), weights, strict=True))
        options = {"generator": seeded()}
        return torch.func.functional_call(loss, named, ([fake], real), options)

    parameters = tuple(loss.parameters())
    assert torch.autograd.gradcheck(run, (fake[0].requires_grad_(), *parameters), fast_mode=False)


def test_randomness_comes_from_the_generator():
    loss = build()
    fake, real = maps(seed=0), maps(seed=1)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = loss(fake, real, generator=seeded(3))
    assert_equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert_equal(loss(fake, real, generator=seeded(3)), first)
    assert not torch.equal(loss(fake, real, generator=seeded(4)), first)
    torch.manual_seed(3)
    default = loss(fake, real)
    torch.manual_seed(3)
    assert_equal(loss(fake, real), default)


def test_samples_draw_different_positions():
    positions = draw_positions(torch.empty(2, 1, 16, 16), 8, seeded())
    assert not torch.equal(positions[0], positions[1])


def test_empty_batch_costs_nothing():
    loss = build()
    fake = [level.requires_grad_() for level in maps(0)]
    value = loss(fake, maps(0))
    value.backward()
    assert value == 0
    assert all((parameter.grad == 0).all() for parameter in loss.parameters())


def test_default_projector_is_the_papers():
    with torch.device("meta"):
        loss = PatchInfoNCE([256, 512])
    for level, width in enumerate((256, 512)):
        convs = [layer for layer in loss.convs[level] if isinstance(layer, torch.nn.Conv2d)]
        linears = [layer for layer in loss.mlps[level] if isinstance(layer, torch.nn.Linear)]
        assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(width, width)] * 3
        assert [(x.in_features, x.out_features) for x in linears] == [(width, 256), (256, 256)]
    assert (loss.num_patches, loss.num_negatives, loss.temperature) == (128, 128, 0.3)
    names = set(loss.state_dict())
    # no parameter appears at the first forward
    with torch.device("meta"):
        features = [torch.empty(2, 256, 9, 8), torch.empty(2, 512, 5, 4)]
        assert loss(features, features).shape == ()
    assert set(loss.state_dict()) == names


def test_state_and_layouts():
    loss = build()
    fake, real = maps(seed=0), maps(seed=1)
    expected = loss(fake, real, generator=seeded())
    other = build()
    other.load_state_dict(loss.state_dict())
    assert_equal(other.eval()(fake, real, generator=seeded()), expected)
    assert_equal(copy.deepcopy(loss)(tuple(fake), tuple(real), generator=seeded()), expected)
    last = [[x.to(memory_format=torch.channels_last) for x in levels] for levels in (fake, real)]
    assert_close64(loss(*last, generator=seeded()), expected)
    strided = [[x.mT.contiguous().mT for x in levels] for levels in (fake, real)]
    assert_close64(loss(*strided, generator=seeded()), expected)
    assert all(x._version == 0 for x in (*fake, *real))


@pytest.mark.parametrize("channels_last", [False, True])
def test_pixels_are_gathered_by_row_major_position(channels_last):
    features = torch.arange(24.0).view(1, 2, 3, 4)
    if channels_last:
        features = features.to(memory_format=torch.channels_last)
    pixels = gather_pixels(features, torch.tensor([[5, 0]]))
    assert pixels.tolist() == [[[5, 17], [0, 12]]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    loss = build(dtype=torch.float32)
    fake, real = maps(seed=0, dtype=torch.float32), maps(seed=1, dtype=torch.float32)
    expected = loss(fake, real, generator=seeded())
    with torch.autocast("cpu", dtype=dtype):
        value = loss(fake, real, generator=seeded())
    value.backward()
    assert value.dtype == torch.float32
    # cosines of bfloat16 embeddings are off by about 1 %, divided by a temperature of 0.3
    assert abs(value - expected) < 0.1 * expected
    assert all(parameter.grad.isfinite().all() for parameter in loss.parameters())
    # features of the size of float16's largest number
    large = [6e4 * level.sign().to(dtype) for level in fake]
    flat = build(dtype=dtype, num_conv_blocks=0)
    with torch.no_grad():
        for mlp in flat.mlps:
            mlp[0].weight.mul_(0.1)
    assert flat(large, large, generator=seeded()).isfinite()


@pytest.mark.parametrize(
    ("error", "parts", "position", "change"),
    [
        pytest.param(DTypeError, ["queries", "ndarray"], 0, lambda x: x.numpy(), id="array"),
        pytest.param(DTypeError, ["negatives", "NoneType"], 2, lambda x: None, id="none"),
        pytest.param(InputError, ["queries", "(B, D)"], 0, lambda x: x[0], id="rank-1"),
        pytest.param(
            InputError, ["positives", "B=3", "(1, 4)"], 1, lambda x: x[:1], id="no-broadcast"
        ),
        pytest.param(InputError, ["positives", "D=4"], 1, lambda x: x[:, :2], id="width"),
        pytest.param(
            InputError, ["negatives", "(N, D=4)"], 2, lambda x: x[:, :2], id="negative-width"
        ),
        pytest.param(InputError, ["negatives", "B=3"], 2, lambda x: x[None], id="negative-sets"),
        pytest.param(InputError, ["negatives", "(0, 4)"], 2, lambda x: x[:0], id="no-negatives"),
        pytest.param(DTypeError, ["queries", "int64"], 0, lambda x: x.long(), id="integer"),
        pytest.param(InputError, ["positives", "meta"], 1, lambda x: x.to("meta"), id="device"),
        pytest.param(InputError, ["negatives", "dense"], 2, lambda x: x.to_sparse(), id="sparse"),
    ],
)
def test_bad_tensors(error, parts, position, change):
    case = make()
    case[position] = change(case[position])
    with pytest.raises(error) as caught:
        info_nce(*case)
    assert_message(caught.value, "info_nce: ", "; got ", *parts)


BAD_TEMPERATURES = [
    pytest.param(InputError, ["temperature", "> 0", "got 0"], {"temperature": 0}, id="zero"),
    pytest.param(InputError, ["temperature", "-0.3"], {"temperature": -0.3}, id="negative"),
    pytest.param(InputError, ["temperature", "nan"], {"temperature": float("nan")}, id="nan"),
    pytest.param(InputError, ["temperature", "inf"], {"temperature": float("inf")}, id="inf"),
    pytest.param(DTypeError, ["temperature", "bool"], {"temperature": True}, id="bool"),
    pytest.param(DTypeError, ["temperature", "str"], {"temperature": "0.3"}, id="string"),
    pytest.param(DTypeError, ["normalize", "int"], {"normalize": 1}, id="normalize-int"),
]


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        *BAD_TEMPERATURES,
        pytest.param(
            InputError, ["reduction", "'none'", "'avg'"], {"reduction": "avg"}, id="reduction"
        ),
    ],
)
def test_bad_options(error, parts, options):
    with pytest.raises(error) as caught:
        info_nce(*make(), **options)
    assert_message(caught.value, "info_nce: ", "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        *BAD_TEMPERATURES,
        pytest.param(InputError, ["channels", "empty"], {"channels": []}, id="no-levels"),
        pytest.param(InputError, ["channels[1]", "0"], {"channels": [2, 0]}, id="zero-width"),
        pytest.param(DTypeError, ["channels", "int"], {"channels": 3}, id="channels-int"),
        pytest.param(InputError, ["num_patches", "0"], {"num_patches": 0}, id="no-patches"),
        pytest.param(
            InputError, ["num_patches", "-5"], {"num_patches": -5}, id="negative-patches"
        ),
        pytest.param(
            DTypeError, ["num_patches", "True"], {"num_patches": True}, id="bool-patches"
        ),
        pytest.param(DTypeError, ["num_patches", "2.0"], {"num_patches": 2.0}, id="float-patches"),
        pytest.param(InputError, ["num_negatives", "0"], {"num_negatives": 0}, id="no-negatives"),
        pytest.param(InputError, ["embed_dim", "0"], {"embed_dim": 0}, id="no-width"),
        pytest.param(InputError, ["num_conv_blocks", "-1"], {"num_conv_blocks": -1}, id="blocks"),
    ],
)
def test_bad_arguments(error, parts, options):
    with pytest.raises(error) as caught:
        PatchInfoNCE(**{"channels": [3, 2], **options})
    assert_message(caught.value, "PatchInfoNCE: ", "; got ", *parts)


@pytest.mark.parametrize(
    ("error", "parts", "change"),
    [
        pytest.param(
            DTypeError, ["fake_features", "Tensor"], lambda f, r: (f[0], r), id="one-map"
        ),
        pytest.param(
            InputError, ["fake_features", "2 maps", "got 1"], lambda f, r: (f[:1], r), id="levels"
        ),
        pytest.param(
            InputError,
            ["real_features", "2 maps", "got 3"],
            lambda f, r: (f, [*r, r[0]]),
            id="more",
        ),
        pytest.param(
            InputError, ["fake_features[1]", "C=2"], lambda f, r: ([f[0], f[0]], r), id="channels"
        ),
        pytest.param(
            InputError, ["real_features[0]", "B=2"], lambda f, r: (f, [r[0][:1], r[1]]), id="batch"
        ),
        pytest.param(
            InputError,
            ["real_features[1]", "H=2, W=3", "(2, 2, 2, 2)"],
            lambda f, r: (f, [r[0], r[1][..., :2]]),
            id="size",
        ),
        pytest.param(
            InputError,
            ["fake_features[0]", "empty"],
            lambda f, r: ([f[0][:, :, :0], f[1]], r),
            id="empty",
        ),
        pytest.param(
            DTypeError,
            ["real_features[0]", "uint8"],
            lambda f, r: (f, [r[0].byte(), r[1]]),
            id="integer",
        ),
        pytest.param(
            InputError,
            ["real_features[1]", "meta"],
            lambda f, r: (f, [r[0], r[1].to("meta")]),
            id="device",
        ),
    ],
)
def test_bad_maps(error, parts, change):
    with pytest.raises(error) as caught:
        build()(*change(maps(seed=0), maps(seed=1)))
    assert_message(caught.value, "PatchInfoNCE: ", "; got ", *parts)


def test_bad_generator():
    with pytest.raises(DTypeError, match=r"PatchInfoNCE: generator must be .*; got int"):
        build()(maps(), maps(), generator=0)


@pytest.mark.parametrize("case", golden_cases("g_eq5_paper_eq"))
@pytest.mark.parametrize("suffix", ["", "_l2"])
def test_golden_equation_5(case, suffix):
    golden = Golden(case)
    inputs = [golden.f64(key).requires_grad_() for key in ("v", "v_pos", "v_neg")]
    options = {"temperature": golden.f64("tau").item(), "normalize": bool(suffix)}
    assert_golden64(info_nce(*inputs, **options, reduction="none"), golden, f"loss{suffix}")
    loss = info_nce(*inputs, **options)
    assert_golden64(loss, golden, f"loss{suffix}_mean")
    loss.backward()
    for key, value in zip(("v", "v_pos", "v_neg"), inputs, strict=True):
        assert_golden64(value.grad, golden, f"grad_{key}{suffix}")


@pytest.mark.parametrize("case", golden_cases("g_eq5_multiscale_paper_eq"))
def test_golden_sum_over_scales(case):
    golden = Golden(case)
    temperature = golden.f64("tau").item()
    fakes = [golden.f64(f"Hg{level}").requires_grad_() for level in range(3)]
    reals = [golden.f64(f"Hx{level}").requires_grad_() for level in range(3)]
    losses, cosines = [], []
    for level, (fake, real) in enumerate(zip(fakes, reals, strict=True)):
        own, others = golden.tensor(f"q_idx{level}"), golden.tensor(f"n_idx{level}")
        inputs = (
            gather_pixels(fake, own).flatten(0, 1),
            gather_pixels(real, own).flatten(0, 1),
            gather_pixels(real, others.flatten(1)).unflatten(1, others.shape[1:]).flatten(0, 1),
        )
        losses.append(info_nce(*inputs, temperature=temperature, normalize=False))
        cosines.append(info_nce(*inputs, temperature=temperature))
    assert_golden64(torch.stack(losses), golden, "scale_loss")
    total = torch.stack(losses).sum()
    assert_golden64(total, golden, "total")
    assert_golden64(torch.stack(cosines).sum(), golden, "total_l2")
    total.backward()
    for level in range(3):
        assert_golden64(fakes[level].grad, golden, f"grad_Hg{level}")
        assert_golden64(reals[level].grad, golden, f"grad_Hx{level}")


def cut_loss(queries, keys, images, temperature):
    """CUT's loss from ours: its diagonal stays in the denominator, with the logit -10 / T."""
    losses = []
    for query, key in zip(queries.chunk(images), keys.chunk(images), strict=True):
        count = len(query)
        others = torch.stack([key[torch.arange(count) != row] for row in range(count)])
        ours = info_nce(
            query, key, others, temperature=temperature, normalize=False, reduction="none"
        )
        positive = (query * key).sum(1) / temperature
        losses.append(torch.log(ours.exp() + torch.exp(-10 / temperature - positive)))
    return torch.cat(losses)


@pytest.mark.parametrize("case", golden_cases("g_cut_patchnce"))
def test_golden_cut_loss(case):
    golden = Golden(case)
    queries = golden.f64("feat_q").requires_grad_()
    options = golden.options
    # with negatives from the whole batch, the batch is one image
    whole = options["nce_includes_all_negatives_from_minibatch"]
    images = 1 if whole else options["batch_size"]
    loss = cut_loss(queries, golden.f64("feat_k"), images, options["nce_T"])
    assert_golden64(loss, golden, "loss")
    assert_golden64(loss.mean(), golden, "loss_mean")
    loss.mean().backward()
    assert_golden64(queries.grad, golden, "grad_feat_q")


@pytest.mark.parametrize("case", golden_cases("g_cut_patchsample"))
def test_golden_cut_patches(case):
    golden = Golden(case)
    options, level, means = golden.options, 0, []
    while f"feat_q{level}" in golden:
        weights = [
            golden.f64(f"param_mlp_{level}.{layer}.{kind}")
            for layer in (0, 2)
            for kind in ("weight", "bias")
        ]
        embeddings = {}
        for side in "qk":
            features = golden.f64(f"feat_{side}{level}")
            positions = golden.tensor(f"ids{level}").expand(len(features), -1)
            x = F.linear(gather_pixels(features, positions), *weights[:2]).relu()
            x = F.linear(x, *weights[2:]).flatten(0, 1)
            # theirs divides by the length plus 1e-7
            x = x / (x.norm(dim=1, keepdim=True) + 1e-7)
            assert_golden64(x, golden, f"emb_{side}{level}")
            embeddings[side] = x
        images = len(golden.f64(f"feat_q{level}"))
        loss = cut_loss(embeddings["q"], embeddings["k"], images, options["nce_T"])
        assert_golden64(loss, golden, f"loss{level}")
        means.append(loss.mean())
        level += 1
    assert_golden64(torch.stack(means).mean(), golden, "total")


@given(st.integers(1, 4), st.integers(1, 3), seeds)
def test_positions_of_a_part_are_those_in_the_whole_batch(parts, each, seed):
    def drawn(batch, shard):
        rng = torch.Generator().manual_seed(seed)
        return draw_positions(torch.zeros(batch, 1, 3, 4), 5, rng, shard)

    whole = drawn(parts * each, (0, 1))
    for index in range(parts):
        assert_equal(drawn(each, (index, parts)), whole[index::parts])


def test_the_loss_of_a_batch_is_the_mean_of_its_parts():
    torch.manual_seed(0)
    loss = PatchInfoNCE([4], embed_dim=3, num_patches=2, num_negatives=3).double()
    fake, real = vectors(6, 4, 3, 3, seed=1), vectors(6, 4, 3, 3, seed=2)

    def value(rows, shard=(0, 1)):
        rng = torch.Generator().manual_seed(0)
        return loss([fake[rows]], [real[rows]], generator=rng, shard=shard)

    parts = [value(slice(index, None, 3), (index, 3)) for index in range(3)]
    assert_close64(torch.stack(parts).mean(), value(slice(None)))


@pytest.mark.parametrize(
    ("shard", "error", "part"),
    [
        ((1, 1), InputError, "shard[1]"),
        ((-1, 2), InputError, "shard[0]"),
        ((0.0, 2), DTypeError, "shard[0]"),
    ],
)
def test_a_shard_must_be_one_of_its_parts(shard, error, part):
    maps = [vectors(1, 4, 3, 3)]
    with pytest.raises(error) as caught:
        PatchInfoNCE([4]).double()(maps, maps, shard=shard)
    assert_message(caught.value, "PatchInfoNCE: ", part)
