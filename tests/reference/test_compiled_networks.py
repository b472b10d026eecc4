"""The reference networks trace into one graph and equal eager, in training and evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from tracing import CountingBackend, assert_near, free_sizes, one_graph
from unit_run import unit_config

from dpsims_reference.config import Config
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator
from dpsims_reference.presets import preset

pytestmark = pytest.mark.compile

Inputs = Callable[[Config, int, tuple[int, int]], list[Tensor]]


def tiny_config() -> Config:
    tiny = preset("tiny")
    return replace(tiny, discriminator=replace(tiny.discriminator, pretrained=False, weights=None))


def with_oasis(config: Config) -> Config:
    return replace(config, generator=replace(config.generator, architecture="oasis"))


def maps_and_latents(config: Config, batch: int, size: tuple[int, int]) -> list[Tensor]:
    labels = torch.randint(config.data.num_classes, (batch, *size))
    return [labels, torch.randn(batch, config.generator.latent_dim)]


def pictures(config: Config, batch: int, size: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(batch, 3, *size) * 2 - 1]


NETWORKS = {
    "generator": (build_generator, maps_and_latents, lambda config: config),
    "discriminator": (build_discriminator, pictures, lambda config: config),
    "oasis-generator": (build_generator, maps_and_latents, with_oasis),
}


def each_network(test: Callable[..., None]) -> Callable[..., None]:
    rows = [pytest.param(*row, id=name) for name, row in NETWORKS.items()]
    return pytest.mark.parametrize(("build", "draw", "change"), rows)(test)


def twins(build: Callable[[Config], nn.Module], config: Config) -> list[nn.Module]:
    """Two equal networks with open gates."""
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        made.append(build(config))
        for name, parameter in made[-1].named_parameters():
            if name.endswith("gate"):
                nn.init.constant_(parameter, 0.7)
    return made


def results(network: nn.Module, called: Callable[..., object], inputs: list[Tensor]):
    """Outputs, gradients of inputs and parameters, and what is left in the buffers."""
    inputs = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    out = called(*inputs)
    outputs = [out] if isinstance(out, Tensor) else [*out]
    asked = [x for x in (*inputs, *network.parameters()) if x.requires_grad]
    total = sum(x.double().square().mean() for x in outputs)
    return [*outputs, *torch.autograd.grad(total, asked), *network.buffers()]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@each_network
def test_one_graph_in_training_and_evaluation_that_other_weights_keep(build, draw, change):
    config = change(tiny_config())
    eager, traced = twins(build, config)
    backend = CountingBackend()
    compiled = one_graph(traced, backend)
    inputs = draw(config, 2, config.data.image_size)
    for training in (True, False):
        wanted = results(eager.train(training), eager, inputs)
        # some gradients are sums of thousands of float32 numbers
        assert_near(results(traced.train(training), compiled, inputs), wanted, 1e-4)
    for network in (eager, traced):
        state = network.state_dict()
        floating = {k: v * 1.25 for k, v in state.items() if v.is_floating_point()}
        network.load_state_dict(state | floating)
    wanted = results(eager, eager, inputs)
    assert_near(results(traced, compiled, inputs), wanted, 1e-4)
    assert backend.graphs == 2


@each_network
def test_one_graph_for_two_sizes_under_autocast(build, draw, change):
    config = change(unit_config())
    eager, traced = (network.eval() for network in twins(build, config))
    backend = CountingBackend("eager")
    compiled = one_graph(traced, backend, dynamic=True)
    for batch, size in ((2, (32, 32)), (3, (64, 32))):
        inputs = draw(config, batch, size)
        with free_sizes(), torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            wanted, got = eager(*inputs), compiled(*inputs)
        wanted, got = ([x] if isinstance(x, Tensor) else [*x] for x in (wanted, got))
        # bfloat16 keeps 8 bits
        assert_near(got, wanted, 2**-6)
    assert backend.graphs == 1
