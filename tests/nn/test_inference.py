from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, strategies as st
from naive_generator import randomise
from support import assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, InputError
from dpsims.nn import (
    SPADE,
    BatchNorm2d,
    CrossAttentionNoiseInjector,
    LabelConv2d,
    LabelMapPyramid,
    SelfAttention2d,
    SPADEResBlock,
    joined,
    prepare_for_inference,
    spectral_normalize_,
)
from dpsims.nn._prepared_spade import PreparedSPADE

norms = st.sampled_from(["batch", "sync_batch", "instance", "none"])
seeds = st.integers(0, 2**16)


def maps(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64)


def labels_of(*size, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 5, size, generator=generator)


def built(make, seed, *, spectral=True):
    torch.manual_seed(seed)
    module = make().double()
    return randomise(spectral_normalize_(module) if spectral else module, seed)


@torch.no_grad()
def assert_prepared_equals(module, *inputs, **keywords):
    expected = module(*inputs, **keywords)
    before = copy.deepcopy(module.state_dict())
    found = prepare_for_inference(module)(*inputs, **keywords)
    if isinstance(expected, torch.Tensor):
        expected, found = [expected], [found]
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one - other).abs().max() <= 1e-12 * other.abs().max()
    for name, value in module.state_dict().items():
        assert_equal(value, before[name])


# every part is what it was


@given(norm=norms, hidden=st.sampled_from([None, 3]), seed=seeds, times=st.sampled_from([1, 2, 3]))
def test_spade(norm, hidden, seed, times):
    spade = built(lambda: SPADE(4, 3, hidden_channels=hidden, norm=norm), seed)
    cond = maps(2, 3, 5 * times, 7 * times, seed=seed)
    assert_prepared_equals(spade, maps(2, 4, 5, 7, seed=seed), cond, upsample=times)


@given(
    norm=norms,
    hidden=st.sampled_from([None, 3]),
    kernel=st.sampled_from([1, 3]),
    out_channels=st.sampled_from([2, 4, 6]),
    seed=seeds,
    times=st.sampled_from([1, 2, 3]),
)
def test_block(norm, hidden, kernel, out_channels, seed, times):
    block = built(
        lambda: SPADEResBlock(
            4, out_channels, 12, hidden_channels=hidden, kernel_size=kernel, norm=norm
        ),
        seed,
    )
    features, fine = maps(2, 4, 5, 7, seed=seed), maps(2, 3, 5 * times, 7 * times, seed=seed)
    assert_prepared_equals(block, features, (fine, maps(2, 9, 2, 2, seed=seed)), upsample=times)
    labels = labels_of(2, 5 * times, 7 * times, seed=seed)
    assert_prepared_equals(block, features, (maps(2, 7, 1, 1, seed=seed), labels), upsample=times)


@given(tokens=st.integers(1, 9), size=st.tuples(st.integers(1, 4), st.integers(1, 5)), seed=seeds)
def test_attention(tokens, size, seed):
    injector = built(lambda: CrossAttentionNoiseInjector(6, 3), seed)
    assert_prepared_equals(injector, maps(2, 6, *size, seed=seed), maps(2, tokens, 3, seed=seed))
    last = maps(2, 6, *size, seed=seed).to(memory_format=torch.channels_last)
    assert_prepared_equals(injector, last, maps(2, tokens, 3, seed=seed))
    attend = built(lambda: SelfAttention2d(6), seed)
    assert_prepared_equals(attend, maps(2, 6, *size, seed=seed))
    assert_prepared_equals(attend, last)


@given(
    norm=norms, seed=seeds, cross=st.booleans(), own=st.booleans(), extra=st.sampled_from([0, 2])
)
def test_pyramid(norm, seed, cross, own, extra):
    pyramid = built(
        lambda: LabelMapPyramid(
            5,
            channels=4,
            token_dim=3,
            num_levels=3,
            image_size=16,
            attention_size=8,
            norm=norm,
            cross_attention=cross,
            self_attention=own,
            extra_channels=extra,
        ),
        seed,
    )
    tokens = maps(2, 3, 3, seed=seed) if cross else None
    beside = maps(2, extra, 12, 20, seed=seed) if extra else None
    assert_prepared_equals(pyramid, labels_of(2, 12, 20, seed=seed), tokens, beside)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("extra", [0, 2])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_label_convolution(stride, extra, layout):
    conv = built(lambda: LabelConv2d(5, 4, stride=stride, extra_channels=extra), 0)
    beside = maps(2, extra, 6, 7) if extra else None
    labels = labels_of(2, 6, 7)
    labels[0, 1, 1] = 255
    conv = conv.to(memory_format=layout)
    assert_prepared_equals(conv, labels, beside)
    assert_prepared_equals(conv, maps(2, 5, 6, 7), beside)
    with pytest.raises(InputError, match=r"labels must be in \[0, 5\)"):
        prepare_for_inference(conv)(labels + 3, beside)


def test_parts_are_found_wherever_they_stand():
    shared = SPADE(2, 2, hidden_channels=3)
    model = nn.ModuleDict({"a": shared, "deep": nn.ModuleList([nn.ModuleList([shared])])})
    prepared = prepare_for_inference(model.double())
    assert isinstance(prepared["a"], PreparedSPADE)
    assert prepared["a"] is prepared["deep"][0][0]
    assert model["a"] is shared


def test_what_it_does_not_know_stays_as_it_is():
    class Own(SPADE):
        def forward(self, features, cond):
            return super().forward(features, cond) * 2

    own = Own(2, 2, hidden_channels=3).double().eval()
    other = nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)).double().eval()
    block = SPADEResBlock(2, 3, 2, hidden_channels=3).double().eval()
    # a norm that is not ours is applied as it is
    block.norm_0 = nn.BatchNorm2d(2).double().eval()
    features, cond = maps(2, 2, 4, 5), maps(2, 2, 4, 5, seed=1)
    assert_prepared_equals(own, features, cond)
    assert type(prepare_for_inference(own)) is Own
    assert_prepared_equals(other, features)
    assert_prepared_equals(randomise(block), features, cond)


@torch.no_grad()
def test_the_mode_of_the_original_does_not_matter():
    block = built(lambda: SPADEResBlock(2, 3, 2, hidden_channels=3), 0)
    features, cond = maps(2, 2, 4, 5), maps(2, 2, 4, 5, seed=1)
    expected = block(features, cond)
    found = prepare_for_inference(block.train())(features, cond)
    assert block.training
    torch.testing.assert_close(found, expected)


@torch.no_grad()
def test_encoded_maps_serve_many_calls():
    block = built(lambda: SPADEResBlock(4, 3, 12, hidden_channels=3), 0)
    fine, coarse, features = maps(1, 3, 10, 14), maps(3, 9, 2, 2), maps(3, 4, 5, 7)
    prepared = prepare_for_inference(block)
    encoded = prepared.encode(fine)
    before = encoded.clone()
    found = prepared(features, coarse, upsample=2, encoded=encoded)
    expected = block(features, (fine.expand(3, -1, -1, -1), coarse), upsample=2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert_equal(encoded, before)


@pytest.mark.parametrize("hidden", [None, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@torch.no_grad()
def test_tables_for_label_maps_are_kept(hidden, layout, monkeypatch):
    block = built(lambda: SPADEResBlock(4, 3, 2 + 5, hidden_channels=hidden), 0)
    features, vector, labels = maps(2, 4, 5, 7), maps(2, 2, 1, 1), labels_of(2, 10, 14)
    labels[:, 2:4] = 255
    conds = {"labels last": (vector, labels), "labels first": (labels, vector)}
    expected = {name: block(features, cond, upsample=2) for name, cond in conds.items()}
    prepared = prepare_for_inference(block).to(memory_format=layout)
    prepared.expect_labels()
    for name, cond in conds.items():
        found = prepared(features, cond, upsample=2)
        torch.testing.assert_close(found, expected[name], rtol=1e-10, atol=1e-12)
    monkeypatch.setattr(joined, "label_table", None)
    found = prepared(features, conds["labels last"], upsample=2)
    assert found.is_contiguous(memory_format=layout)
    torch.testing.assert_close(found, expected["labels last"], rtol=1e-10, atol=1e-12)


def test_copies_and_gradients_of_inputs():
    block = built(lambda: SPADEResBlock(4, 3, 2, hidden_channels=3), 0)
    prepared = prepare_for_inference(block)
    features, cond = maps(2, 4, 4, 5), maps(2, 2, 4, 5, seed=1)
    for twin in (copy.deepcopy(prepared), pickle.loads(pickle.dumps(prepared))):
        assert_equal(twin(features, cond), prepared(features, cond))
    assert not any(p.requires_grad for p in prepared.parameters())
    inputs = [features.requires_grad_(), cond.requires_grad_()]
    found = torch.autograd.grad(prepared(*inputs).square().sum(), inputs)
    expected = torch.autograd.grad(block(*inputs).square().sum(), inputs)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


@torch.no_grad()
def test_layouts_agree():
    block = built(lambda: SPADEResBlock(4, 3, 12, hidden_channels=3), 0)
    cond = maps(2, 3, 10, 14), maps(2, 9, 2, 2)
    expected = block(maps(2, 4, 5, 7), cond, upsample=2)
    last = block.to(memory_format=torch.channels_last)
    prepared = prepare_for_inference(last)
    fine = cond[0].to(memory_format=torch.channels_last)
    found = prepared(maps(2, 4, 5, 7), (fine, cond[1]), upsample=2)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)
    assert found.is_contiguous(memory_format=torch.channels_last)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite_and_near(dtype):
    block = built(lambda: SPADEResBlock(4, 3, 2, hidden_channels=8), 0, spectral=False)
    features, cond = maps(2, 4, 6, 6), maps(2, 2, 6, 6, seed=1)
    expected = block(features, cond)
    found = prepare_for_inference(block.to(dtype))(features.to(dtype), cond.to(dtype))
    assert found.dtype == dtype
    # about ten roundings on the way, of values below 8
    assert (found.double() - expected).abs().max() < 10 * 8 * torch.finfo(dtype).eps


def test_training_is_refused_and_evaluation_is_not():
    prepared = prepare_for_inference(nn.Sequential(SelfAttention2d(2), BatchNorm2d(2)))
    with pytest.raises(InputError) as caught:
        prepared.train()
    assert_message(caught.value, "PreparedSelfAttention: mode must be False", "got True")
    assert prepared.eval() is prepared


@pytest.mark.parametrize("module", [None, "generator", {}])
def test_bad_module(module):
    with pytest.raises(DTypeError, match=r"prepare_for_inference: module must be a torch\.nn"):
        prepare_for_inference(module)


@pytest.mark.compile
def test_compiles_whole_and_equal():
    torch._dynamo.reset()
    block = prepare_for_inference(built(lambda: SPADEResBlock(4, 3, 12, hidden_channels=3), 0))
    run = torch.compile(block, fullgraph=True, backend="aot_eager")
    features, cond = maps(2, 4, 5, 7), (maps(2, 3, 10, 14), maps(2, 9, 2, 2))
    with torch.no_grad():
        found = run(features, cond, upsample=2)
        torch.testing.assert_close(found, block(features, cond, upsample=2))
