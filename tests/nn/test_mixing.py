import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    assert_message,
    golden_cases,
)
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.nn import CrossChannelMixing, CrossScaleMixing, UNetDecoder

CHANNELS, SIZES = (3, 2, 4), ((7, 6), (4, 3), (2, 2))


def maps(channels=CHANNELS, sizes=SIZES, batch=2, seed=0, dtype=torch.float64):
    source = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, width, *size, generator=source, dtype=dtype)
        for width, size in zip(channels, sizes, strict=True)
    ]


def both(channels=CHANNELS, dtype=torch.float64, **options):
    """Channel mixing, then scale mixing."""
    first = CrossChannelMixing(list(channels), **{"out_channels": 2, **options})
    return nn.Sequential(first, CrossScaleMixing(first.channels)).to(dtype)


@st.composite
def pyramids(draw):
    sizes, bound = [], (12, 12)
    for _ in range(draw(st.integers(1, 4))):
        bound = tuple(draw(st.integers(1, limit)) for limit in bound)
        sizes.append(bound)
    return draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes))), sizes


@given(pyramids(), st.booleans(), st.integers(1, 3))
def test_sizes_and_widths(pyramid, expand, width):
    channels, sizes = pyramid
    mix = both(channels, out_channels=width, expand=expand)
    widths = [width * 2**level if expand else width for level in range(len(channels))]
    assert mix[0].channels == widths
    assert mix[1].channels == [widths[0], *widths[:-1]]
    features = maps(channels, sizes, batch=1)
    middle = mix[0](features)
    assert [tuple(x.shape) for x in middle] == [
        (1, width, *size) for width, size in zip(widths, sizes, strict=True)
    ]
    # every result has the size of the next finer map, the finest twice its own
    larger = [tuple(2 * side for side in sizes[0]), *sizes[:-1]]
    assert [tuple(x.shape) for x in mix[1](middle)] == [
        (1, width, *size) for width, size in zip(mix[1].channels, larger, strict=True)
    ]


@given(st.integers(0, 2**16))
def test_affine_and_samples_do_not_meet(seed):
    mix = both()
    first, second = maps(batch=3, seed=seed), maps(batch=3, seed=seed + 1)
    zero = mix([torch.zeros_like(x) for x in first])
    total = mix([2 * x - y for x, y in zip(first, second, strict=True)])
    outs = zip(total, mix(first), mix(second), zero, strict=True)
    for actual, x, y, bias in outs:
        assert_close64(actual - bias, 2 * (x - bias) - (y - bias), scale=10)
    alone = mix([x[1:2] for x in first])
    for single, together in zip(alone, mix(first), strict=True):
        assert_close64(single, together[1:2])


def test_levels_only_flow_from_coarse_to_fine():
    mix = both()
    features = maps()
    before = mix(features)
    for changed in range(3):
        other = [x + (level == changed) for level, x in enumerate(features)]
        after = mix(other)
        same = [torch.equal(x, y) for x, y in zip(before, after, strict=True)]
        assert same == [level > changed for level in range(3)]


@pytest.mark.parametrize("axis", [2, 3])
def test_flips(axis):
    mix, features = both(), maps()
    flipped = mix([x.flip(axis) for x in features])
    for x, y in zip(flipped, mix(features), strict=True):
        assert_close64(x, y.flip(axis))


def oracle_resize(x, height, width):
    """Bilinear with aligned corners: the corner pixels of both grids coincide."""
    for axis, size in ((2, height), (3, width)):
        old = x.shape[axis]
        place = np.arange(size) * ((old - 1) / (size - 1) if size > 1 else 0)
        low = np.minimum(np.floor(place).astype(int), old - 1)
        high = np.minimum(low + 1, old - 1)
        weight = (place - low).reshape([-1 if i == axis else 1 for i in range(4)])
        x = np.take(x, low, axis) * (1 - weight) + np.take(x, high, axis) * weight
    return x


def oracle_conv(x, conv):
    out = np.einsum("oc,bchw->bohw", conv.weight.numpy()[:, :, 0, 0], x)
    return out + conv.bias.numpy()[None, :, None, None]


def test_equals_numpy():
    mix, features = both(), maps()
    middle = [oracle_conv(x.numpy(), conv) for x, conv in zip(features, mix[0].convs, strict=True)]
    for actual, expected in zip(mix[0](features), middle, strict=True):
        assert_close64(actual, torch.from_numpy(expected))
    targets = [(14, 12), *SIZES[:2]]
    below, expected = 0, []
    for level in (2, 1, 0):
        below = oracle_resize(middle[level] + below, *targets[level])
        below = oracle_conv(below, mix[1].convs[level])
        expected.insert(0, below)
    for actual, wanted in zip(mix(features), expected, strict=True):
        assert_close64(actual, torch.from_numpy(wanted))


def test_gradcheck():
    mix = both((1, 2), out_channels=1)
    features = [x.requires_grad_() for x in maps((1, 2), ((3, 2), (2, 1)), batch=1)]
    run = lambda *levels: tuple(mix(list(levels)))  # noqa: E731
    assert torch.autograd.gradcheck(run, features, fast_mode=False)


def test_nothing_can_train_it():
    parent = nn.ModuleDict({"mix": both(dtype=torch.float32), "decoder": nn.Conv2d(1, 1, 1)})
    before = {key: value.clone() for key, value in parent["mix"].state_dict().items()}
    parent.requires_grad_(True)
    parent.train()
    assert list(parent["mix"].parameters()) == []
    features = [x.requires_grad_() for x in maps(dtype=torch.float32)]
    sum(x.square().sum() for x in parent["mix"](features)).backward()
    torch.optim.SGD(parent.parameters(), lr=1.0).step()
    assert all(x.grad.abs().max() > 0 for x in features)
    for key, value in parent["mix"].state_dict().items():
        assert not value.requires_grad
        assert_equal(value, before[key])
    no_gradient = parent["mix"]([x.detach() for x in features])
    assert not any(x.requires_grad for x in no_gradient)


def test_random_weights_are_saved():
    mix, other = both(), both()
    features = maps()
    expected = mix(features)
    assert not torch.equal(other(features)[0], expected[0])
    assert set(mix.state_dict()) == {
        f"{stage}.convs.{level}.{kind}"
        for stage in (0, 1)
        for level in range(3)
        for kind in ("weight", "bias")
    }
    other.load_state_dict(mix.state_dict())
    for run in (other, copy.deepcopy(mix).eval()):
        for x, y in zip(run(tuple(features)), expected, strict=True):
            assert_equal(x, y)
    assert all(x._version == 0 for x in features)


def test_weights_have_kaiming_scale():
    # uniform within 1 / sqrt(in_channels): a variance of a third of the bound's square
    conv = CrossChannelMixing([400], out_channels=300).convs[0]
    bound = 1 / math.sqrt(400)
    for value in (conv.weight, conv.bias):
        assert value.abs().max() <= bound
        assert value.abs().max() > 0.9 * bound
    # 120,000 draws: the sample variance is off by 0.3 % or so
    assert conv.weight.var().item() == pytest.approx(bound**2 / 3, rel=0.02)


def test_stands_between_a_backbone_and_a_decoder():
    mix = both(dtype=torch.float32)
    decoder = UNetDecoder(mix[1].channels, [2, 4, 8], 5, full_res_channels=2, head_channels=3)
    images = torch.randn(2, 3, 27, 23)
    assert decoder(images, mix(maps(dtype=torch.float32))).shape == (2, 5, 27, 23)


def test_layouts_dtypes_and_empty_batches():
    mix, features = both(), maps()
    expected = mix(features)
    last = [x.to(memory_format=torch.channels_last) for x in features]
    strided = [x.mT.contiguous().mT for x in features]
    for variant in (last, strided):
        for x, y in zip(mix(variant), expected, strict=True):
            assert_close64(x, y)
    assert [len(x) for x in mix([x[:0] for x in features])] == [0, 0, 0]
    shapes = [tuple(x.shape) for x in both().to("meta")([x.to("meta") for x in features])]
    assert shapes == [tuple(x.shape) for x in expected]
    single = both(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = single([x.float() for x in features])
    for x, y in zip(mixed, single([x.float() for x in features]), strict=True):
        # two rounded convolutions of a few channels
        assert (x.float() - y).abs().max() <= 0.05 * y.abs().max()
    nan = [x.clone() for x in features]
    nan[2][1, 0, 0, 0] = torch.nan
    assert all(x[1].isnan().any() and x[0].isfinite().all() for x in mix(nan))


@pytest.mark.parametrize(
    ("error", "parts", "options"),
    [
        pytest.param(InputError, ["channels", "empty"], {"channels": []}, id="no-levels"),
        pytest.param(InputError, ["channels[1]", "0"], {"channels": [2, 0]}, id="zero-width"),
        pytest.param(DTypeError, ["channels", "int"], {"channels": 3}, id="channels-int"),
        pytest.param(InputError, ["out_channels", "0"], {"out_channels": 0}, id="no-outputs"),
        pytest.param(DTypeError, ["out_channels", "float"], {"out_channels": 2.0}, id="float"),
        pytest.param(DTypeError, ["expand", "int"], {"expand": 1}, id="expand-int"),
    ],
)
def test_bad_arguments(error, parts, options):
    with pytest.raises(error) as caught:
        CrossChannelMixing(**{"channels": [3, 2], **options})
    assert_message(caught.value, "CrossChannelMixing: ", "; got ", *parts)
    if "channels" in options:
        with pytest.raises(error) as caught:
            CrossScaleMixing(**options)
        assert_message(caught.value, "CrossScaleMixing: ", "; got ", *parts)


@pytest.mark.parametrize("kind", [CrossChannelMixing, CrossScaleMixing])
@pytest.mark.parametrize(
    ("error", "parts", "change"),
    [
        pytest.param(DTypeError, ["features", "Tensor"], lambda f: f[0], id="one-map"),
        pytest.param(InputError, ["features", "3 maps", "got 2"], lambda f: f[:2], id="levels"),
        pytest.param(InputError, ["features[0]", "C=3"], lambda f: f[::-1], id="width"),
        pytest.param(
            InputError, ["features[1]", "B=2"], lambda f: [f[0], f[1][:1], f[2]], id="batch"
        ),
        pytest.param(
            DTypeError, ["features[2]", "int32"], lambda f: [*f[:2], f[2].int()], id="integer"
        ),
        pytest.param(
            DTypeError, ["features[0]", "list"], lambda f: [f[0].tolist(), *f[1:]], id="list"
        ),
        pytest.param(
            InputError, ["features[1]", "empty"], lambda f: [f[0], f[1][..., :0], f[2]], id="empty"
        ),
        pytest.param(
            InputError, ["features[2]", "meta"], lambda f: [*f[:2], f[2].to("meta")], id="device"
        ),
    ],
)
def test_bad_maps(kind, error, parts, change):
    with pytest.raises(error) as caught:
        kind(list(CHANNELS)).double()(change(maps()))
    assert_message(caught.value, f"{kind.__name__}: ", "; got ", *parts)


def test_coarse_before_fine_is_an_error_where_it_matters():
    features = maps((2, 2), ((2, 2), (4, 4)))
    assert len(CrossChannelMixing([2, 2]).double()(features)) == 2
    with pytest.raises(InputError) as caught:
        CrossScaleMixing([2, 2]).double()(features)
    assert_message(
        caught.value, "CrossScaleMixing: features", "fine to coarse", "[(2, 2), (4, 4)]"
    )


@pytest.mark.parametrize("case", golden_cases("f_projected_gan"))
def test_golden_projected_gan(case):
    golden = Golden(case)
    options = golden.options
    mix = both(options["cin"], out_channels=options["cout"], expand=options["expand"])
    assert mix[1].channels == options["out_channels"]
    for stage, name in enumerate(("ccm", "csm.out_conv")):
        for level, conv in enumerate(mix[stage].convs):
            conv.weight.copy_(golden.f64(f"param_layer{level}_{name}.weight"))
            conv.bias.copy_(golden.f64(f"param_layer{level}_{name}.bias"))
    features = [golden.f64(f"feat{level}").requires_grad_() for level in range(4)]
    middle = mix[0](features)
    mixed = mix[1](middle)
    for level in range(4):
        assert_golden64(middle[level], golden, f"ccm{level}")
        assert_golden64(mixed[level], golden, f"csm{level}")
    torch.autograd.backward(mixed, [golden.f64(f"gout{level}") for level in range(4)])
    for level in range(4):
        assert_golden64(features[level].grad, golden, f"grad_feat{level}")
