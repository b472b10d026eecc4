"""The reference networks trace into one graph and equal eager.

Training through a whole step is in test_steps.py.
"""

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


def tiny_config() -> Config:
    tiny = preset("tiny")
    return replace(tiny, discriminator=replace(tiny.discriminator, pretrained=False, weights=None))


def unchanged(config: Config) -> Config:
    return config


def with_oasis(config: Config) -> Config:
    return replace(config, generator=replace(config.generator, architecture="oasis"))


def maps_and_latents(config: Config, batch: int, size: tuple[int, int]) -> list[Tensor]:
    labels = torch.randint(config.data.num_classes, (batch, *size))
    return [labels, torch.randn(batch, config.generator.latent_dim)]


def pictures(config: Config, batch: int, size: tuple[int, int]) -> list[Tensor]:
    return [torch.rand(batch, 3, *size) * 2 - 1]


NETWORKS = {
    "generator": (build_generator, maps_and_latents),
    "discriminator": (build_discriminator, pictures),
}


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


def tensors(out: object) -> list[Tensor]:
    return [out] if isinstance(out, Tensor) else [*out]


@pytest.fixture(autouse=True)
def _fresh():
    torch._dynamo.reset()


@pytest.mark.parametrize("name", list(NETWORKS))
def test_the_tiny_networks_are_one_graph_in_evaluation(name):
    (build, draw), config = NETWORKS[name], tiny_config()
    eager, traced = (network.eval() for network in twins(build, config))
    backend = CountingBackend("eager")
    compiled = one_graph(traced, backend)
    inputs = draw(config, 2, config.data.image_size)
    with torch.no_grad():
        assert_near(tensors(compiled(*inputs)), tensors(eager(*inputs)), 1e-5)
    assert backend.graphs == 1


@pytest.mark.parametrize("change", [unchanged, with_oasis], ids=["dp_sims", "oasis"])
def test_a_generator_is_one_graph_for_two_sizes(change):
    config = change(unit_config())
    eager, traced = (network.eval() for network in twins(build_generator, config))
    backend = CountingBackend("eager")
    compiled = one_graph(traced, backend, dynamic=True)
    with free_sizes(), torch.no_grad():
        for batch, size in ((2, (32, 48)), (3, (48, 32))):
            inputs = maps_and_latents(config, batch, size)
            assert_near(tensors(compiled(*inputs)), tensors(eager(*inputs)), 1e-5)
    assert backend.graphs == 1


def test_oasis_is_one_graph_in_training():
    config = with_oasis(unit_config())
    eager, traced = twins(build_generator, config)
    backend = CountingBackend()
    compiled = one_graph(traced, backend)
    inputs = maps_and_latents(config, 2, config.data.image_size)
    found = []
    for network, called in ((traced, compiled), (eager, eager)):
        out = tensors(called(*inputs))
        total = sum(x.square().mean() for x in out)
        grads = torch.autograd.grad(total, [*network.parameters()])
        found.append([*out, *grads, *network.buffers()])
    # some gradients are sums of thousands of float32 numbers
    assert_near(*found, 1e-4)
    assert backend.graphs == 1
