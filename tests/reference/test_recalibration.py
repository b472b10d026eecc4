import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_equal
from torch import nn
from torch.optim.swa_utils import update_bn

from dpsims.errors import InputError, NonFiniteError
from dpsims.nn import BatchNorm2d
from dpsims_reference.ema import recalibrate_batch_norm_

NORMS = {
    "torch": lambda: nn.BatchNorm2d(3, momentum=0.3),
    "ours": lambda: BatchNorm2d(3, momentum=0.3),
    "ours-plain": lambda: BatchNorm2d(3, affine=False),
}
norms = pytest.mark.parametrize("build", NORMS.values(), ids=NORMS.keys())


def batches(count, seed=0, size=4):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, 3, 4, 5, generator=generator) * 3 + 1 for _ in range(count)]


@norms
@given(count=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_statistics_are_the_plain_average_over_batches(build, count, seed):
    norm = build()
    # what was measured before must not count
    norm(batches(1, seed + 1)[0] * 100)
    data = batches(count, seed)
    recalibrate_batch_norm_(norm, data, norm)
    doubles = [batch.double() for batch in data]
    mean = torch.stack([b.mean((0, 2, 3)) for b in doubles]).mean(0)
    var = torch.stack([b.var((0, 2, 3)) for b in doubles]).mean(0)
    # float32 moments of 80 numbers of order ten
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(norm.running_var.double(), var, rtol=1e-5, atol=1e-5)
    assert norm.num_batches_tracked == count
    assert norm.momentum in (0.3, 0.1)


def test_equals_the_function_of_torch():
    torch.manual_seed(0)
    ours = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.BatchNorm2d(3))
    theirs = nn.Sequential(*ours)
    data = batches(3)
    recalibrate_batch_norm_(ours, data, ours)
    found = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    update_bn(data, theirs)
    for name, buffer in theirs.named_buffers():
        assert_equal(found[name], buffer)


@norms
def test_only_batch_norms_train_and_every_mode_returns(build):
    seen = []
    norm, other, idle = build(), nn.Dropout(0.5), nn.Dropout(0.5)
    model = nn.ModuleList([norm, other, idle])
    model.eval()
    idle.train()

    def forward(batch):
        seen.append((norm.training, other.training, idle.training, model.training))
        assert not torch.is_grad_enabled()
        return norm(batch)

    recalibrate_batch_norm_(model, batches(2), forward)
    assert seen == [(True, False, False, False)] * 2
    assert [m.training for m in (model, norm, other, idle)] == [False, False, False, True]


@norms
def test_parameters_and_global_random_state_are_untouched(build):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), build())
    before = [param.detach().clone() for param in model.parameters()]
    state = torch.get_rng_state()
    recalibrate_batch_norm_(model, iter(batches(2)), model)
    assert_equal(torch.get_rng_state(), state)
    for param, old in zip(model.parameters(), before, strict=True):
        assert_equal(param.detach(), old)
        assert param.grad is None


@norms
def test_a_layer_that_is_used_twice_counts_every_use(build):
    norm = build()
    first, second = batches(2)
    recalibrate_batch_norm_(norm, [(first, second)], lambda pair: [norm(part) for part in pair])
    mean = (first.mean((0, 2, 3)) + second.mean((0, 2, 3))) / 2
    torch.testing.assert_close(norm.running_mean, mean, rtol=1e-5, atol=1e-5)


def remembered(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def assert_restored(model, before, momentum=0.3):
    for name, buffer in model.named_buffers():
        assert_equal(buffer, before[name])
    assert all(m.momentum == momentum for m in model.modules() if hasattr(m, "momentum"))


@norms
def test_any_error_puts_everything_back(build):
    model = nn.Sequential(build())
    momentum = model[0].momentum
    model(batches(1)[0])
    before = remembered(model)

    def fail(batch):
        model(batch)
        raise KeyError

    with pytest.raises(KeyError):
        recalibrate_batch_norm_(model, batches(1, seed=5), fail)
    assert_restored(model, before, momentum)
    assert model.training


@norms
def test_no_batch_is_an_error(build):
    model = nn.Sequential(build()).eval()
    momentum = model[0].momentum
    before = remembered(model)
    with pytest.raises(InputError, match="batches must hold at least one batch; got none"):
        recalibrate_batch_norm_(model, [], model)
    assert_restored(model, before, momentum)


def test_statistics_that_are_not_finite_are_refused():
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3))
    before = remembered(model)
    with pytest.raises(NonFiniteError, match="statistics must be finite"):
        recalibrate_batch_norm_(model, [torch.full((2, 3, 2, 2), float("nan"))], model)
    assert_restored(model, before)


def test_a_layer_that_is_not_reached_keeps_its_statistics():
    model = nn.ModuleList([NORMS["torch"](), NORMS["ours"]()])
    model[1](batches(1)[0])
    before = remembered(model[1])
    recalibrate_batch_norm_(model, batches(2), model[0])
    assert_restored(model[1], before)
    assert model[0].num_batches_tracked == 2


def test_without_batch_norms_nothing_runs():
    def fail(_):
        raise AssertionError

    model = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm2d(3, track_running_stats=False))
    recalibrate_batch_norm_(model, [1], fail)
    assert model.training
