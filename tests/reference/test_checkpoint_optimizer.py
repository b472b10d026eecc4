import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_equal, assert_message

from dpsims.errors import DTypeError, IncompatibleCheckpointError
from dpsims_reference.checkpoints import CheckpointStore, load_optimizer_, optimizer_tensors

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.99)),
    "amsgrad": lambda p: torch.optim.Adam(p, amsgrad=True),
    "adam-fused": lambda p: torch.optim.Adam(p, fused=True),
    "adam-tensor-rate": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-2)),
    "groups": lambda p: torch.optim.Adam([{"params": p[:1], "lr": 0.1}, {"params": p[1:]}]),
    "named": lambda p: torch.optim.Adam([("a", p[0]), ("b", p[1])]),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd-without-state": lambda p: torch.optim.SGD(p, lr=0.1),
    "radam": lambda p: torch.optim.RAdam(p),
}


def parameters(seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((3, 2), (4,))
    return [torch.randn(s, generator=generator).to(dtype).requires_grad_() for s in shapes]


def train(optimizer, params, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for param in params:
            param.grad = torch.randn(param.shape, generator=generator).to(param.dtype)
        optimizer.step()


def build(name, params):
    return OPTIMIZERS[name](params)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, name, dtype):
    params = parameters(dtype=dtype)
    optimizer = build(name, params)
    train(optimizer, params, 3)
    with CheckpointStore(tmp_path) as store:
        tensors, state = optimizer_tensors(optimizer)
        weights = {str(i): param for i, param in enumerate(params)}
        store.save(3, {"optim": tensors, "g": weights}, state)
        saved = store.load(3)
    resumed_params = [saved.tensors["g"][str(i)].requires_grad_() for i in range(2)]
    resumed = build(name, resumed_params)
    load_optimizer_(resumed, saved.tensors["optim"], saved.state)
    train(optimizer, params, 3, seed=2)
    train(resumed, resumed_params, 3, seed=2)
    for ours, theirs in zip(resumed_params, params, strict=True):
        assert_equal(ours.detach(), theirs.detach())
    assert resumed.state_dict()["param_groups"] == optimizer.state_dict()["param_groups"]


@given(steps=st.integers(0, 4), skip_second=st.booleans())
def test_state_survives_bit_for_bit(steps, skip_second):
    params = parameters()
    optimizer = build("adam", params)
    for _ in range(steps):
        params[0].grad = torch.randn(3, 2)
        params[1].grad = None if skip_second else torch.randn(4)
        optimizer.step()
    other = build("adam", parameters(1))
    load_optimizer_(other, *optimizer_tensors(optimizer))
    ours, theirs = optimizer_tensors(other), optimizer_tensors(optimizer)
    assert ours[1] == theirs[1]
    assert ours[0].keys() == theirs[0].keys()
    for name, tensor in theirs[0].items():
        assert_equal(ours[0][name], tensor)


def test_the_checkpoint_is_not_written_to_by_later_steps():
    params = parameters()
    optimizer = build("adam", params)
    train(optimizer, params, 1)
    tensors, state = optimizer_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    others = parameters(1)
    other = build("adam", others)
    load_optimizer_(other, kept, state)
    before = {name: tensor.clone() for name, tensor in kept.items()}
    train(other, others, 2)
    for name, tensor in kept.items():
        assert_equal(tensor, before[name])


def test_tuples_come_back_as_tuples_and_unknown_settings_stay():
    optimizer = build("adam", parameters())
    tensors, state = optimizer_tensors(optimizer)
    assert state["param_groups"][0]["betas"] == [0.0, 0.99]
    del state["param_groups"][0]["eps"]
    other = torch.optim.Adam(parameters(1), eps=0.5)
    load_optimizer_(other, tensors, state)
    assert other.param_groups[0]["betas"] == (0.0, 0.99)
    assert other.param_groups[0]["eps"] == 0.5
    assert other.param_groups[0]["lr"] == 1e-2


def misfit(**changes):
    params = parameters()
    optimizer = build("groups", params)
    train(optimizer, params, 1)
    tensors, state = optimizer_tensors(optimizer)
    tensors, state = dict(tensors), dict(state)
    for name, value in changes.items():
        key = name.replace("_DOT_", ".").removeprefix("t")
        if name.startswith("t0"):
            tensors[key] = value
        else:
            state[name] = value
    return tensors, state


FAULTS = {
    "kind": (lambda: misfit(optimizer="SGD"), "of the optimiser Adam; got SGD"),
    "kind-missing": (lambda: (misfit()[0], {}), "got None"),
    "tensor-missing": (lambda: misfit(tensors=["0.step"]), "saved with this state"),
    "shape": (lambda: misfit(t0_DOT_exp_avg=torch.ones(2, 2)), "have shape (3, 2); got (2, 2)"),
    "dtype": (
        lambda: misfit(t0_DOT_exp_avg=torch.ones(3, 2).double()),
        "have dtype torch.float32",
    ),
}


@pytest.mark.parametrize(("make", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_misfits_are_refused_and_change_nothing(make, text):
    params = parameters(1)
    optimizer = build("groups", params)
    train(optimizer, params, 1)
    before = optimizer_tensors(optimizer)
    kept = {name: tensor.clone() for name, tensor in before[0].items()}
    with pytest.raises(IncompatibleCheckpointError) as caught:
        load_optimizer_(optimizer, *make())
    assert_message(caught.value, "load_optimizer_", text)
    after = optimizer_tensors(optimizer)
    assert after[1] == before[1]
    for name, tensor in after[0].items():
        assert_equal(tensor, kept[name])


@pytest.mark.parametrize("saved", ["adam", "groups"])
def test_other_parameter_groups_are_refused(saved):
    live = {"adam": "groups", "groups": "adam"}[saved]
    with pytest.raises(IncompatibleCheckpointError, match="params in every group"):
        load_optimizer_(build(live, parameters()), *optimizer_tensors(build(saved, parameters())))


def test_parameters_in_another_order_are_refused_if_named():
    first, second = parameters()
    saved = torch.optim.Adam([("a", first), ("b", second)])
    live = torch.optim.Adam([("b", second), ("a", first)])
    with pytest.raises(IncompatibleCheckpointError, match="param_names"):
        load_optimizer_(live, *optimizer_tensors(saved))


def test_settings_that_json_lacks():
    optimizer = torch.optim.SGD([{"params": parameters(), "rule": len}], lr=0.1)
    with pytest.raises(DTypeError, match="rule"):
        optimizer_tensors(optimizer)
