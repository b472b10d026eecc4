from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from support import (
    Golden,
    assert_close64,
    assert_equal,
    assert_golden64,
    assert_message,
    golden_cases,
)
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from dpsims.errors import DTypeError, InputError
from dpsims.nn._spectral_norm import SpectralNorm
from dpsims.nn.labels import LabelConv2d
from dpsims.nn.spectral import (
    effective_weight,
    fold_spectral_norm_,
    refresh_spectral_norm_,
    spectral_normalize_,
)

LAYERS = {
    "linear": lambda: nn.Linear(4, 3),
    "conv1d": lambda: nn.Conv1d(2, 3, 3),
    "conv2d": lambda: nn.Conv2d(2, 3, 3),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "conv3d": lambda: nn.Conv3d(2, 3, 3),
    "transposed": lambda: nn.ConvTranspose2d(2, 3, 3),
    "labels": lambda: LabelConv2d(5, 3),
}
kinds = st.sampled_from(list(LAYERS))
seeds = st.integers(0, 2**16)


def build(kind, seed=0):
    """A float64 layer with its own random weight."""
    layer = LAYERS[kind]().double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.weight.normal_(generator=generator)
    return layer, spectral_normalize_(copy.deepcopy(layer), generator=generator)


def as_matrix(weight, kind):
    """Rows are outputs; the transposed convolution keeps them in its second axis."""
    array = weight.detach().numpy()
    array = np.swapaxes(array, 0, 1) if kind == "transposed" else array
    return array.reshape(array.shape[0], -1)


def norm_of(layer):
    return layer.parametrizations.weight[0]


def vectors(module):
    return {
        name: value.clone() for name, value in module.named_buffers() if name[-2:] in (".u", ".v")
    }


def assert_same_vectors(module, before):
    for name, value in vectors(module).items():
        assert_equal(value, before[name])


def discriminator():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.LeakyReLU(0.2),
        nn.Flatten(),
        nn.Linear(8 * 16, 1),
    )


# relations


# 300 steps an example
@settings(max_examples=15)
@given(kind=kinds, seed=seeds)
def test_largest_singular_value_is_one_after_convergence(kind, seed):
    _, layer = build(kind, seed)
    refresh_spectral_norm_(layer, iterations=300)
    largest = np.linalg.svd(as_matrix(effective_weight(layer), kind), compute_uv=False)[0]
    # the measured norm is a lower bound: two close values need long to part
    assert 1 - 1e-12 <= largest <= 1 + 1e-3


@given(kind=kinds, seed=seeds, scale=st.floats(1e-6, 1e6))
def test_scale_of_the_weight_does_not_matter(kind, seed, scale):
    _, layer = build(kind, seed)
    before = effective_weight(layer).clone()
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(scale)
    assert_close64(effective_weight(layer), before)
    assert_close64(layer.train().weight, copy.deepcopy(layer).weight, scale=1e9)


@given(kind=kinds, seed=seeds)
def test_reading_and_evaluation_change_nothing(kind, seed):
    _, layer = build(kind, seed)
    before = vectors(layer)
    assert_equal(effective_weight(layer.train()), effective_weight(layer))
    assert_equal(layer.eval().weight, effective_weight(layer))
    assert_same_vectors(layer, before)


@given(kind=kinds, seed=seeds)
def test_folding_keeps_the_outputs(kind, seed):
    _, layer = build(kind, seed)
    size = {"linear": (2, 4), "conv1d": (2, 2, 5), "conv3d": (1, 2, 4, 4, 4)}
    inputs = torch.randint(0, 5, (2, 4, 4))
    if kind != "labels":
        channels = 4 if kind == "grouped" else 2
        inputs = torch.randn(size.get(kind, (2, channels, 5, 4)), dtype=torch.float64)
    layer(inputs)
    parameter = layer.parametrizations.weight.original
    before = vectors(layer)
    expected = copy.deepcopy(layer).eval()(inputs)
    # in training too: folding takes no step
    folded = fold_spectral_norm_(copy.deepcopy(layer))
    assert_equal(folded.eval()(inputs), expected)
    assert_same_vectors(layer, before)
    assert fold_spectral_norm_(layer) is layer
    assert layer.weight is parameter
    assert type(layer) is type(LAYERS[kind]())
    assert set(layer.state_dict()) == set(LAYERS[kind]().state_dict())
    fold_spectral_norm_(layer)
    assert_equal(layer.weight, folded.weight)


def test_folding_a_copy_leaves_the_original_in_training():
    model = spectral_normalize_(discriminator())
    images = torch.randn(2, 3, 4, 4)
    expected = copy.deepcopy(model)(images)
    fold_spectral_norm_(copy.deepcopy(model))
    assert_equal(model(images), expected)
    fold_spectral_norm_(model)
    assert type(model[0]) is nn.Conv2d


def test_second_call_changes_nothing():
    model = spectral_normalize_(discriminator())
    before = copy.deepcopy(model.state_dict())
    assert spectral_normalize_(model) is model
    assert set(model.state_dict()) == set(before)
    for name, value in model.state_dict().items():
        assert_equal(value, before[name])
    assert all(len(model[i].parametrizations.weight) == 1 for i in (0, 2, 5))


# oracle


@given(kind=kinds, seed=seeds, steps=st.integers(1, 3))
def test_oracle(kind, seed, steps):
    plain, layer = build(kind, seed)
    matrix = as_matrix(plain.weight, kind)
    u = norm_of(layer).u.numpy().copy()
    for _ in range(steps):
        used = layer.weight
        v = matrix.T @ u
        v /= np.linalg.norm(v)
        u = matrix @ v
        u /= np.linalg.norm(u)
    sigma = u @ matrix @ v
    assert_close64(torch.from_numpy(as_matrix(used, kind) * sigma), torch.from_numpy(matrix))
    assert_close64(norm_of(layer).u, torch.from_numpy(u))
    assert_close64(norm_of(layer).v, torch.from_numpy(v))
    assert_equal(effective_weight(layer), used)
    # the gradient with u and v held: (G - <G, W'> u v^T) / sigma
    (grad,) = torch.autograd.grad(
        (used * plain.weight.detach().sin()).sum(), layer.parametrizations.weight.original
    )
    upstream = np.sin(matrix)
    inner = (upstream * matrix).sum() / sigma
    expected = (upstream - inner * np.outer(u, v)) / sigma
    assert_close64(torch.from_numpy(as_matrix(grad, kind)), torch.from_numpy(expected), scale=100)


@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_gradients(kind):
    plain, layer = build(kind)
    norm = norm_of(layer).eval()
    assert torch.autograd.gradcheck(norm, plain.weight)
    assert torch.autograd.gradgradcheck(norm, plain.weight)


def test_a_penalty_on_the_gradient_of_the_images_trains_the_weights():
    model = spectral_normalize_(discriminator()).double().eval()
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)

    def penalty(weight):
        call = {"0.parametrizations.weight.original": weight}
        scores = torch.func.functional_call(model, call, images)
        (grad,) = torch.autograd.grad(scores.sum(), images, create_graph=True)
        return grad.square().sum()

    weight = model[0].parametrizations.weight.original.detach().clone().requires_grad_()
    assert torch.autograd.gradcheck(penalty, weight, fast_mode=True)


# training


def test_one_step_per_forward_in_training():
    model, stepped = spectral_normalize_(discriminator()), []
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 4, 4)
    model(images)
    model(images)
    refresh_spectral_norm_(twin, iterations=2)
    for name, value in vectors(twin).items():
        assert_equal(vectors(model)[name], value)
        stepped.append(name)
    assert len(stepped) == 6


def test_label_convolution_takes_one_step_per_forward():
    layer = spectral_normalize_(LabelConv2d(5, 3, extra_channels=1))
    twin = refresh_spectral_norm_(copy.deepcopy(layer), iterations=1)
    layer(torch.randint(0, 5, (2, 4, 4)), torch.randn(2, 1, 4, 4))
    assert_same_vectors(layer, vectors(twin))


def test_the_optimizer_keeps_its_parameters():
    model = discriminator()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    spectral_normalize_(model)
    assert {id(p) for p in model.parameters()} == {
        id(p) for p in optimizer.param_groups[0]["params"]
    }
    before = effective_weight(model[0]).clone()
    model(torch.randn(2, 3, 4, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(effective_weight(model[0]), before)


@pytest.mark.parametrize("first_in_eval", [False, True])
def test_two_forwards_one_backward(first_in_eval):
    model = spectral_normalize_(discriminator()).double()
    real, fake = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64)
    twin = copy.deepcopy(model)
    (model.train(not first_in_eval)(real) - model.train()(fake)).sum().backward()
    twin.train(not first_in_eval)(real).sum().backward()
    (-twin.train()(fake)).sum().backward()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert_close64(one.grad, other.grad, scale=100)


def test_assigned_weight_is_normalised():
    layer = spectral_normalize_(nn.Linear(2, 2))
    with torch.no_grad():
        layer.weight = torch.diag(torch.tensor([4.0, 2.0]))
    refresh_spectral_norm_(layer)
    assert_equal(effective_weight(layer).detach(), torch.diag(torch.tensor([1.0, 0.5])))


# averaged weights


def test_average_is_normalised_after_a_refresh():
    model = spectral_normalize_(discriminator())
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.95))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(60):
        images = torch.randn(4, 3, 4, 4)
        loss = (model(images).squeeze(1) - images.mean((1, 2, 3))).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        average.update_parameters(model)
    average.eval()

    def deviation():
        layers = [average.module[i] for i in (0, 2, 5)]
        norms = [torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2) for layer in layers]
        return max(abs(norm.item() - 1) for norm in norms)

    before = deviation()
    refresh_spectral_norm_(average)
    assert deviation() < 0.005
    # the refresh is what does it
    assert deviation() < before


@pytest.mark.parametrize("kind", list(LAYERS))
def test_refresh_leaves_the_weight_alone(kind):
    _, layer = build(kind)
    before = layer.parametrizations.weight.original.clone()
    assert refresh_spectral_norm_(layer) is layer
    assert_equal(layer.parametrizations.weight.original, before)
    assert not norm_of(layer).u.requires_grad


# weights that have no norm


def test_zero_weight_stays_zero_and_finite():
    layer = nn.Conv2d(2, 3, 3, bias=False)
    nn.init.zeros_(layer.weight)
    spectral_normalize_(layer)
    images = torch.randn(2, 2, 4, 4)
    for _ in range(2):
        out = layer(images)
        assert_equal(out, torch.zeros_like(out))
    out.sum().backward()
    grad = layer.parametrizations.weight.original.grad
    plain = nn.Conv2d(2, 3, 3, bias=False)
    plain(images).sum().backward()
    torch.testing.assert_close(grad, plain.weight.grad)
    # it wakes up with the weight
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    refresh_spectral_norm_(layer, iterations=200)
    largest = torch.linalg.matrix_norm(effective_weight(layer).flatten(1), 2)
    torch.testing.assert_close(largest, torch.ones(()), rtol=1e-3, atol=0)


def test_nan_weight_shows_and_does_not_stick():
    layer = spectral_normalize_(nn.Linear(3, 2))
    with torch.no_grad():
        layer.parametrizations.weight.original[0, 0] = torch.nan
    assert bool(layer(torch.ones(1, 3))[0, 0].isnan())
    with torch.no_grad():
        layer.parametrizations.weight.original.normal_()
    assert bool(layer(torch.ones(1, 3)).isfinite().all())


def test_tiny_weights_keep_their_direction():
    layer = spectral_normalize_(nn.Linear(3, 2))
    with torch.no_grad():
        layer.parametrizations.weight.original.mul_(1e-9)
    assert effective_weight(layer).norm() > 0.9


# which layers


class Gate(nn.Module):
    """A weight matrix in a module that is no layer."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2, 2))


def test_which_layers_are_normalised():
    model = nn.ModuleDict({name: make() for name, make in LAYERS.items()})
    model["norm"], model["embedding"] = nn.LayerNorm((2, 2)), nn.Embedding(3, 4)
    model["gate"] = Gate()
    spectral_normalize_(model)
    done = {name for name, layer in model.items() if parametrize.is_parametrized(layer)}
    assert done == set(LAYERS)
    assert all(isinstance(norm_of(model[name]), SpectralNorm) for name in done)


def test_frozen_and_skipped_layers_are_left_alone():
    model = nn.ModuleDict({"backbone": discriminator(), "head": discriminator(), "x": Gate()})
    model["backbone"].requires_grad_(False)
    spectral_normalize_(model, skip=[model["head"][2], model["x"]])
    assert not vectors(model["backbone"])
    assert {name.split(".")[0] for name in vectors(model["head"])} == {"0", "5"}
    spectral_normalize_(model["head"], skip=(model["head"],))
    assert len(vectors(model["head"])) == 4


def test_shared_layer_is_normalised_once():
    layer = nn.Linear(2, 2)
    spectral_normalize_(nn.Sequential(layer, layer))
    assert len(layer.parametrizations.weight) == 1


def test_later_parametrizations_are_kept_in_the_chain():
    class Double(nn.Module):
        def forward(self, weight):
            return 2 * weight

    layer = spectral_normalize_(nn.Linear(3, 2))
    once = effective_weight(layer).clone()
    parametrize.register_parametrization(layer, "weight", Double(), unsafe=True)
    assert_equal(effective_weight(layer), 2 * once)
    assert_equal(fold_spectral_norm_(layer).weight.detach(), 2 * once.detach())


def test_effective_weight_of_a_plain_layer():
    layer = nn.Linear(2, 2)
    assert effective_weight(layer) is layer.weight


# dtypes, layouts, copies, compilation


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_modules_keep_wide_vectors(dtype):
    layer = spectral_normalize_(nn.Linear(16, 8)).to(dtype)
    layer(torch.randn(2, 16, dtype=dtype)).sum().backward()
    refresh_spectral_norm_(layer, iterations=100)
    weight = effective_weight(layer)
    assert weight.dtype == dtype
    assert norm_of(layer).u.dtype == norm_of(layer).v.dtype == torch.float32
    largest = torch.linalg.matrix_norm(weight.float(), 2).item()
    # each entry is rounded once; the norm is computed in float32
    assert abs(largest - 1) < torch.finfo(dtype).eps
    assert bool(layer.parametrizations.weight.original.grad.isfinite().all())
    assert norm_of(layer.double()).u.dtype == torch.float64


def test_autocast_does_not_touch_the_power_method():
    model = spectral_normalize_(discriminator())
    twin = copy.deepcopy(model)
    images = torch.randn(2, 3, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        out = model(images)
    assert out.dtype == torch.bfloat16
    twin(images)
    assert_same_vectors(model, vectors(twin))


def test_channels_last_weights_stay_so():
    model = discriminator().to(memory_format=torch.channels_last)
    plain = copy.deepcopy(model)
    spectral_normalize_(model, generator=torch.Generator().manual_seed(0))
    expected = spectral_normalize_(
        plain.to(memory_format=torch.contiguous_format), generator=torch.Generator().manual_seed(0)
    )
    assert model[2].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(effective_weight(model[2]), expected[2].weight)


def test_copies_after_a_forward():
    model = spectral_normalize_(discriminator())
    images = torch.randn(2, 3, 4, 4)
    model(images).sum().backward()
    twin = copy.deepcopy(model)
    other = spectral_normalize_(discriminator())
    other.load_state_dict(model.state_dict())
    for each in (twin, other):
        # the next training steps are the same too
        assert_equal(each(images), copy.deepcopy(model)(images))
        assert_equal(each.eval()(images), each(images))
    before = vectors(model)
    twin.train()(images)
    assert_same_vectors(model, before)


def test_pickling_names_the_way_out():
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(spectral_normalize_(nn.Linear(2, 2)))


def test_generator_decides_the_start():
    layer = nn.Linear(5, 4)
    state = torch.get_rng_state()
    starts = [
        vectors(
            spectral_normalize_(
                copy.deepcopy(layer), generator=torch.Generator().manual_seed(seed)
            )
        )
        for seed in (1, 1, 2)
    ]
    assert_equal(torch.get_rng_state(), state)
    for name, value in starts[0].items():
        assert_equal(starts[1][name], value)
        assert not torch.equal(starts[2][name], value)
        assert_close64(value.double().norm(), torch.ones(()).double(), scale=1e4)


def test_meta_modules():
    model = spectral_normalize_(discriminator().to("meta"))
    assert model(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 1)
    assert fold_spectral_norm_(model)[0].weight.device.type == "meta"


# bad inputs


@pytest.mark.parametrize(
    ("call", "name"),
    [
        pytest.param(spectral_normalize_, "module", id="normalize"),
        pytest.param(fold_spectral_norm_, "module", id="fold"),
        pytest.param(refresh_spectral_norm_, "module", id="refresh"),
        pytest.param(effective_weight, "layer", id="weight"),
    ],
)
@pytest.mark.parametrize("module", [None, "model", torch.ones(2, 2), nn.Linear], ids=repr)
def test_not_a_module(call, name, module):
    with pytest.raises(DTypeError) as caught:
        call(module)
    text = f"{call.__name__}: {name} must be a torch.nn.Module; got {type(module).__name__}"
    assert_message(caught.value, text)


def test_bad_skip():
    with pytest.raises(DTypeError) as caught:
        spectral_normalize_(nn.Linear(2, 2), skip=["head"])
    assert_message(caught.value, "spectral_normalize_: skip must hold torch.nn.Module", "str")


@pytest.mark.parametrize("iterations", [0, -1, True, 1.5, "3"])
def test_bad_iterations(iterations):
    error = InputError if type(iterations) is int else DTypeError
    with pytest.raises(error) as caught:
        refresh_spectral_norm_(nn.Linear(2, 2), iterations=iterations)
    assert_message(caught.value, "refresh_spectral_norm_: iterations must be", str(iterations))


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (lambda: parametrizations.spectral_norm(nn.Linear(2, 2)), "no plain parameter"),
        (lambda: parametrizations.weight_norm(nn.Linear(2, 2)), "no plain parameter"),
        (lambda: nn.LazyLinear(2), "not initialised yet"),
    ],
    ids=["spectral_norm", "weight_norm", "lazy"],
)
def test_layers_that_cannot_be_normalised(layer, reason):
    model = nn.Sequential(nn.Linear(2, 2), layer())
    with pytest.raises(InputError) as caught:
        spectral_normalize_(model)
    assert_message(caught.value, "spectral_normalize_: module must hold", "'1'", reason)
    # nothing was changed on the way
    assert not parametrize.is_parametrized(model[0])
    with pytest.raises(InputError) as caught:
        spectral_normalize_(model[1])
    assert_message(caught.value, "'itself'")


def test_no_weight_to_read():
    with pytest.raises(InputError) as caught:
        effective_weight(nn.ReLU())
    assert_message(caught.value, "effective_weight: layer must have a weight; got ReLU")


# golden vectors


@pytest.mark.parametrize("case", golden_cases("d_spectral_norm"))
def test_golden(case):
    golden = Golden(case)
    weight = golden.tensor("weight_orig")
    layer = nn.Linear(7, 4) if weight.ndim == 2 else nn.Conv2d(3, 5, 3, padding=1)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(golden.tensor("bias"))
    spectral_normalize_(layer.double())
    norm = norm_of(layer)
    norm.u.copy_(golden.tensor("u0"))
    norm.v.copy_(golden.tensor("v0"))
    inputs = golden.tensor("x", torch.float64).requires_grad_()

    out = layer(inputs)
    (out * golden.tensor("gout")).sum().backward()
    assert_golden64(out, golden, "y1")
    assert_golden64(norm.u, golden, "u1")
    assert_golden64(norm.v, golden, "v1")
    used = effective_weight(layer)
    assert_golden64(used, golden, "weight1")
    original = layer.parametrizations.weight.original
    assert_golden64((original / used).mean(), golden, "sigma1")
    assert_golden64(inputs.grad, golden, "grad_x")
    assert_golden64(original.grad, golden, "grad_weight_orig")

    assert_golden64(layer(inputs), golden, "y2")
    assert_golden64(norm.u, golden, "u2")
    assert_golden64(norm.v, golden, "v2")
    assert_golden64((original / effective_weight(layer)).mean(), golden, "sigma2")
    assert_golden64(layer.eval()(inputs), golden, "y_eval")

    layer.train()
    for _ in range(50):
        layer(inputs)
    sigma = (original / effective_weight(layer)).mean()
    assert_golden64(sigma, golden, "sigma_50")
    refresh_spectral_norm_(layer, iterations=2000)
    assert_golden64((original / effective_weight(layer)).mean(), golden, "sigma_true")
