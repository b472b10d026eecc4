import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_close64, assert_equal, assert_message

from dpsims.errors import DTypeError, InputError
from dpsims.nn import UNetDecoder, spectral_normalize_


def make(channels=(3, 4), num_outputs=2, dtype=torch.float64, **options):
    options = {"full_res_channels": 2, "head_channels": 3, **options}
    reductions = [4 * 2**level for level in range(len(channels))]
    return UNetDecoder(list(channels), reductions, num_outputs, **options).to(dtype)


def inputs(sizes, channels=(3, 4), image=(9, 10), batch=2, dtype=torch.float64, seed=0):
    source = torch.Generator().manual_seed(seed)
    images = torch.randn(batch, 3, *image, generator=source, dtype=dtype)
    features = [
        torch.randn(batch, width, *size, generator=source, dtype=dtype)
        for width, size in zip(channels, sizes, strict=True)
    ]
    return images, features


SIZES = [(5, 4), (3, 2)]


@st.composite
def pyramids(draw):
    """An image size and maps that never grow, of any relation to each other."""
    side = st.integers(1, 20)
    image = draw(st.tuples(side, side))
    sizes, bound = [], image
    for _ in range(draw(st.integers(1, 6))):
        bound = tuple(draw(st.integers(1, limit)) for limit in bound)
        sizes.append(bound)
    channels = draw(st.lists(st.integers(1, 3), min_size=len(sizes), max_size=len(sizes)))
    return image, sizes, channels, draw(st.integers(0, 2**16))


@given(pyramids())
def test_logits_have_the_size_of_the_image_whatever_the_maps(case):
    image, sizes, channels, seed = case
    decoder = make(channels, num_outputs=4, dtype=torch.float32)
    out = decoder(*inputs(sizes, channels, image, batch=1, dtype=torch.float32, seed=seed))
    assert out.shape == (1, 4, *image)
    assert out.isfinite().all()


@pytest.mark.parametrize("image", [(33, 33), (255, 511), (250, 330)])
@pytest.mark.parametrize("rounding", ["floor", "ceil"])
def test_odd_sizes_with_halving_backbones(image, rounding):
    sizes, size = [], image
    for _ in range(5):
        size = tuple((side + (rounding == "ceil")) // 2 for side in size)
        sizes.append(size)
    channels = [1] * 5
    out = make(channels, dtype=torch.float32)(
        *inputs(sizes, channels, image, batch=1, dtype=torch.float32)
    )
    assert out.shape == (1, 2, *image)


@given(st.integers(0, 2**16))
def test_samples_do_not_meet(seed):
    decoder = make()
    images, features = inputs(SIZES, seed=seed, batch=3)
    together = decoder(images, features)
    for index in range(3):
        alone = decoder(images[index, None], [level[index, None] for level in features])
        assert_close64(alone, together[index, None])


@given(st.integers(0, 2**16))
@settings(max_examples=10)
def test_a_pixel_reaches_three_pixels_through_the_full_resolution_path(seed):
    # three 3x3 convolutions lie between the image and the logits
    decoder = make()
    images, features = inputs(SIZES, image=(13, 12), seed=seed)
    changed = images.clone()
    changed[:, :, 6, 5] += 1
    difference = (decoder(changed, features) - decoder(images, features)).abs().amax((0, 1))
    reached = torch.zeros(13, 12, dtype=torch.bool)
    reached[3:10, 2:9] = True
    assert (difference[~reached] == 0).all()
    assert difference[6, 5] > 0


def test_closing_one_path_leaves_the_other():
    decoder = make()
    images, features = inputs(SIZES)
    others = [torch.randn_like(level) for level in features]
    no_features, no_image = copy.deepcopy(decoder), copy.deepcopy(decoder)
    with torch.no_grad():
        for conv in (no_features.fuse.body[0], no_features.fuse.shortcut):
            conv.weight[:, 2:] = 0
        for conv in (no_image.fuse.body[0], no_image.fuse.shortcut):
            conv.weight[:, :2] = 0
    assert_equal(no_features(images, features), no_features(images, others))
    assert_equal(no_image(images, features), no_image(images.flip(0), features))
    assert not torch.equal(decoder(images, features), decoder(images, others))


@pytest.mark.parametrize("axis", [2, 3])
def test_flipped_inputs_and_kernels_flip_the_logits(axis):
    # 5 from 3 and 9 from 5: resizing that favours one side would show
    decoder = make()
    images, features = inputs([(5, 5), (3, 3)], image=(9, 9))
    flipped = copy.deepcopy(decoder)
    with torch.no_grad():
        for parameter in flipped.parameters():
            if parameter.ndim == 4:
                parameter.copy_(parameter.flip(axis))
    out = flipped(images.flip(axis), [level.flip(axis) for level in features])
    assert_close64(out, decoder(images, features).flip(axis))


def oracle_conv(x, weight, bias=None):
    """Convolution as a sum over the kernel's taps, in numpy."""
    pad = weight.shape[-1] // 2
    x = np.pad(x, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    height, width = x.shape[-2] - 2 * pad, x.shape[-1] - 2 * pad
    out = 0 if bias is None else bias[None, :, None, None]
    for i in range(weight.shape[-2]):
        for j in range(weight.shape[-1]):
            taps = x[:, :, i : i + height, j : j + width]
            out = out + np.einsum("oc,bchw->bohw", weight[:, :, i, j], taps)
    return out


def oracle_block(x, state, name):
    y = x
    for layer in (0, 2):
        y = oracle_conv(
            y, state[f"{name}.body.{layer}.weight"], state[f"{name}.body.{layer}.bias"]
        )
        y = np.where(y > 0, y, 0.2 * y)
    shortcut = state.get(f"{name}.shortcut.weight")
    return y + (x if shortcut is None else oracle_conv(x, shortcut))


def oracle_resize(x, height, width):
    rows = np.floor((np.arange(height) + 0.5) * x.shape[-2] / height).astype(int)
    columns = np.floor((np.arange(width) + 0.5) * x.shape[-1] / width).astype(int)
    return x[:, :, rows][:, :, :, columns]


@pytest.mark.parametrize("widths", [None, [4, 3, 5]])
def test_equals_numpy(widths):
    channels = (3, 4, 3)
    decoder = make(channels, widths=widths)
    sizes = [(5, 4), (3, 2), (1, 1)]
    images, features = inputs(sizes, channels, (9, 10))
    state = {key: value.detach().numpy() for key, value in decoder.state_dict().items()}
    x = oracle_block(features[2].numpy(), state, "blocks.2")
    for level in (1, 0):
        x = np.concatenate([features[level].numpy(), oracle_resize(x, *sizes[level])], axis=1)
        x = oracle_block(x, state, f"blocks.{level}")
    detail = oracle_block(images.numpy(), state, "full_res.0")
    detail = oracle_block(detail, state, "full_res.1")
    x = oracle_block(np.concatenate([detail, oracle_resize(x, 9, 10)], axis=1), state, "fuse")
    expected = oracle_conv(x, state["head.weight"], state["head.bias"])
    assert_close64(decoder(images, features), torch.from_numpy(expected))


def test_gradcheck():
    decoder = make((1, 2), num_outputs=1, full_res_channels=1, head_channels=2)
    images, features = inputs([(2, 2), (1, 1)], (1, 2), (3, 4), batch=1)
    tensors = [tensor.requires_grad_() for tensor in (images, *features)]
    parameters = list(decoder.parameters())

    def run(images, fine, coarse, *weights):
        named = dict(zip(dict(decoder.named_parameters()), weights, strict=True))
        return torch.func.functional_call(decoder, named, (images, [fine, coarse]))

    assert torch.autograd.gradcheck(run, (*tensors, *parameters), fast_mode=False)


def test_gradients_reach_every_input_and_parameter_twice():
    # a gradient penalty differentiates the gradient
    decoder = make()
    images, features = inputs(SIZES)
    tensors = [tensor.requires_grad_() for tensor in (images, *features)]
    first = torch.autograd.grad(
        decoder(images, features).square().sum(), tensors, create_graph=True
    )
    sum(gradient.square().sum() for gradient in first).backward()
    for name, parameter in decoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name
    assert all(tensor.grad.abs().max() > 0 for tensor in tensors)


def test_default_widths_are_the_papers():
    channels = [192, 384, 768, 1536]
    with torch.device("meta"):
        decoder = UNetDecoder(channels, [4, 8, 16, 32], 151)
    assert [block.body[2].out_channels for block in decoder.blocks] == channels
    assert [block.body[2].out_channels for block in decoder.full_res] == [128, 128]
    assert decoder.fuse.body[0].in_channels == 192 + 128
    assert (decoder.head.in_channels, decoder.head.out_channels) == (256, 151)
    assert decoder.head.kernel_size == (1, 1)
    assert (decoder.channels, decoder.reductions) == (channels, [4, 8, 16, 32])


def test_meta_tensors():
    with torch.device("meta"):
        decoder = make(dtype=torch.float32)
        features = [torch.empty(2, 3, 75, 75), torch.empty(2, 4, 38, 38)]
        assert decoder(torch.empty(2, 3, 299, 300), features).shape == (2, 2, 299, 300)


def test_equal_reductions_and_equal_sizes():
    decoder = UNetDecoder([2, 2], [16, 16], 1, full_res_channels=1, head_channels=1).double()
    images, features = inputs([(2, 2), (2, 2)], (2, 2))
    assert decoder(images, features).shape == (2, 1, 9, 10)


def test_empty_batch():
    decoder = make()
    images, features = inputs(SIZES)
    out = decoder(images[:0], [level[:0] for level in features])
    assert out.shape == (0, 2, 9, 10)


def test_nan_is_not_hidden():
    decoder = make()
    images, features = inputs(SIZES)
    images[0, 0, 4, 4] = torch.nan
    out = decoder(images, features)
    assert out[0, :, 4, 4].isnan().all()
    assert out[1].isfinite().all()


def test_inputs_are_left_alone_and_state_round_trips():
    decoder = make()
    images, features = inputs(SIZES)
    before = [tensor.clone() for tensor in (images, *features)]
    expected = decoder(images, features)
    for tensor, copied in zip((images, *features), before, strict=True):
        assert tensor._version == 0
        assert_equal(tensor, copied)
    other = make()
    other.load_state_dict(decoder.state_dict())
    assert_equal(other(images, features), expected)
    assert_equal(copy.deepcopy(decoder).eval()(images, tuple(features)), expected)


def test_memory_layouts():
    decoder = make()
    images, features = inputs(SIZES)
    expected = decoder(images, features)
    last = torch.channels_last
    out = copy.deepcopy(decoder).to(memory_format=last)(
        images.to(memory_format=last), [level.to(memory_format=last) for level in features]
    )
    assert out.is_contiguous(memory_format=last)
    assert_close64(out, expected)
    strided = [tensor.mT.contiguous().mT for tensor in (images, *features)]
    assert_close64(decoder(strided[0], strided[1:]), expected)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    expanded = [one.expand(2, width, *size) for width, size in zip((3, 4), SIZES, strict=True)]
    dense = [level.contiguous() for level in expanded]
    assert_close64(decoder(images, expanded), decoder(images, dense))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    decoder = make(dtype=torch.float32)
    images, features = inputs(SIZES, dtype=torch.float32)
    expected = decoder(images, features)
    with torch.autocast("cpu", dtype=dtype):
        mixed = decoder(images, [features[0].to(dtype), features[1]])
    # eight residual layers of a few products each: one percent of the largest logit or so
    bound = 0.05 * expected.abs().max()
    assert (mixed.float() - expected).abs().max() < bound
    half = decoder.to(dtype)(images.to(dtype), [level.to(dtype) for level in features])
    assert half.dtype == dtype
    assert (half.float() - expected).abs().max() < bound


@pytest.mark.parametrize(
    ("error", "parts", "change"),
    [
        pytest.param(InputError, ["channels", "empty"], {"channels": []}, id="no-levels"),
        pytest.param(InputError, ["channels[1]", "0"], {"channels": [1, 0]}, id="zero-width"),
        pytest.param(DTypeError, ["channels[0]", "2.0"], {"channels": [2.0, 1]}, id="float-width"),
        pytest.param(DTypeError, ["channels", "int"], {"channels": 4}, id="channels-int"),
        pytest.param(
            InputError, ["reductions", "(2", "got 3"], {"reductions": [2, 4, 8]}, id="lengths"
        ),
        pytest.param(
            InputError, ["reductions", "[8, 4]"], {"reductions": [8, 4]}, id="coarse-first"
        ),
        pytest.param(DTypeError, ["reductions"], {"reductions": None}, id="reductions-none"),
        pytest.param(InputError, ["widths", "got 1"], {"widths": [3]}, id="widths-length"),
        pytest.param(InputError, ["widths[0]", "-1"], {"widths": [-1, 3]}, id="widths-negative"),
        pytest.param(InputError, ["num_outputs", "0"], {"num_outputs": 0}, id="no-outputs"),
        pytest.param(
            DTypeError, ["num_outputs", "True"], {"num_outputs": True}, id="bool-outputs"
        ),
        pytest.param(DTypeError, ["full_res_channels"], {"full_res_channels": "8"}, id="string"),
        pytest.param(InputError, ["head_channels", "-3"], {"head_channels": -3}, id="negative"),
    ],
)
def test_bad_arguments(error, parts, change):
    arguments = {"channels": [3, 4], "reductions": [4, 8], "num_outputs": 2, **change}
    with pytest.raises(error) as caught:
        UNetDecoder(**arguments)
    assert_message(caught.value, "UNetDecoder: ", "; got ", *parts)


def bad(images=None, features=None):
    def build():
        good_images, good_features = inputs(SIZES)
        return (
            good_images if images is None else images(good_images),
            good_features if features is None else features(good_features),
        )

    return build


@pytest.mark.parametrize(
    ("error", "parts", "build"),
    [
        pytest.param(DTypeError, ["images", "ndarray"], bad(lambda x: x.numpy()), id="array"),
        pytest.param(DTypeError, ["images", "list"], bad(lambda x: x.tolist()), id="list"),
        pytest.param(InputError, ["images", "(B, C=3, H, W)"], bad(lambda x: x[0]), id="rank-3"),
        pytest.param(InputError, ["images", "C=3"], bad(lambda x: x[:, :1]), id="grey"),
        pytest.param(InputError, ["images", "empty"], bad(lambda x: x[:, :, :0]), id="no-rows"),
        pytest.param(DTypeError, ["images", "uint8"], bad(lambda x: x.byte()), id="integer-image"),
        pytest.param(
            DTypeError, ["features", "Tensor"], bad(features=lambda f: f[0]), id="one-map"
        ),
        pytest.param(
            InputError,
            ["features", "2 maps", "got 1"],
            bad(features=lambda f: f[:1]),
            id="too-few",
        ),
        pytest.param(
            InputError, ["features[1]", "C=4"], bad(features=lambda f: [f[0], f[0]]), id="width"
        ),
        pytest.param(
            InputError,
            ["features[0]", "B=2", "1, 3"],
            bad(features=lambda f: [f[0][:1], f[1]]),
            id="batch",
        ),
        pytest.param(
            DTypeError,
            ["features[1]", "int64"],
            bad(features=lambda f: [f[0], f[1].long()]),
            id="integer-map",
        ),
        pytest.param(
            InputError,
            ["features[1]", "empty"],
            bad(features=lambda f: [f[0], f[1][..., :0]]),
            id="empty-map",
        ),
        pytest.param(
            InputError,
            ["features[0]", "device", "meta"],
            bad(features=lambda f: [f[0].to("meta"), f[1]]),
            id="device",
        ),
        pytest.param(
            InputError,
            ["features[0]", "dense"],
            bad(features=lambda f: [f[0].to_sparse(), f[1]]),
            id="sparse",
        ),
        pytest.param(
            InputError,
            ["features", "fine to coarse", "(3, 2), (5, 4)"],
            bad(features=lambda f: [f[0][..., :3, :2], f[1].repeat(1, 1, 2, 2)[..., :5, :4]]),
            id="order",
        ),
    ],
)
def test_bad_inputs(error, parts, build):
    with pytest.raises(error) as caught:
        make()(*build())
    assert_message(caught.value, "UNetDecoder: ", "; got ", *parts)


# keeping less for the backward pass


def gradients_of_two_passes(checkpoint, *, normed=True, autocast=False, training=True):
    """Logits, all gradients and all buffers after D(real), D(fake) and one backward pass."""
    torch.manual_seed(3)
    decoder = make(dtype=torch.float32, checkpoint=checkpoint)
    if normed:
        spectral_normalize_(decoder)
    decoder.train(training)
    found = []
    for repeat in range(2):
        leaves, loss = [], 0.0
        for seed in (2 * repeat, 2 * repeat + 1):
            images, features = inputs(SIZES, dtype=torch.float32, seed=seed)
            leaves += [images.requires_grad_(), *(f.requires_grad_() for f in features)]
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                out = decoder(images, features)
            found.append(out.detach())
            loss = loss + (out.float() * (seed + 1)).square().mean()
        loss.backward()
        found += [leaf.grad for leaf in leaves]
    return found + [p.grad for p in decoder.parameters()] + [b.clone() for b in decoder.buffers()]


@pytest.mark.parametrize(
    "options",
    [{}, {"normed": False}, {"autocast": True}, {"training": False}],
    ids=["spectral", "plain", "autocast", "evaluation"],
)
def test_checkpointing_changes_no_bit(options):
    kept, computed = (gradients_of_two_passes(flag, **options) for flag in (False, True))
    for one, other in zip(computed, kept, strict=True):
        assert_equal(one, other)


def test_checkpointing_keeps_less():
    def saved(checkpoint):
        sizes = []
        decoder = make(dtype=torch.float32, checkpoint=checkpoint)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda tensor: sizes.append(tensor.numel()) or tensor, lambda tensor: tensor
        ):
            decoder(*inputs(SIZES, image=(32, 32), dtype=torch.float32))
        return sum(sizes)

    # torch's own hooks inside the checkpointed parts see the rest
    assert saved(True) < saved(False) / 2


def test_checkpointing_gives_second_order_gradients():
    def curvature(checkpoint):
        torch.manual_seed(0)
        decoder = spectral_normalize_(make(checkpoint=checkpoint))
        images, features = inputs(SIZES)
        images.requires_grad_()
        out = decoder(images, features)
        (grad,) = torch.autograd.grad(out.square().sum(), images, create_graph=True)
        grad.square().sum().backward()
        return [images.grad, *(p.grad for p in decoder.parameters() if p.grad is not None)]

    for one, other in zip(curvature(True), curvature(False), strict=True):
        assert_close64(one, other)


def test_checkpointing_works_without_gradients():
    decoder = make(checkpoint=True)
    with torch.no_grad():
        out = decoder(*inputs(SIZES))
    decoder.checkpoint = False
    assert_equal(out, decoder(*inputs(SIZES)).detach())


def test_checkpoint_must_be_a_flag():
    with pytest.raises(DTypeError) as caught:
        make(checkpoint="yes")
    assert_message(caught.value, "UNetDecoder: ", "checkpoint", "bool", "str")
