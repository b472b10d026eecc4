import copy

import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import assert_equal, assert_message
from torch import distributed, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpsims.errors import (
    DTypeError,
    IncompatibleCheckpointError,
    InputError,
    NonFiniteError,
)
from dpsims.nn import BatchNorm2d, effective_weight, spectral_normalize_
from dpsims_reference.checkpoints import CheckpointStore
from dpsims_reference.ema import GeneratorEMA

decays = st.floats(0, 1)
histories = st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8)


class Net(nn.Module):
    """A bit of everything an average must get right."""

    def __init__(self, width=4):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.norm = BatchNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)
        self.tied = nn.Conv2d(width, 2, 1)
        self.tied.weight = self.head.weight
        self.empty = nn.Parameter(torch.empty(0))
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("table", torch.tensor([1, 2, 3]))
        self.register_buffer("scratch", torch.zeros(2), persistent=False)

    def forward(self, images):
        return self.head(self.norm(self.conv(images)))


def one_weight(value=0.0, dtype=torch.float64):
    model = nn.Linear(1, 1, bias=False, dtype=dtype)
    return set_weight(model, value)


@torch.no_grad()
def set_weight(model, value):
    model.weight.fill_(value)
    return model


@torch.no_grad()
def scramble(model, seed):
    generator = torch.Generator().manual_seed(seed)
    for param in model.parameters():
        if param.requires_grad:
            param.copy_(torch.randn(param.shape, generator=generator))
    for buffer in model.buffers():
        buffer.copy_(torch.randint(0, 9, buffer.shape, generator=generator))
    return model


@given(start=st.floats(-9, 9), target=st.floats(-9, 9), decay=decays, steps=st.integers(1, 20))
def test_constant_target_has_a_closed_form(start, target, decay, steps):
    model = one_weight(start)
    ema = GeneratorEMA(model, decay=decay)
    set_weight(model, target)
    for _ in range(steps):
        ema.update(model)
    expected = target + decay**steps * (start - target)
    # 20 updates of numbers below 20 round by at most 20 * 20 * 2^-52
    assert abs(ema.model.weight.item() - expected) < 1e-12
    assert ema.num_updates == steps


@given(start=st.floats(-9, 9), history=histories, decay=decays, warmup=st.booleans())
def test_average_equals_the_definition_and_stays_within_its_history(start, history, decay, warmup):
    model = one_weight(start)
    ema = GeneratorEMA(model, decay=decay, warmup=warmup)
    expected = start
    for step, value in enumerate(history):
        ema.update(set_weight(model, value))
        share = min(decay, (1 + step) / (10 + step)) if warmup else decay
        expected = share * expected + (1 - share) * value
    found = ema.model.weight.item()
    assert abs(found - expected) < 1e-11
    # a convex combination leaves its range by rounding only
    assert min(start, *history) - 1e-12 <= found <= max(start, *history) + 1e-12


@given(seeds=st.lists(st.integers(0, 99), min_size=1, max_size=4))
def test_decay_0_copies_and_decay_1_keeps_the_start(seeds):
    model = Net()
    start = copy.deepcopy(model)
    copied, kept = GeneratorEMA(model, decay=0), GeneratorEMA(model, decay=1)
    for seed in seeds:
        scramble(model, seed)
        copied.update(model)
        kept.update(model)
    for name, param in model.named_parameters():
        assert_equal(copied.model.get_parameter(name), param.detach())
        assert_equal(kept.model.get_parameter(name), start.get_parameter(name).detach())


def test_decay_0_copies_where_the_difference_overflows():
    model = one_weight(3e38, torch.float32)
    ema = GeneratorEMA(model, decay=0)
    ema.update(set_weight(model, -3e38))
    assert_equal(ema.model.weight, model.weight.detach())


def test_buffers_are_copied_never_averaged():
    model = Net()
    ema = GeneratorEMA(model, decay=0.9)
    for seed in range(3):
        ema.update(scramble(model, seed))
    assert len(dict(model.named_buffers())) == 5
    for name, buffer in model.named_buffers():
        assert_equal(ema.model.get_buffer(name), buffer)


def test_frozen_and_tied_and_empty_parameters():
    model = Net()
    ema = GeneratorEMA(model, decay=0.3)
    for seed in range(5):
        ema.update(scramble(model, seed))
    assert_equal(ema.model.frozen, model.frozen)
    assert ema.model.tied.weight is ema.model.head.weight
    assert ema.model.empty.shape == (0,)


@given(decay=st.floats(0.5, 0.999), seed=st.integers(0, 99))
@settings(max_examples=20)
def test_parameters_average_as_torch_does(decay, seed):
    model = scramble(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), seed)
    ema = GeneratorEMA(model, decay=decay)
    oracle = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay))
    # torch's first update copies; ours starts from the copy made at construction
    oracle.update_parameters(model)
    for step in range(4):
        scramble(model, seed + step)
        ema.update(model)
        oracle.update_parameters(model)
    for ours, theirs in zip(ema.model.parameters(), oracle.module.parameters(), strict=True):
        assert_equal(ours, theirs.detach())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_are_averaged_in_float32(dtype):
    model = one_weight(0.0, dtype)
    model.register_buffer("scale", torch.ones(2, dtype=dtype))
    model.register_buffer("count", torch.ones(2, dtype=torch.int64))
    ema = GeneratorEMA(model, decay=0.9999)
    set_weight(model, 1.0)
    for _ in range(1500):
        ema.update(model)
    weight = ema.model.weight
    assert weight.dtype == ema.model.scale.dtype == torch.float32
    assert ema.model.count.dtype == torch.int64
    # bfloat16 would stop near 0.03
    assert abs(weight.item() - (1 - 0.9999**1500)) < 1e-4
    assert model.weight.dtype == dtype


@given(decay=st.floats(0.9, 0.999), seed=st.integers(0, 99))
@settings(max_examples=10)
def test_float32_average_of_a_bfloat16_model_is_close_to_float64(decay, seed):
    generator = torch.Generator().manual_seed(seed)
    model = nn.Linear(5, 5, bias=False).bfloat16()
    ema = GeneratorEMA(model, decay=decay)
    expected = model.weight.detach().double()
    for _ in range(50):
        value = torch.randn(5, 5, generator=generator).bfloat16()
        with torch.no_grad():
            model.weight.copy_(value)
        ema.update(model)
        expected = decay * expected + (1 - decay) * value.double()
    # 50 float32 roundings of numbers of order one
    torch.testing.assert_close(ema.model.weight.double(), expected, rtol=0, atol=1e-5)


def test_float64_models_stay_in_float64():
    model = Net().double()
    ema = GeneratorEMA(model)
    ema.update(model)
    assert ema.model.conv.weight.dtype == torch.float64


def test_spectral_norm_of_the_average_is_one():
    torch.manual_seed(0)
    model = spectral_normalize_(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3)))
    ema = GeneratorEMA(model, decay=0.99)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.0, 0.99))
    for _ in range(100):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 8, 8)).square().mean().backward()
        optimizer.step()
        ema.update(model)
    for layer in (ema.model[0], ema.model[2]):
        sigma = torch.linalg.matrix_norm(effective_weight(layer).flatten(1), 2).item()
        assert abs(sigma - 1) < 0.005
    assert ema.model is ema.model


def test_spectral_vectors_are_refreshed_once_per_update(monkeypatch):
    calls = []
    monkeypatch.setattr("dpsims_reference.ema.refresh_spectral_norm_", calls.append)
    model = one_weight()
    ema = GeneratorEMA(model)
    ema.update(model)
    ema.update(model)
    first, second = ema.model, ema.model
    assert calls == [first] == [second]


class Wrapped(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("kind", ["compile", "ddp", "both"])
def test_names_of_wrapped_models_match(kind):
    model = Net()
    wrapped = torch.compile(model, backend="eager") if kind != "ddp" else Wrapped(model)
    wrapped = Wrapped(wrapped) if kind == "both" else wrapped
    ema = GeneratorEMA(wrapped if kind == "compile" else model, decay=0)
    assert isinstance(ema.model, Net)
    scramble(model, 1)
    ema.update(wrapped)
    assert_equal(ema.model.conv.weight, model.conv.weight.detach())


def test_a_model_inside_distributed_data_parallel(tmp_path):
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        model = Net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        ema = GeneratorEMA(wrapped, decay=0)
        scramble(model, 1)
        ema.update(wrapped)
    finally:
        distributed.destroy_process_group()
    assert type(ema.model) is Net
    assert_equal(ema.model.conv.weight, model.conv.weight.detach())


def test_matching_is_by_name_not_by_order():
    first = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    second = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    ema = GeneratorEMA(first, decay=0)
    ema.update(second)
    assert_equal(ema.model["a"].weight, second["a"].weight.detach())


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: Net(5), ["conv.weight", "conv.bias"]),
        (lambda: nn.Linear(1, 1), ["conv.weight", "empty"]),
    ],
    ids=["shape", "names"],
)
def test_changed_structure_is_refused(make, names):
    ema = GeneratorEMA(Net())
    before = copy.deepcopy(ema.model.state_dict())
    with pytest.raises(IncompatibleCheckpointError) as caught:
        ema.update(make())
    assert_message(caught.value, "GeneratorEMA.update: model must", *names)
    assert ema.num_updates == 0
    for name, tensor in ema.model.state_dict().items():
        assert_equal(tensor, before[name])


def test_a_buffer_that_appears_later_is_refused():
    model = Net()
    ema = GeneratorEMA(model)
    model.register_buffer("late", torch.zeros(1))
    with pytest.raises(IncompatibleCheckpointError, match="late"):
        ema.update(model)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@given(index=st.integers(0, 3), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=8)
def test_parameters_that_are_not_finite_are_refused(value, index, dtype):
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 3)).to(dtype)
    ema = GeneratorEMA(model, decay=0.5)
    before = copy.deepcopy(ema.model.state_dict())
    name, param = list(model.named_parameters())[index]
    with torch.no_grad():
        param.view(-1)[-1] = value
    with pytest.raises(NonFiniteError) as caught:
        ema.update(model)
    assert_message(caught.value, "GeneratorEMA.update", "finite", name)
    assert ema.num_updates == 0
    for key, tensor in ema.model.state_dict().items():
        assert_equal(tensor, before[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_large_finite_parameters_are_accepted(dtype):
    # the norm of this overflows, no value does
    model = nn.Linear(64, 64, bias=False).to(dtype)
    with torch.no_grad():
        model.weight.fill_(torch.finfo(dtype).max / 4)
    ema = GeneratorEMA(model)
    ema.update(model)
    assert ema.num_updates == 1


def test_model_without_parameters():
    ema = GeneratorEMA(nn.ReLU())
    ema.update(nn.ReLU())
    assert ema.num_updates == 1


def test_average_has_no_gradient_and_stays_in_evaluation_mode():
    model = Net().train()
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    ema = GeneratorEMA(model)
    ema.update(model)
    assert all(p.grad is None and not p.requires_grad for p in ema.model.parameters())
    assert not any(module.training for module in ema.model.modules())
    assert model.training
    assert model.conv.weight.requires_grad
    assert not ema.model(torch.randn(2, 3, 5, 5)).requires_grad


def test_using_the_average_leaves_the_trained_model_alone():
    model = Net()
    ema = GeneratorEMA(model)
    ema.update(scramble(model, 1))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="size"):
        ema.model(torch.randn(2, 3, 1, 1))
    scramble(ema.model.requires_grad_(True), 2)
    for name, tensor in model.state_dict().items():
        assert_equal(tensor, before[name])


def test_the_average_may_live_elsewhere_in_another_dtype():
    model = one_weight(1.0, torch.float32)
    ema = GeneratorEMA(model, decay=0.5)
    ema.model.double()
    ema.update(set_weight(model, 2.0))
    assert ema.model.weight.item() == 1.5


@given(steps=st.integers(0, 4), warmup=st.booleans())
@settings(max_examples=10)
def test_restored_average_goes_on_as_the_first(tmp_path_factory, steps, warmup):
    model = Net()
    ema = GeneratorEMA(model, decay=0.9, warmup=warmup)
    for seed in range(steps):
        ema.update(scramble(model, seed))
    with CheckpointStore(tmp_path_factory.mktemp("store")) as store:
        tensors, state = ema.state()
        store.save(steps, {"ema": tensors}, {"ema": state})
        saved = store.load(steps)
    other = GeneratorEMA(Net(), decay=0.9, warmup=warmup)
    other.load(saved.tensors["ema"], saved.state["ema"])
    assert other.num_updates == steps
    for seed in (7, 8):
        scramble(model, seed)
        ema.update(model)
        other.update(model)
    for (name, ours), theirs in zip(
        other.model.state_dict().items(), ema.model.state_dict().values(), strict=True
    ):
        assert_equal(ours, theirs)
        assert name


def test_loading_another_decay_warns_and_keeps_the_step():
    ema = GeneratorEMA(one_weight(), decay=0.5)
    tensors, state = GeneratorEMA(one_weight(2.0), decay=0.9).state()
    state["num_updates"] = 17
    with pytest.warns(RuntimeWarning, match=r"goes on with decay 0\.5; got 0\.9"):
        ema.load(tensors, state)
    assert ema.num_updates == 17
    assert ema.decay == 0.5
    assert ema.model.weight.item() == 2.0


@pytest.mark.parametrize("count", [None, -1, True, 1.0, "3"])
def test_state_without_a_count_is_refused(count):
    ema = GeneratorEMA(one_weight(1.0))
    tensors, state = GeneratorEMA(one_weight(2.0)).state()
    with pytest.raises(IncompatibleCheckpointError, match="num_updates"):
        ema.load(tensors, {**state, "num_updates": count})
    assert ema.model.weight.item() == 1.0


def test_tensors_that_do_not_fit_are_refused():
    ema = GeneratorEMA(one_weight(1.0))
    with pytest.raises(IncompatibleCheckpointError, match="ema must have"):
        ema.load({}, {"num_updates": 3})
    assert ema.num_updates == 0


def test_deepcopy_after_use():
    model = spectral_normalize_(Net())
    model(torch.randn(2, 3, 5, 5)).sum().backward()
    ema = GeneratorEMA(model, decay=0.5)
    ema.update(model)
    other = copy.deepcopy(ema)
    other.update(scramble(model, 1))
    assert (other.num_updates, ema.num_updates) == (2, 1)


@pytest.mark.parametrize(
    ("keywords", "error", "text"),
    [
        ({"decay": -0.1}, InputError, "decay must be finite and >= 0 and <= 1; got -0.1"),
        ({"decay": 1.1}, InputError, "got 1.1"),
        ({"decay": float("nan")}, InputError, "got nan"),
        ({"decay": "0.9"}, DTypeError, "decay must be a number; got str"),
        ({"decay": True}, DTypeError, "got bool"),
        ({"warmup": 1}, DTypeError, "warmup must be a bool; got int"),
    ],
)
def test_bad_settings(keywords, error, text):
    with pytest.raises(error) as caught:
        GeneratorEMA(nn.Linear(1, 1), **keywords)
    assert_message(caught.value, "GeneratorEMA: ", text)


def test_bad_model():
    with pytest.raises(DTypeError, match=r"model must be a torch\.nn\.Module; got list"):
        GeneratorEMA([1])
