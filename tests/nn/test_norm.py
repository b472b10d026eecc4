from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_close64, assert_equal, assert_message
from torch import nn
from torch.optim.swa_utils import update_bn

from dpsims.errors import DTypeError, InputError
from dpsims.nn import _group_moments
from dpsims.nn.norm import BatchNorm2d, make_norm
from dpsims.ops.spade_tail._autograd import tail

HALF = (torch.float16, torch.bfloat16)
seeds = st.integers(0, 2**16)
sizes = st.tuples(st.integers(2, 4), st.integers(1, 5), st.integers(1, 6), st.integers(1, 6))


def maps(size, seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)


def oracle(features, eps=1e-5):
    """Batch normalisation and its moments in float64 numpy."""
    array = features.detach().double().numpy()
    mean, var = array.mean((0, 2, 3)), array.var((0, 2, 3))
    count = array.size // array.shape[1]
    shape = (1, -1, 1, 1)
    out = (array - mean.reshape(shape)) / np.sqrt(var.reshape(shape) + eps)
    return out, mean, var * count / (count - 1)


# relations


@given(size=sizes, seed=seeds)
def test_training_output_has_mean_zero_and_variance_below_one(size, seed):
    out = BatchNorm2d(size[1], affine=False).double()(maps(size, seed) * 3 + 2)
    assert_close64(out.mean((0, 2, 3)), torch.zeros(size[1]).double(), scale=10)
    assert bool((out.var((0, 2, 3), correction=0) <= 1 + 1e-12).all())


@given(size=sizes, seed=seeds, momentum=st.sampled_from([0.1, 0.0, 1.0, None]))
def test_equals_torch(size, seed, momentum):
    ours = BatchNorm2d(size[1], momentum=momentum)
    theirs = nn.BatchNorm2d(size[1], momentum=momentum)
    for step in range(3):
        features = maps(size, seed + step, torch.float32)
        assert_equal(ours(features), theirs(features))
    for name, value in theirs.state_dict().items():
        # the running sums are the same up to the order of one multiplication and one addition
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-6, atol=1e-7)
    ours.eval(), theirs.eval()
    torch.testing.assert_close(ours(features), theirs(features), rtol=1e-5, atol=1e-5)


@given(size=sizes, seed=seeds)
def test_order_of_the_batch_does_not_matter(size, seed):
    norm = BatchNorm2d(size[1]).double()
    features, order = maps(size, seed), torch.randperm(size[0])
    assert_close64(norm(features)[order], norm(features[order]), scale=100)


@given(size=sizes, seed=seeds, scale=st.floats(0.25, 8), shift=st.floats(-4, 4))
def test_affine_change_of_a_channel_only_moves_eps(size, seed, scale, shift):
    # normalising a x + b gives that of x with eps / a^2
    features = maps(size, seed)
    narrow = BatchNorm2d(size[1], eps=1e-5 / scale**2).double()
    assert_close64(
        BatchNorm2d(size[1]).double()(features * scale + shift), narrow(features), scale=1000
    )


@given(size=sizes, seed=seeds)
def test_evaluation_is_a_fixed_elementwise_map(size, seed):
    norm = BatchNorm2d(size[1]).double()
    norm(maps(size, seed))
    norm.eval()
    before = copy.deepcopy(norm.state_dict())
    features = maps(size, seed + 1)
    out = norm(features)
    # the batch and the neighbours do not matter
    assert_close64(norm(features[:1, :, :1]), out[:1, :, :1])
    assert norm(features[:0]).shape == (0, *size[1:])
    for name, value in norm.state_dict().items():
        assert_equal(value, before[name])


@given(size=sizes, seed=seeds)
def test_instance_norm_is_batch_norm_of_each_image(size, seed):
    size = (*size[:3], size[3] + 1)
    features = maps(size, seed)
    norm = make_norm("Block", size[1], "instance").double()
    batch = BatchNorm2d(size[1], affine=False).double()
    expected = torch.cat([batch(image[None]) for image in features])
    assert_close64(norm(features), expected, scale=100)
    assert not norm.state_dict()


def test_instance_norm_learns_scale_and_shift_if_asked():
    norm = make_norm("Block", 2, "instance", affine=True).double()
    plain = make_norm("Block", 2, "instance").double()
    features = maps((2, 2, 3, 3), 0)
    assert_equal(norm(features), plain(features))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([2.0, 0.0]))
        norm.bias.copy_(torch.tensor([0.0, 5.0]))
    expected = torch.stack([2 * plain(features)[:, 0], torch.full((2, 3, 3), 5.0).double()], 1)
    assert_close64(norm(features), expected)


def test_none_is_the_identity():
    features = maps((2, 3, 1, 1), 0)
    assert make_norm("Block", 3, "none")(features) is features


# oracle


@given(size=sizes, seed=seeds)
def test_oracle(size, seed):
    norm = BatchNorm2d(size[1], momentum=0.3).double()
    features = maps(size, seed) * 2 + 5
    expected, mean, var = oracle(features)
    torch.testing.assert_close(norm(features), torch.from_numpy(expected), rtol=1e-9, atol=1e-9)
    assert_close64(norm.running_mean, 0.3 * torch.from_numpy(mean), scale=10)
    assert_close64(norm.running_var, 0.7 + 0.3 * torch.from_numpy(var), scale=10)
    assert norm.num_batches_tracked == 1


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_half_inputs_are_normalised_in_float32(dtype, kind):
    norm = make_norm("Block", 4, kind)
    # mean 30 deviation 1/2: moments in half precision would be wrong by more than the deviation
    features = (maps((3, 4, 16, 16), 0) / 2 + 30).to(dtype)
    out = norm(features)
    assert out.dtype == dtype
    reference = make_norm("Block", 4, kind).double()
    expected = reference(features.double())
    # a float32 normalisation (1e-4 at this mean) plus one rounding of values below 4
    bound = 1e-3 + 2 * torch.finfo(dtype).eps
    assert (out.double() - expected).abs().max() < bound
    if kind == "batch":
        torch.testing.assert_close(
            norm.running_var, reference.running_var.float(), rtol=1e-4, atol=0
        )


def test_large_half_values_do_not_overflow():
    norm = BatchNorm2d(2)
    out = norm(torch.tensor([6e4, -6e4]).half().repeat(2, 2, 2, 1))
    assert bool(out.isfinite().all())
    assert bool(norm.running_var.isfinite().all())


@pytest.mark.parametrize("affine", [True, False])
def test_gradients(affine):
    norm = BatchNorm2d(2, affine=affine).double()
    inputs = [maps((2, 2, 2, 2), 0).requires_grad_(), *norm.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), inputs)
    assert torch.autograd.gradgradcheck(lambda x, *_: norm(x), inputs)


def test_instance_gradients():
    norm = make_norm("Block", 2, "instance", affine=True).double()
    inputs = [maps((2, 2, 2, 2), 0).requires_grad_(), *norm.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: norm(x), inputs)


# running statistics


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_bad_batch_leaves_running_statistics_alone(bad):
    norm = BatchNorm2d(3)
    good = maps((2, 3, 4, 4), 0, torch.float32)
    norm(good)
    before = copy.deepcopy(norm.state_dict())
    broken = good.clone()
    broken[0, 1, 2, 3] = bad
    assert bool(norm(broken)[:, 1].isnan().all())
    for name, value in norm.state_dict().items():
        assert_equal(value, before[name])
    norm(good)
    assert norm.num_batches_tracked == 2
    assert bool((norm.running_mean != before["running_mean"]).all())


def test_bad_first_batch_does_not_spoil_the_plain_average():
    norm = BatchNorm2d(1, momentum=None)
    norm(torch.full((2, 1, 2, 2), float("nan")))
    assert_equal(norm.running_mean, torch.zeros(1))
    norm(torch.tensor([1.0, 3.0]).view(2, 1, 1, 1))
    assert_equal(norm.running_mean, torch.tensor([2.0]))


def test_values_too_large_for_the_buffers_are_not_recorded():
    norm = BatchNorm2d(1)
    norm(maps((2, 1, 2, 2), 0) * 1e30)
    assert_equal(norm.running_var, torch.ones(1))


def test_update_bn_averages_over_the_loader():
    model = nn.Sequential(nn.Conv2d(1, 2, 1), BatchNorm2d(2)).double()
    loader = [maps((3, 1, 4, 4), seed) for seed in range(4)]
    model(loader[0] * 100)
    update_bn(loader, model)
    means = torch.stack([model[0](batch).mean((0, 2, 3)) for batch in loader])
    assert_close64(model[1].running_mean, means.mean(0), scale=10)
    assert model[1].momentum == 0.1


def test_cast_to_half_keeps_the_running_statistics():
    model = nn.Sequential(BatchNorm2d(2))
    model(torch.randn(2, 2, 3, 3) * 3)
    before = model[0].running_var.clone()
    for dtype in HALF:
        model.to(dtype)
        assert model[0].weight.dtype == dtype
        assert model[0].running_var.dtype == torch.float32
        assert_equal(model[0].running_var, before)
        assert model(torch.randn(2, 2, 3, 3).to(dtype)).dtype == dtype
        before = model[0].running_var.clone()
    assert model.double()[0].running_var.dtype == torch.float64
    assert model.half()[0].running_var.dtype == torch.float64


def test_float64_input_of_a_float32_norm_is_normalised_in_float64():
    features = maps((2, 3, 4, 4), 0)
    assert_equal(BatchNorm2d(3)(features), BatchNorm2d(3).double()(features))
    assert BatchNorm2d(3).eval()(features).dtype == torch.float64


def test_two_forwards_one_backward():
    norm = BatchNorm2d(3).double()
    first, second = maps((2, 3, 4, 4), 0), maps((2, 3, 4, 4), 1)
    (norm(first).pow(3).sum() - norm(second).pow(3).sum()).backward()
    both = norm.weight.grad
    parts = [
        torch.autograd.grad(norm(each).pow(3).sum(), norm.weight)[0] for each in (first, second)
    ]
    assert_close64(both, parts[0] - parts[1])


# several processes


def test_two_processes_equal_one(tmp_path):
    worker = Path(__file__).parent / "sync_norm_worker.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", str(worker), str(rank), str(tmp_path / "store")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output
        assert output == "all equal\n"


class _PretendGroup:
    """Rank 0 of two, the other one holding an empty batch: every sum is this process's own."""

    is_available = is_initialized = staticmethod(lambda: True)
    get_world_size = staticmethod(lambda: 2)
    get_rank = staticmethod(lambda: 0)
    all_reduce = staticmethod(lambda tensor: None)


@pytest.mark.parametrize("affine", [True, False])
def test_synced_beside_an_empty_process_equals_plain(monkeypatch, affine):
    features = maps((2, 3, 4, 5), 0).requires_grad_()
    plain = BatchNorm2d(3, affine=affine).double()
    expected = plain(features)
    monkeypatch.setattr(_group_moments, "distributed", _PretendGroup)
    synced = BatchNorm2d(3, affine=affine, sync=True).double()
    assert_close64(synced(features), expected, scale=10)
    for name, value in synced.state_dict().items():
        assert_close64(value.double(), plain.state_dict()[name].double())
    small = maps((2, 3, 2, 2), 1).requires_grad_()
    assert torch.autograd.gradcheck(synced, small)
    assert synced(features[:1].float()).dtype == torch.float32
    with pytest.raises(InputError) as error:
        synced(features[:1, :, :1, :1])
    assert_message(error.value, "BatchNorm2d: features", "at least two values", "(1, 3, 1, 1)")
    with pytest.raises(InputError):
        synced(features[:0])


@pytest.mark.parametrize("fused", [False, True])
def test_tail_beside_an_empty_process_equals_plain(monkeypatch, fused):
    features, modulation = maps((2, 3, 4, 5), 0).requires_grad_(), maps((2, 6, 4, 5), 1)
    modulation.requires_grad_()
    plain, synced = (BatchNorm2d(3, affine=False, sync=sync).double() for sync in (False, True))
    found = [plain.statistics(features)]
    monkeypatch.setattr(_group_moments, "distributed", _PretendGroup)
    found.append(synced.statistics(features))
    for name, value in synced.state_dict().items():
        assert_close64(value.double(), plain.state_dict()[name].double())
    results = []
    for mean, var, eps, num_values, all_reduce in found:
        group = (mean, var, num_values, all_reduce)
        out = tail(features, modulation, *group, eps, 0.2, 1, fused=fused)
        wanted = (features, modulation)
        first = torch.autograd.grad(out.sin().sum(), wanted, retain_graph=True)
        twice = torch.autograd.grad(out.sin().sum(), wanted, create_graph=True)
        penalty = sum(grad.square().sum() for grad in twice)
        results.append((out, *first, *twice, *torch.autograd.grad(penalty, wanted)))
    for one, other in zip(*results, strict=True):
        assert_close64(one, other, scale=1000)
    with pytest.raises(InputError, match="at least two values"):
        synced.statistics(features[:1, :, :1, :1])


def test_sync_without_a_group_is_plain():
    features = maps((2, 3, 4, 4), 0)
    assert_equal(BatchNorm2d(3, sync=True).double()(features), BatchNorm2d(3).double()(features))


# layouts, copies, compilation


@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_memory_layouts_agree(kind):
    norm = make_norm("Block", 3, kind, affine=True).double()
    features = maps((2, 3, 4, 5), 0)
    expected = norm(features)
    last = norm(features.to(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    assert_close64(last, expected, scale=10)
    assert_close64(norm(features.mT.contiguous().mT), expected, scale=10)
    wide = torch.cat([features, features], 3)
    assert_close64(norm(wide[..., :5]), expected, scale=10)
    expanded = features[:, :, :, :1].expand(2, 3, 4, 5)
    assert_close64(norm(expanded), norm(expanded.contiguous()), scale=10)


@pytest.mark.parametrize("kind", ["batch", "instance"])
def test_input_is_not_written_to(kind):
    features = maps((2, 3, 4, 5), 0)
    before, version = features.clone(), features._version
    make_norm("Block", 3, kind)(features)
    assert features._version == version
    assert_equal(features, before)


def test_state_and_copies_round_trip():
    norm = BatchNorm2d(3)
    norm(torch.randn(2, 3, 4, 4))
    theirs = nn.BatchNorm2d(3)
    theirs.load_state_dict(norm.state_dict())
    ours = BatchNorm2d(3)
    ours.load_state_dict(theirs.state_dict())
    features = torch.randn(2, 3, 4, 4)
    for twin in (ours, copy.deepcopy(norm)):
        twin.eval()
        assert_equal(twin(features), copy.deepcopy(norm).eval()(features))
    assert "sync=False" in repr(norm)


def test_meta_shapes():
    for kind in ("batch", "instance", "none"):
        norm = make_norm("Block", 3, kind, affine=True).to("meta")
        assert norm(torch.empty(2, 3, 4, 5, device="meta")).shape == (2, 3, 4, 5)


@pytest.mark.parametrize("kind", ["batch", "sync_batch", "instance"])
def test_constant_channel_is_finite(kind):
    features = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    out = make_norm("Block", 3, kind)(features)
    out.pow(2).sum().backward()
    # 7 is exact in float32, its mean over 32 or 16 equal values too
    assert out.abs().max() < 1e-4
    assert bool(features.grad.isfinite().all())


@pytest.mark.compile
def test_compiles_whole_and_equal():
    torch._dynamo.reset()
    eager = nn.Sequential(
        make_norm("Block", 3, "sync_batch", affine=True), make_norm("Block", 3, "instance")
    )
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        features = maps((2, 3, 4, 5), seed, torch.float32)
        assert_equal(run(features), eager(features))
    assert_equal(run(features * torch.nan), eager(features * torch.nan))
    for name, value in eager.state_dict().items():
        assert_equal(compiled.state_dict()[name], value)


# bad inputs


@pytest.mark.parametrize(
    ("settings", "error", "parts"),
    [
        pytest.param(
            {"channels": 0}, InputError, ("channels must be at least 1", "got 0"), id="0"
        ),
        pytest.param({"channels": True}, DTypeError, ("channels must be an int",), id="bool"),
        pytest.param({"channels": 2.0}, DTypeError, ("channels must be an int",), id="float"),
        pytest.param({"eps": 0}, InputError, ("eps must be finite and > 0", "got 0"), id="eps-0"),
        pytest.param({"eps": float("nan")}, InputError, ("eps", "nan"), id="eps-nan"),
        pytest.param({"eps": "1"}, DTypeError, ("eps must be a number", "str"), id="eps-str"),
        pytest.param(
            {"momentum": 1.5}, InputError, ("momentum", "<= 1", "1.5"), id="momentum-big"
        ),
        pytest.param({"momentum": -0.1}, InputError, ("momentum", ">= 0"), id="momentum-negative"),
    ],
)
def test_bad_settings(settings, error, parts):
    with pytest.raises(error) as caught:
        BatchNorm2d(**{"channels": 2, **settings})
    assert_message(caught.value, "BatchNorm2d: ", *parts)


@pytest.mark.parametrize("kind", ["batch", "instance"])
@pytest.mark.parametrize(
    ("features", "error", "parts"),
    [
        pytest.param([1.0], DTypeError, ("torch.Tensor", "list"), id="list"),
        pytest.param(np.ones((2, 3, 4, 4)), DTypeError, ("torch.Tensor", "ndarray"), id="numpy"),
        pytest.param(
            torch.ones(3, 4, 4), InputError, ("(B, C=3, H, W)", "(3, 4, 4)"), id="rank-3"
        ),
        pytest.param(torch.ones(2, 3, 4, 4, 1), InputError, ("(2, 3, 4, 4, 1)",), id="rank-5"),
        pytest.param(torch.ones(2, 4, 4, 4), InputError, ("C=3", "(2, 4, 4, 4)"), id="channels"),
        pytest.param(torch.ones(2, 3, 0, 4), InputError, ("empty", "(2, 3, 0, 4)"), id="no-rows"),
        pytest.param(
            torch.ones(2, 3, 4, 4).int(), DTypeError, ("floating-point", "int32"), id="integer"
        ),
        pytest.param(
            torch.ones(2, 3, 4, 4).to_sparse(), InputError, ("dense", "sparse"), id="sparse"
        ),
    ],
)
def test_bad_features(kind, features, error, parts):
    with pytest.raises(error) as caught:
        make_norm("Block", 3, kind)(features)
    assert_message(caught.value, "Block: features must", *parts)


@pytest.mark.parametrize("size", [(1, 3, 1, 1), (0, 3, 4, 4)], ids=["one-value", "empty-batch"])
@pytest.mark.parametrize("kind", ["batch", "sync_batch"])
def test_too_little_to_normalise_in_training(size, kind):
    norm = make_norm("Block", 3, kind)
    with pytest.raises(InputError) as caught:
        norm(torch.ones(size))
    assert_message(
        caught.value,
        "Block: features must hold at least two values per channel in training",
        'larger batch, larger maps or norm="instance"',
        f"got {size}",
    )
    assert norm.eval()(torch.ones(size)).shape == size


def test_one_pixel_per_image_in_training():
    norm = make_norm("Block", 3, "instance")
    with pytest.raises(InputError) as caught:
        norm(torch.ones(2, 3, 1, 1))
    assert_message(
        caught.value,
        "Block: features must hold at least two pixels per image in training",
        'norm="batch"',
        "got (2, 3, 1, 1)",
    )
    assert norm.eval()(torch.ones(2, 3, 1, 1)).shape == (2, 3, 1, 1)
    assert norm.train()(torch.ones(0, 3, 2, 2)).shape == (0, 3, 2, 2)


def test_unknown_norm():
    with pytest.raises(InputError) as caught:
        make_norm("Block", 3, "group")
    assert_message(caught.value, "Block: norm must be one of 'batch', 'sync_batch'", "got 'group'")
    with pytest.raises(InputError) as caught:
        make_norm("Block", 0, "none")
    assert_message(caught.value, "Block: channels must be at least 1")
