import copy

import pytest
import torch
from hypothesis import given, strategies as st
from support import assert_equal, assert_message
from torch import nn

from dpsims.errors import DTypeError, IncompatibleCheckpointError, NonFiniteError
from dpsims.nn import BatchNorm2d, spectral_normalize_
from dpsims_reference.checkpoints import CheckpointStore, load_module_, module_tensors


def network(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.Conv2d(4, 2, 1, bias=False))
    model[0] = spectral_normalize_(model[0])
    return model


class Noted(nn.Linear):
    """A layer with extra state that is no tensor."""

    note = None

    def get_extra_state(self):
        return {"note": self.note}

    def set_extra_state(self, state):
        self.note = state["note"]


class Wrapped(nn.Module):
    """Names as ``DistributedDataParallel`` makes them, without a process group."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def wrap(model, kind):
    if kind == "compile":
        return torch.compile(model, backend="eager")
    if kind == "ddp":
        return Wrapped(model)
    if kind == "compile-ddp":
        return torch.compile(Wrapped(model), backend="eager")
    if kind == "ddp-compile":
        return Wrapped(torch.compile(model, backend="eager"))
    if kind == "inner-compile":
        return nn.Sequential(torch.compile(model[0], backend="eager"), *model[1:])
    return model


WRAPPERS = ["plain", "compile", "ddp", "compile-ddp", "ddp-compile", "inner-compile"]


def assert_same_module(first, second):
    ours, theirs = module_tensors(first), module_tensors(second)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert_equal(tensor, theirs[name])


@pytest.mark.parametrize("saved", WRAPPERS)
@pytest.mark.parametrize("live", WRAPPERS)
def test_wrappers_do_not_matter(saved, live):
    source, target = network(1), network(2)
    load_module_(wrap(target, live), wrap(source, saved).state_dict(), name="generator")
    assert_same_module(target, source)


def test_round_trip_through_a_store(tmp_path):
    source, target = network(1), network(2)
    source(torch.randn(2, 3, 8, 8))
    with CheckpointStore(tmp_path) as store:
        store.save(1, {"generator": module_tensors(source)}, {})
        load_module_(target, store.load(1).tensors["generator"], name="generator")
    assert_same_module(target, source)
    image = torch.randn(2, 3, 8, 8)
    assert_equal(target.eval()(image), source.eval()(image))


def test_a_child_that_is_called_module_is_not_mistaken():
    model = nn.Module()
    model.module, model.head = nn.Linear(2, 2), nn.Linear(2, 2)
    assert sorted(module_tensors(model)) == [
        "head.bias",
        "head.weight",
        "module.bias",
        "module.weight",
    ]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    tensors = {"0.weight": torch.ones(2, 2), "1.weight": torch.ones(2, 2)}
    load_module_(model, tensors, name="tied")
    assert model[1].weight is model[0].weight
    assert_equal(model[0].weight.detach(), torch.ones(2, 2))


def test_parameters_keep_their_identity_and_the_checkpoint_its_values():
    model = network()
    weight = model[2].weight
    tensors = {name: value.clone() for name, value in network(1).state_dict().items()}
    load_module_(model, tensors, name="generator")
    assert model[2].weight is weight
    with torch.no_grad():
        weight.zero_()
    assert tensors["2.weight"].abs().sum() > 0


@given(note=st.none() | st.text() | st.lists(st.integers()))
def test_extra_state_travels_as_json(note):
    source, target = Noted(2, 1), Noted(2, 1)
    source.note = note
    load_module_(target, module_tensors(source), name="noted")
    assert target.note == note


def test_extra_state_that_json_lacks():
    layer = Noted(2, 1)
    layer.note = {1, 2}
    with pytest.raises(DTypeError, match="_extra_state"):
        module_tensors(layer)


FAULTS = {
    "missing": (lambda t: t.pop("2.weight"), "missing: 2.weight"),
    "unexpected": (lambda t: t.update(extra=torch.ones(1)), "unexpected: extra"),
    "shape": (
        lambda t: t.update({"2.weight": torch.ones(2, 4)}),
        "2.weight (2, 4) not (2, 4, 1, 1)",
    ),
    "dtype": (lambda t: t.update({"2.weight": t["2.weight"].double()}), "dtype: 2.weight"),
    "counter-dtype": (
        lambda t: t.update({"1.num_batches_tracked": torch.tensor(0.0)}),
        "dtype: 1.num_batches_tracked",
    ),
}


@pytest.mark.parametrize(("change", "text"), FAULTS.values(), ids=FAULTS.keys())
def test_misfits_are_refused_before_the_first_copy(change, text):
    model = network(1)
    before = copy.deepcopy(model)
    tensors = dict(network(2).state_dict())
    change(tensors)
    with pytest.raises(IncompatibleCheckpointError) as caught:
        load_module_(model, tensors, name="generator")
    assert_message(caught.value, "load_module_: generator must", text)
    assert_same_module(model, before)


def test_only_ten_of_each_kind_are_listed():
    tensors = {f"t{i:02}": torch.ones(1) for i in range(25)}
    with pytest.raises(IncompatibleCheckpointError) as caught:
        load_module_(nn.ParameterList(torch.ones(1) for _ in range(12)), tensors, name="g")
    assert_message(caught.value, "missing: 0, 1,", "and 2 more", "t09 and 15 more")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float8_e5m2])
def test_values_that_are_not_finite_need_a_word(value, dtype):
    layer = nn.Module()
    layer.register_buffer("good", torch.zeros(2))
    layer.register_buffer("bad", torch.zeros(2).to(dtype))
    tensors = {"good": torch.ones(2), "bad": torch.tensor([1.0, value]).to(dtype)}
    with pytest.raises(NonFiniteError) as caught:
        load_module_(layer, tensors, name="generator")
    assert_message(caught.value, "generator must hold finite values", "bad")
    assert_equal(layer.good, torch.zeros(2))
    load_module_(layer, tensors, name="generator", allow_nonfinite=True)
    assert not layer.bad.float().isfinite().all()


def test_a_refusal_of_the_module_itself():
    class Picky(nn.Linear):
        def _load_from_state_dict(self, *args):
            args[-1].append("trained beside other frozen weights")

    with pytest.raises(IncompatibleCheckpointError, match="other frozen weights"):
        load_module_(Picky(1, 1), Picky(1, 1).state_dict(), name="g")
