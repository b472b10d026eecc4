"""What a generator of the paper's size may cost, counted on tensors without values.

A convolution or matrix product counts two operations a multiply-add. Picking rows of a table,
which replaces the convolution of a label map, adds and does not multiply: it counts as nothing,
like all elementwise work. A kernel is a call of an ATen operator that reads or makes numbers: no
view, and no allocation.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dpsims_reference.generator import build_generator
from dpsims_reference.prepared import PreparedGenerator
from dpsims_reference.presets import preset

# they say where numbers are, not what they are
WITHOUT_WORK = {
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.detach.default",
    "aten.new_empty.default",
    "aten.lift_fresh.default",
    "aten._to_copy.default",
}


class Kernels(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if not function.is_view and str(function) not in WITHOUT_WORK:
            self.calls.append(str(function))
        return result


def gigaflops(run):
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def kernels(run):
    with torch.no_grad(), Kernels() as counter:
        run()
    return counter.calls


def inputs(size=(256, 256), batch=1):
    return torch.zeros(batch, *size, dtype=torch.uint8), torch.zeros(batch, 64)


@pytest.fixture(scope="module")
def ade():
    with torch.device("meta"):
        return build_generator(preset("ade20k")).eval()


@pytest.fixture(scope="module")
def prepared(ade):
    return PreparedGenerator(ade)
