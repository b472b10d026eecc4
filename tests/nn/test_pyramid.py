"""The label map encoder: sizes, symmetries, and what depends on what."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn
from torch.nn import functional as F

from dpsims.errors import DTypeError, InputError
from dpsims.nn.attention import CrossAttentionNoiseInjector, SelfAttention2d
from dpsims.nn.pyramid import LabelMapPyramid

K, C, D = 5, 4, 3
DEFAULTS = {
    "channels": C,
    "token_dim": D,
    "num_levels": 3,
    "image_size": 16,
    "attention_size": 8,
}
SHAPES = {"batch": st.integers(1, 3), "rows": st.integers(1, 3), "columns": st.integers(1, 3)}


def make(*, gate=0.7, **options):
    torch.manual_seed(0)
    pyramid = LabelMapPyramid(K, **(DEFAULTS | options)).double().eval()
    for name, parameter in pyramid.named_parameters():
        if name.endswith("gate"):
            nn.init.constant_(parameter, gate)
        elif "norm" in name:
            # so that the norm's scale and shift are seen too
            nn.init.uniform_(parameter, 0.5, 1.5)
    return pyramid


def draw(batch=2, rows=2, columns=3, seed=0, tokens=2, extra=0):
    """Labels of 4 * rows by 4 * columns pixels, tokens, and extra maps if asked for."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K, (batch, 4 * rows, 4 * columns), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.1] = 255
    noise = torch.randn(batch, tokens, D, generator=generator, dtype=torch.float64)
    if not extra:
        return labels, noise
    shape = (batch, extra, *labels.shape[1:])
    return labels, noise, torch.randn(shape, generator=generator, dtype=torch.float64)


def one_hot(labels):
    return (labels.unsqueeze(1) == torch.arange(K).view(-1, 1, 1)).double()


def assert_levels(actual, expected, *, exact=False):
    for one, other in zip(actual, expected, strict=True):
        (assert_equal if exact else assert_close64)(one, other)


def oracle(pyramid, labels, tokens=None, *, cross=True, own=True):
    """Table S2, block by block, with either attention left out."""
    hidden, levels = one_hot(labels), []
    for level, (conv, block) in enumerate(zip(pyramid.convs, pyramid.blocks, strict=True)):
        hidden = F.conv2d(hidden, conv.weight, conv.bias, 2 if level else 1, 1)
        hidden = F.gelu(block.norm(hidden))
        if level:
            if cross:
                hidden = F.gelu(block.inject_norm(block.inject(hidden, tokens)))
            if own:
                hidden = F.gelu(block.attend(hidden))
            hidden = block.attend_norm(hidden)
        hidden = F.conv2d(hidden, block.project.weight, block.project.bias)
        levels.append(hidden)
    return levels


@given(**SHAPES, num_levels=st.integers(1, 3))
def test_level_i_is_smaller_by_two_to_the_i(batch, rows, columns, num_levels):
    labels, tokens = draw(batch, rows, columns)
    levels = make(num_levels=num_levels)(labels, tokens)
    sizes = [(batch, C, 4 * rows >> i, 4 * columns >> i) for i in range(num_levels)]
    assert [tuple(level.shape) for level in levels] == sizes


def test_paper_sizes_on_the_meta_device():
    with torch.device("meta"):
        pyramid = LabelMapPyramid(35)
    labels = torch.empty(1, 256, 512, dtype=torch.uint8, device="meta")
    levels = pyramid(labels, torch.empty(1, 8, 256, device="meta"))
    assert [tuple(x.shape) for x in levels] == [(1, 64, 256 >> i, 512 >> i) for i in range(6)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [False, False, True, True, True, True]),
        ({"attention_size": 0}, [False] * 6),
        ({"attention_size": 256}, [True] * 6),
        ({"image_size": 64}, [True] * 6),
        ({"image_size": 512}, [False, False, False, True, True, True]),
    ],
)
def test_which_levels_carry_attention(options, expected):
    blocks = LabelMapPyramid(K, channels=2, token_dim=2, **options).blocks
    kinds = CrossAttentionNoiseInjector, SelfAttention2d
    for kind in kinds:
        found = [any(isinstance(m, kind) for m in block.modules()) for block in blocks]
        assert found == expected
    for kind, name in zip(kinds, ("cross_attention", "self_attention"), strict=True):
        without = LabelMapPyramid(K, channels=2, token_dim=2, **{name: False}, **options)
        assert not any(isinstance(m, kind) for m in without.modules())


@settings(max_examples=20)
@given(**SHAPES, seed=st.integers(0, 99))
def test_equals_the_table_of_layers(batch, rows, columns, seed):
    pyramid, args = make(), draw(batch, rows, columns, seed)
    assert_levels(pyramid(*args), oracle(pyramid, *args))


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("cross", [True, False])
@settings(max_examples=5)
@given(**SHAPES, seed=st.integers(0, 99))
def test_equals_the_table_without_either_attention(cross, own, batch, rows, columns, seed):
    pyramid = make(cross_attention=cross, self_attention=own)
    labels, tokens = draw(batch, rows, columns, seed)
    tokens = tokens if cross else None
    assert_levels(pyramid(labels, tokens), oracle(pyramid, labels, tokens, cross=cross, own=own))


def test_without_cross_attention_there_are_no_tokens():
    labels, tokens = draw()
    pyramid = make(cross_attention=False)
    with pytest.raises(InputError) as caught:
        pyramid(labels, tokens)
    assert_message(caught.value, "LabelMapPyramid: tokens must be None", "got Tensor")
    assert not any("inject" in name for name in pyramid.state_dict())


@settings(max_examples=20)
@given(**SHAPES, seed=st.integers(0, 99))
def test_renaming_classes_and_columns_together_changes_nothing(batch, rows, columns, seed):
    pyramid, renamed = make(), make()
    labels, tokens = draw(batch, rows, columns, seed)
    order = torch.randperm(K, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        renamed.convs[0].weight[:, order] = pyramid.convs[0].weight
    names = torch.cat([order, torch.full((256 - K,), 255)])
    assert_levels(renamed(names[labels], tokens), pyramid(labels, tokens))


@settings(max_examples=20)
@given(**SHAPES, seed=st.integers(0, 99), extra=st.integers(0, 2))
def test_index_map_equals_one_hot_map(batch, rows, columns, seed, extra):
    pyramid = make(extra_channels=extra)
    labels, *rest = draw(batch, rows, columns, seed, extra=extra)
    assert_levels(pyramid(one_hot(labels), *rest), pyramid(labels, *rest))


@settings(max_examples=20)
@given(**SHAPES, seed=st.integers(0, 99))
def test_samples_are_independent_in_eval(batch, rows, columns, seed):
    pyramid, args = make(), draw(batch, rows, columns, seed)
    whole = pyramid(*args)
    for b in range(batch):
        one = slice(b, b + 1)
        assert_levels(pyramid(*(x[one] for x in args)), [level[one] for level in whole])


@settings(max_examples=20)
@given(seed=st.integers(0, 99))
def test_noise_enters_through_the_gates_only(seed):
    labels, tokens = draw(seed=seed)
    other = draw(seed=seed + 1)[1]
    closed = make(gate=0.0)
    assert_levels(closed(labels, tokens), closed(labels, other), exact=True)
    opened = make()
    pairs = list(zip(opened(labels, tokens), opened(labels, other), strict=True))
    assert [torch.equal(*pair) for pair in pairs] == [True, False, False]


def test_extra_maps_reach_every_level():
    pyramid = make(extra_channels=2)
    labels, tokens, extra = draw(extra=2)
    pairs = zip(pyramid(labels, tokens, extra), pyramid(labels, tokens, extra + 1), strict=True)
    assert not any(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("self_attention", [True, False])
@pytest.mark.parametrize("norm", ["batch", "sync_batch", "instance", "none"])
def test_every_parameter_learns_in_training(norm, self_attention):
    pyramid = make(norm=norm, self_attention=self_attention).train()
    levels = pyramid(*draw(batch=3))
    sum((level**3).sum() for level in levels).backward()
    for name, parameter in pyramid.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name
    # nothing that a norm would cancel is learned
    assert (pyramid.convs[0].bias is None) == (norm != "none")


def test_gradients():
    pyramid = make(channels=2, num_levels=2, image_size=4, attention_size=2)
    labels, tokens = draw(1, 1, 1)
    assert torch.autograd.gradcheck(
        lambda x: pyramid(labels, x)[1], [tokens.requires_grad_()], fast_mode=False
    )


def test_batch_norm_of_a_single_value_is_an_error():
    labels, tokens = torch.zeros(1, 4, 4, dtype=torch.uint8), torch.zeros(1, 2, D).double()
    with pytest.raises(InputError) as caught:
        make().train()(labels, tokens)
    assert_message(caught.value, "LabelMapPyramid: features must", "norm=")
    assert all(level.isfinite().all() for level in make()(labels, tokens))


def test_memory_formats_and_strides():
    pyramid, (labels, tokens) = make(), draw()
    version = labels._version
    expected = pyramid(labels, tokens)
    assert all(level.is_contiguous() for level in expected)
    strided = labels.mT.contiguous().mT, tokens.mT.contiguous().mT
    assert_levels(pyramid(*strided), expected)
    last = pyramid.to(memory_format=torch.channels_last)(labels, tokens)
    assert all(level.is_contiguous(memory_format=torch.channels_last) for level in last)
    assert_levels(last, expected)
    assert (labels._version, tokens._version) == (version, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_and_autocast_are_finite(dtype):
    labels, tokens = draw()
    half = make().to(dtype)(labels, tokens.to(dtype))
    with torch.autocast("cpu", dtype):
        mixed = make().float().train()(labels, tokens.float())
    for levels in (half, mixed):
        assert all(level.dtype == dtype and level.isfinite().all() for level in levels)


def test_state_dict_deepcopy_and_empty_batch():
    pyramid, args = make(), draw()
    other = LabelMapPyramid(K, **DEFAULTS).double().eval()
    other.load_state_dict(pyramid.state_dict())
    for same in (other, copy.deepcopy(pyramid)):
        assert_levels(same(*args), pyramid(*args), exact=True)
    assert [len(level) for level in pyramid(*(x[:0] for x in args))] == [0, 0, 0]


@pytest.mark.parametrize(
    ("height", "width", "valid"),
    [
        pytest.param(10, 8, "8x8 and 12x8", id="height"),
        pytest.param(8, 13, "8x12 and 8x16", id="width"),
        pytest.param(3, 1, "4x4 and 4x4", id="too-small"),
    ],
)
def test_sizes_that_cannot_be_halved_are_refused(height, width, valid):
    labels = torch.zeros(2, height, width, dtype=torch.uint8)
    with pytest.raises(InputError) as caught:
        make()(labels, draw()[1])
    assert_message(caught.value, "labels must", "divisible by 4", valid, f"got {height}x{width}")


LABELS, TOKENS = draw()


@pytest.mark.parametrize(
    ("args", "error", "parts"),
    [
        pytest.param(
            (LABELS, TOKENS[:1]), InputError, ["LabelMapPyramid: tokens", "B=2"], id="batch"
        ),
        pytest.param(
            (LABELS, TOKENS[..., :2]),
            InputError,
            ["LabelMapPyramid: tokens", "D=3"],
            id="token-dim",
        ),
        pytest.param((LABELS, TOKENS[:, 0]), InputError, ["tokens"], id="token-rank"),
        pytest.param((LABELS, TOKENS.long()), DTypeError, ["tokens"], id="token-integer"),
        pytest.param((LABELS, None), DTypeError, ["tokens", "NoneType"], id="no-tokens"),
        pytest.param((LABELS, TOKENS.to("meta")), InputError, ["tokens", "meta"], id="device"),
        pytest.param((LABELS[0], TOKENS), InputError, ["labels"], id="label-rank"),
        pytest.param((LABELS.double(), TOKENS), DTypeError, ["labels"], id="float-index-map"),
        pytest.param((LABELS + 5, TOKENS), InputError, ["labels", "[0, 5)"], id="label-range"),
        pytest.param((one_hot(LABELS)[:, 1:], TOKENS), InputError, ["K=5"], id="one-hot-classes"),
        pytest.param((LABELS, TOKENS, TOKENS), InputError, ["extra"], id="unexpected-extra"),
    ],
)
def test_bad_inputs(args, error, parts):
    with pytest.raises(error) as caught:
        make()(*args)
    assert_message(caught.value, "must", *parts)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        pytest.param({"num_classes": 0}, InputError, id="no-class"),
        pytest.param({"channels": 0}, InputError, id="channels"),
        pytest.param({"token_dim": 0}, InputError, id="token-dim"),
        pytest.param({"num_levels": 0}, InputError, id="no-level"),
        pytest.param({"num_levels": True}, DTypeError, id="level-bool"),
        pytest.param({"image_size": 0}, InputError, id="image-size-0"),
        pytest.param({"image_size": 100}, InputError, id="image-size-odd"),
        pytest.param({"attention_size": -1}, InputError, id="attention-size"),
        pytest.param({"extra_channels": -1}, InputError, id="extra"),
        pytest.param({"norm": "group"}, InputError, id="norm"),
        pytest.param({"attn_dim": 0}, InputError, id="attn-dim"),
        pytest.param({"impl": "fast"}, InputError, id="impl"),
    ],
)
def test_bad_settings(options, error):
    (name,) = options
    with pytest.raises(error) as caught:
        LabelMapPyramid(**({"num_classes": K} | options))
    assert_message(caught.value, f"{name} must")
