"""Nothing in a forward or a backward reads values on the host or copies from it.

That is what a CUDA graph needs, and what keeps the device busy. It is shown without a GPU: fake
CUDA tensors take the path of CUDA and have no values to read. Torch's backward needs a device that
is there, so gradients are taken on the meta device, which has no values either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from rules_calls import asked_for, leaves, parameters_of, total_of
from rules_part import Part
from rules_table import LOSSES, NN, OPS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from unit_run import unit_config

from dpsims_reference.config import Config
from dpsims_reference.discriminator import build_discriminator
from dpsims_reference.generator import build_generator

ROWS = (*NN, *LOSSES, *OPS)
CUDA = torch.device("cuda", 0)
# each waits for the device, or gives a shape that depends on values
READS = {
    torch.ops.aten._local_scalar_dense,
    torch.ops.aten._unique2,
    torch.ops.aten.bincount,
    torch.ops.aten.equal,
    torch.ops.aten.is_nonzero,
    torch.ops.aten.masked_select,
    torch.ops.aten.nonzero,
    torch.ops.aten.unique_dim,
}


class NoHost(TorchDispatchMode):
    """Refuse every operator that reads values on the host, or moves tensors from or to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.seen += 1
        assert func._overloadpacket not in READS, f"{func} reads values"
        result = func(*args, **(kwargs or {}))
        before, after = (
            # an operator takes a number that is wrapped in a tensor of no axis without waiting
            {x.device.type for x in tree_leaves(values) if isinstance(x, Tensor) and x.dim()}
            for values in ((args, kwargs), result)
        )
        assert len(before | after) <= 1, f"{func} goes from {before} to {after}"
        return result


def each(rows: Any) -> Any:
    return pytest.mark.parametrize("part", [pytest.param(part, id=part.id) for part in rows])


def empty(value: Any, device: torch.device) -> Any:
    """A twin without values."""
    if isinstance(value, list):
        return [empty(item, device) for item in value]
    if not isinstance(value, Tensor):
        return value
    return torch.empty(value.shape, dtype=value.dtype, device=device)


def made(part: Part, *, training: bool) -> tuple[Any, dict[str, Any]]:
    """What a row makes, without values, and its inputs; random numbers are drawn on the device."""
    called = part.make()
    if isinstance(called, nn.Module):
        called = called.to("meta").train(training)
    inputs = part.inputs()
    inputs.pop("generator", None)
    return called, inputs


# a penalty on gradients has no value without them, and a backward needs a real device
@each([part for part in ROWS if part.name != "r1_penalty"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_forward_on_cuda_reads_nothing(part, training):
    called, inputs = made(part, training=training)
    mode = NoHost()
    with FakeTensorMode():
        if isinstance(called, nn.Module):
            # also reaches a frozen network, which is in no list of parameters
            called._apply(lambda x: empty(x, CUDA))
        inputs = {name: empty(value, CUDA) for name, value in inputs.items()}
        with torch.no_grad(), mode:
            found = leaves(called(**inputs))
    assert mode.seen
    assert {x.device for x in found} == {CUDA}


@each(ROWS)
def test_a_backward_reads_nothing(part):
    called, inputs = made(part, training=True)
    inputs = {name: empty(value, torch.device("meta")) for name, value in inputs.items()}
    asked = [*asked_for(part, inputs), *parameters_of(called)]
    with NoHost():
        total = total_of(leaves(called(**inputs)))
        if not (asked and total.requires_grad):
            return
        gradients = torch.autograd.grad(total, asked)
    assert [x.shape for x in gradients] == [x.shape for x in asked]


def with_oasis(config: Config) -> Config:
    return replace(config, generator=replace(config.generator, architecture="oasis"))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize(
    ("build", "config"),
    [
        pytest.param(build_generator, unit_config(), id="generator"),
        pytest.param(build_generator, with_oasis(unit_config()), id="oasis-generator"),
        pytest.param(build_discriminator, unit_config(), id="discriminator"),
    ],
)
def test_the_reference_networks_read_nothing_on_cuda(build, config, training):
    network = build(config).to("meta").train(training)
    size = config.data.image_size
    with FakeTensorMode():
        network._apply(lambda x: empty(x, CUDA))
        inputs = [torch.empty(2, 3, *size, device=CUDA)]
        if build is build_generator:
            labels = torch.empty(2, *size, dtype=torch.uint8, device=CUDA)
            inputs = [labels, torch.empty(2, config.generator.latent_dim, device=CUDA)]
        with torch.no_grad(), NoHost():
            found = leaves(network(*inputs))
    assert {x.device for x in found} == {CUDA}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.cpu(),
        lambda x: x + torch.zeros(3, device="cpu").to(x.device),
    ],
    ids=["item", "bool", "nonzero", "mask", "to-host", "from-host"],
)
def test_what_reads_is_found(read):
    with FakeTensorMode():
        x = torch.empty(3, device=CUDA)
        with pytest.raises((AssertionError, DynamicOutputShapeException)), NoHost():
            read(x)
