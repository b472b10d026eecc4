from __future__ import annotations

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch.nn import functional as F

from dpsims.errors import DTypeError, InputError
from dpsims.nn import joined_conv2d
from dpsims.nn._separable import add_upsampled_conv2d, is_separable_cheaper

seeds = st.integers(0, 2**16)
sides = st.integers(1, 9)
kernels = st.sampled_from([1, 3, 5])


def maps(*size, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def draw_labels(*size, num_classes=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, size, generator=generator)
    labels[..., 0, 0] = 255
    return labels


def oracle(parts, weight, bias=None, num_classes=3):
    """Everything at full size, joined, then one convolution."""
    size = max(p.shape[-2] for p in parts), max(p.shape[-1] for p in parts)
    whole = []
    for part in parts:
        if part.is_floating_point():
            whole.append(F.interpolate(part, size=size, mode="bilinear"))
        else:
            whole.append((part[:, None] == torch.arange(num_classes).view(-1, 1, 1)).to(weight))
    return F.conv2d(torch.cat(whole, 1), weight, bias, padding=weight.shape[-1] // 2)


# relations


@given(small=st.tuples(sides, sides), full=st.tuples(sides, sides), kernel=kernels, seed=seeds)
def test_the_low_rank_product_is_the_convolution_of_the_enlarged_map(small, full, kernel, seed):
    # whichever is cheaper: also maps that shrink, and kernels wider than the map
    base, value = maps(2, 4, *full, seed=seed), maps(2, 3, *small, seed=seed + 1)
    weight = maps(4, 3, kernel, kernel, seed=seed + 2)
    enlarged = F.interpolate(value, size=full, mode="bilinear")
    expected = base + F.conv2d(enlarged, weight, padding=kernel // 2)
    assert_close64(add_upsampled_conv2d(base, value, weight), expected, scale=10)
    last = base.to(memory_format=torch.channels_last)
    assert_close64(add_upsampled_conv2d(last, value, weight), expected, scale=10)
    one = base[:1]
    alone = one + F.conv2d(enlarged, weight, padding=kernel // 2)
    assert_close64(add_upsampled_conv2d(one, value, weight), alone, scale=10)


@given(
    size=st.tuples(st.integers(2, 16), st.integers(2, 16)),
    small=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    kernel=kernels,
    seed=seeds,
    kinds=st.lists(st.sampled_from("fsl"), min_size=1, max_size=4),
)
def test_joining_is_concatenation(size, small, kernel, seed, kinds):
    # the size is that of the largest map; at most one label map
    kinds = [k for i, k in enumerate(kinds) if k != "l" or "l" not in kinds[:i]]
    kinds = kinds if set(kinds) & set("fl") else [*kinds, "f"]
    make = {
        "f": lambda i: maps(2, 2, *size, seed=seed + i),
        "s": lambda i: maps(2, 12, *small, seed=seed + i),
        "l": lambda i: draw_labels(2, *size, seed=seed + i),
    }
    parts = [make[kind](i) for i, kind in enumerate(kinds)]
    channels = sum({"f": 2, "s": 12, "l": 3}[kind] for kind in kinds)
    weight, bias = maps(4, channels, kernel, kernel, seed=seed), maps(4, seed=seed)
    found = joined_conv2d(parts, weight, bias)
    assert_close64(found, oracle(parts, weight, bias), scale=100)
    assert found.is_contiguous()


def test_both_forms_are_chosen_by_size():
    # 64 channels of 8x8 under a 3x3 kernel, at 256x256: 24 multiplications instead of 576
    assert is_separable_cheaper(64, 3, (8, 8), (256, 256))
    assert is_separable_cheaper(64, 3, (8, 8), (16, 16))
    assert is_separable_cheaper(64, 1, (1, 1), (256, 256))
    assert not is_separable_cheaper(64, 3, (16, 16), (16, 16))
    assert not is_separable_cheaper(8, 1, (8, 8), (64, 64))
    assert not is_separable_cheaper(2, 3, (128, 128), (256, 256))


def test_a_vector_is_the_same_map_everywhere():
    vector, fine = maps(2, 9, 1, 1), maps(2, 2, 7, 5)
    weight = maps(4, 11, 3, 3)
    expected = F.conv2d(torch.cat((vector.expand(-1, -1, 7, 5), fine), 1), weight, padding=1)
    assert_close64(joined_conv2d((vector, fine), weight), expected, scale=10)


@pytest.mark.parametrize("sizes", [((8, 9), (2, 3)), ((3, 3), (1, 1)), ((12, 12), (3, 3))])
def test_gradients(sizes):
    full, small = sizes
    parts = [maps(1, 1, *full), maps(1, 12, *small, seed=1)]
    weight, bias = maps(2, 13, 3, 3, seed=2), maps(2)
    inputs = [x.requires_grad_() for x in (*parts, weight, bias)]
    assert torch.autograd.gradcheck(lambda a, b, w, c: joined_conv2d((a, b), w, c), inputs)
    if full == (3, 3):
        assert torch.autograd.gradgradcheck(lambda a, b, w, c: joined_conv2d((a, b), w, c), inputs)


def test_gradients_of_a_label_map():
    labels, vector = draw_labels(1, 4, 5), maps(1, 6, 1, 1)
    inputs = [x.requires_grad_() for x in (vector, maps(2, 9, 3, 3), maps(2))]
    assert torch.autograd.gradcheck(lambda v, w, b: joined_conv2d((v, labels), w, b), inputs)


# layouts and dtypes


def test_layouts_and_no_writing():
    fine, coarse = maps(2, 3, 12, 10), maps(2, 8, 3, 2, seed=1)
    weight = maps(4, 11, 3, 3)
    before = [x.clone() for x in (fine, coarse, weight)]
    expected = joined_conv2d((fine, coarse), weight)
    last = torch.channels_last
    found = joined_conv2d((fine.to(memory_format=last), coarse), weight.to(memory_format=last))
    assert found.is_contiguous(memory_format=last)
    assert_close64(found, expected, scale=10)
    crooked = fine.mT.contiguous().mT, coarse.mT.contiguous().mT
    assert_close64(joined_conv2d(crooked, weight), expected, scale=10)
    for one, other in zip(before, (fine, coarse, weight), strict=True):
        assert_equal(one, other)


def test_empty_batches_and_nan():
    weight = maps(4, 11, 3, 3)
    assert joined_conv2d((maps(0, 3, 12, 10), maps(0, 8, 3, 2)), weight).shape == (0, 4, 12, 10)
    coarse = maps(2, 8, 3, 2)
    coarse[1, 0, 0, 0] = torch.nan
    found = joined_conv2d((maps(2, 3, 12, 10), coarse), weight)
    assert found[0].isfinite().all()
    assert found[1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_near(dtype):
    parts = maps(2, 3, 12, 10), maps(2, 8, 3, 2, seed=1)
    weight = maps(4, 11, 3, 3)
    expected = joined_conv2d(parts, weight)
    half = joined_conv2d([p.to(dtype) for p in parts], weight.to(dtype))
    assert half.dtype == dtype
    # inputs, weights, two intermediate maps and the sum are rounded
    bound = 6 * torch.finfo(dtype).eps * expected.abs().max()
    assert (half.double() - expected).abs().max() < bound
    with torch.autocast("cpu", torch.bfloat16):
        cast = joined_conv2d([p.float() for p in parts], weight.float())
    bound = 6 * torch.finfo(torch.bfloat16).eps * expected.abs().max()
    assert (cast.double() - expected).abs().max() < bound


@pytest.mark.compile
def test_compiles_whole_and_equal():
    torch._dynamo.reset()
    run = torch.compile(joined_conv2d, fullgraph=True, backend="aot_eager")
    parts = [maps(2, 9, 1, 1), maps(2, 8, 3, 2), draw_labels(2, 12, 10)]
    weight, bias = maps(4, 20, 3, 3), maps(4)
    assert_close64(run(parts, weight, bias), joined_conv2d(parts, weight, bias), scale=10)


# bad inputs

FINE, COARSE, IDS = maps(2, 3, 8, 8), maps(2, 4, 2, 2), draw_labels(2, 8, 8)


@pytest.mark.parametrize(
    ("parts", "channels", "error", "words"),
    [
        pytest.param(FINE, 3, DTypeError, ("list or tuple", "Tensor"), id="one-tensor"),
        pytest.param([], 3, InputError, ("at least one map",), id="none"),
        pytest.param([FINE, "map"], 3, DTypeError, ("maps[1]", "str"), id="str"),
        pytest.param([FINE, COARSE], 8, InputError, ("8 channels", "got 7"), id="channels"),
        pytest.param([FINE, IDS], 3, InputError, ("label map", "got 3"), id="no-class-left"),
        pytest.param([IDS, IDS], 3, InputError, ("one label map",), id="two-label-maps"),
        pytest.param([FINE, COARSE[:1]], 7, InputError, ("maps[1]", "B=2"), id="batch"),
        pytest.param(
            [draw_labels(2, 4, 4), FINE], 6, InputError, ("(4, 4)", "(8, 8)"), id="small-labels"
        ),
        pytest.param([IDS + 3, FINE], 6, InputError, ("[0, 3)",), id="label-out-of-range"),
        pytest.param([IDS.bool(), FINE], 6, DTypeError, ("bool",), id="bool"),
        pytest.param([FINE, COARSE.to("meta")], 7, InputError, ("maps[1]", "meta"), id="device"),
    ],
)
def test_bad_maps(parts, channels, error, words):
    with pytest.raises(error) as caught:
        joined_conv2d(parts, maps(4, channels, 3, 3))
    assert_message(caught.value, "joined_conv2d: maps", *words)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        pytest.param({"weight": maps(4, 3, 2, 2)}, InputError, ("weight", "odd"), id="even"),
        pytest.param({"weight": maps(4, 3, 1, 3)}, InputError, ("weight", "square"), id="oblong"),
        pytest.param({"weight": maps(4, 3)}, InputError, ("weight", "(4, 3)"), id="rank"),
        pytest.param({"bias": maps(5)}, InputError, ("bias", "C=4"), id="bias"),
        pytest.param({"ignore_index": "none"}, DTypeError, ("ignore_index",), id="ignore"),
    ],
)
def test_bad_settings(arguments, error, words):
    arguments = {"weight": maps(4, 3, 3, 3)} | arguments
    with pytest.raises(error) as caught:
        joined_conv2d([FINE], **arguments)
    assert_message(caught.value, "joined_conv2d:", *words)
