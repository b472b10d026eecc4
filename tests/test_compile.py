"""Every public part of dpsims.nn and dpsims.losses traces into one graph and equals eager."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rules_calls import asked_for, leaves, moved, parameters_of, total_of
from rules_part import Arg, Part
from rules_table import LOSSES, MAP, NN, OPS, WITHOUT_TENSORS, by_constructor, floats, given
from torch import Tensor, nn
from tracing import CountingBackend, assert_near, free_sizes, one_graph

from dpsims import losses, nn as parts

pytestmark = pytest.mark.compile

CPU = torch.device("cpu")
# sums in another order
FLOAT64 = 1e-12
# bfloat16 keeps 8 bits; some gradients are sums of hundreds of its numbers, in another order
BFLOAT16 = 2**-5


def _two_convs() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 3))


def _on_two_convs(name: str, change: Any) -> Part:
    return Part(
        name,
        by_constructor(lambda: change(_two_convs())),
        given(input=floats(2, 3, 6, 7)),
        (Arg("input", MAP, fixed="C"),),
    )


# what changes a module: the changed module is traced
CHANGED = (
    _on_two_convs("spectral_normalize_", parts.spectral_normalize_),
    _on_two_convs(
        "fold_spectral_norm_", lambda m: parts.fold_spectral_norm_(parts.spectral_normalize_(m))
    ),
)
SMOOTH = tuple(
    replace(
        part,
        case="smooth",
        make=lambda: losses.PixelFocalLoss(3, label_smoothing=0.1, mask_fake=True).discriminator,
    )
    for part in LOSSES
    if part.name == "PixelFocalLoss.discriminator"
)
NOT_TRACED = {
    "effective_weight": "looks at a layer between two steps",
    "refresh_spectral_norm_": "changes buffers between two steps",
}
NOT_TRACED["prepare_for_inference"] = (
    "changes a module: tests/nn/test_inference.py traces what it gives"
)
NOT_TRACED["r1_penalty"] = "its value is a gradient, which torch.compile does not trace by default"
NOT_TRACED |= {name: why for name, why in WITHOUT_TENSORS.items() if why.startswith("a Named")}

ROWS = tuple(
    part for part in (*NN, *LOSSES, *OPS, *CHANGED, *SMOOTH) if part.name not in NOT_TRACED
)
LOOPS_OVER_BATCH = {"diversity_threshold"}

# axes of which no weight depends
FREE = {"B": 1, "N": 1, "T": 1, "H": 2, "W": 2, "h": 2, "w": 2}


def each(rows: Any) -> Any:
    return pytest.mark.parametrize("part", [pytest.param(part, id=part.id) for part in rows])


@pytest.fixture(autouse=True)
def _fresh():
    # graphs of other tests count against the limit of recompilations
    torch._dynamo.reset()


def inputs_of(part: Part, dtype: torch.dtype) -> dict[str, Any]:
    """New inputs. No compiler can trace a generator: numbers then come from torch's own."""
    inputs = {name: moved(value, CPU, dtype) for name, value in part.inputs().items()}
    inputs.pop("generator", None)
    for arg in part.args:
        if arg.name == "labels" and arg.kind == "int":
            # a pixel without a label
            inputs["labels"][:, 0, 0] = 255
    return inputs


def grown(part: Part, inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs of another size along every axis that may have one."""

    def larger(value: Any, axes: list[str], fixed: str) -> Any:
        if isinstance(value, list):
            return [larger(item, axes, fixed) for item in value]
        for axis, name in enumerate(axes):
            if name in FREE and name not in fixed:
                size = value.shape[axis]
                more = size * FREE[name] + (FREE[name] == 1)
                value = torch.cat([value] * (more // size + 1), axis).narrow(axis, 0, more)
                value = value.contiguous()
        return value

    changed = {arg.name: larger(inputs[arg.name], arg.axes, arg.fixed) for arg in part.args}
    return inputs | changed


def results(part: Part, called: Any, module: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Outputs, then the gradients of all inputs and parameters."""
    torch.manual_seed(0)
    asked = [*asked_for(part, inputs), *parameters_of(module)]
    found = leaves(called(**inputs))
    total = total_of(found)
    if asked and total.requires_grad:
        found += torch.autograd.grad(total, asked)
    return found


class Twins:
    """What a row makes, once eager and once compiled."""

    def __init__(
        self, part: Part, dtype: torch.dtype, *, backend: str = "aot_eager", **options: Any
    ) -> None:
        self.part, self.backend = part, CountingBackend(backend)
        self.eager, self.traced = part.make(), part.make()
        for made in self.modules:
            made.to(dtype)
        self.compiled = one_graph(self.traced, self.backend, **options)

    @property
    def modules(self) -> list[nn.Module]:
        return [made for made in (self.eager, self.traced) if isinstance(made, nn.Module)]

    def assert_equal(self, inputs: dict[str, Any], share: float) -> None:
        """Outputs, gradients, and what a call leaves in the buffers."""
        wanted, got = (
            results(self.part, call, made, dict(inputs))
            for call, made in ((self.eager, self.eager), (self.compiled, self.traced))
        )
        assert got
        assert_near(got, wanted, share)
        if self.modules:
            eager, traced = ([*module.buffers()] for module in self.modules)
            assert_near(traced, eager, share)

    def load(self, factor: float) -> None:
        """Other weights, the same for both."""
        for module in self.modules:
            state = module.state_dict()
            floating = {k: v * factor for k, v in state.items() if v.is_floating_point()}
            module.load_state_dict(state | floating)


def test_every_public_name_is_traced_or_says_why_not():
    listed = Path(__file__).with_name("public_names.txt").read_text().split()
    homes = ("dpsims.nn.", "dpsims.losses.")
    names = {name.rpartition(".")[2] for name in listed if name.startswith(homes)}
    rows = {part.name.partition(".")[0] for part in ROWS}
    assert names <= rows | set(NOT_TRACED)
    assert not rows & set(NOT_TRACED)


@each(ROWS)
def test_one_graph_in_training_that_other_weights_keep(part):
    twins = Twins(part, torch.float64)
    for factor in (1.0, 1.25):
        twins.load(factor)
        twins.assert_equal(inputs_of(part, torch.float64), FLOAT64)
    if (
        any((arg.name, arg.kind) == ("labels", "int") for arg in part.args)
        and part.name != "resize_labels"
    ):
        bad = inputs_of(part, torch.float64)
        bad["labels"] += 100
        # it cannot name the place, but must not compute on
        with pytest.raises(RuntimeError, match=r"labels must be in \[0, \d\)"):
            results(part, twins.compiled, twins.traced, bad)
    assert twins.backend.graphs == 1


@each([part for part in ROWS if not part.case and part not in CHANGED])
def test_one_graph_in_evaluation_for_any_size_under_autocast(part):
    twins = Twins(part, torch.float32, backend="eager", dynamic=True)
    for module in twins.modules:
        module.eval()
    # maps of a few pixels are special to some parts
    large = grown(part, inputs_of(part, torch.float32))
    with free_sizes(), torch.autocast("cpu", torch.bfloat16):
        for inputs in (large, grown(part, large)):
            twins.assert_equal(inputs, BFLOAT16)
    assert twins.backend.graphs == (2 if part.name in LOOPS_OVER_BATCH else 1)
