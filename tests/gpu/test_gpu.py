"""What only a CUDA device can show: the same numbers as on CPU, no bad read, no hidden wait."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

# cuBLAS reads it once; without it deterministic matrix products are refused
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch
from rules_calls import asked_for, leaves, moved
from rules_part import Part
from rules_table import PARTS, by_constructor
from torch import Tensor, nn

from dpsims import losses, metrics, nn as parts

pytestmark = pytest.mark.gpu

DEVICE = torch.device("cuda")
# the two metrics are modules that their own test moves
ROWS = [part for part in PARTS if not part.name.endswith(".update")]
LOSSES = [part for part in ROWS if part.name in vars(losses) or part.name.startswith("PixelFocal")]


def each(rows: list[Part]) -> Any:
    return pytest.mark.parametrize("part", [pytest.param(part, id=part.id) for part in rows])


def forward_backward(part: Part, device: torch.device, dtype: torch.dtype, cast: bool) -> Any:
    """Outputs, then gradients of all inputs and parameters, on the CPU in float64."""
    called = part.make()
    if isinstance(called, nn.Module):
        called = called.to(device, dtype)
    inputs = {name: moved(value, device, dtype) for name, value in part.inputs().items()}
    asked = asked_for(part, inputs)
    if isinstance(called, nn.Module):
        asked += called.parameters()
    with torch.autocast(device.type, torch.bfloat16, enabled=cast):
        output = called(**inputs)
    found = leaves(output)
    total = sum(leaf.double().sin().sum() for leaf in found if leaf.is_floating_point())
    if isinstance(total, Tensor) and total.requires_grad:
        found = [*found, *torch.autograd.grad(total, asked)]
    elif isinstance(output, float):
        found = [torch.tensor(output)]
    assert found
    return [x.detach().to("cpu", torch.float64) for x in found]


def assert_near(actual: list[Tensor], expected: list[Tensor], share: float) -> None:
    """No tensor is off by more than a share of its size, as root mean squares."""

    def size(x: Tensor) -> float:
        return x.square().mean().sqrt().item()

    # some gradients are 0 in exact arithmetic: what they hold is the rounding of the others
    floor = 0.1 * max(size(wanted) for wanted in expected if wanted.is_floating_point())
    for value, wanted in zip(actual, expected, strict=True):
        assert value.shape == wanted.shape
        assert size(value - wanted) <= share * max(size(wanted), floor)


@contextmanager
def no_waiting() -> Iterator[None]:
    """Let everything that waits for the device raise."""
    if DEVICE.type != "cuda":
        yield
        return
    with warnings.catch_warnings():
        # the mode calls itself a prototype
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def assert_device_is_well() -> None:
    """An out-of-bounds read would show at the next kernel, or at a wait."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    assert torch.arange(5, device=DEVICE).sum().item() == 10


# --- the same numbers as on CPU


@pytest.mark.parametrize(
    ("dtype", "cast", "share"),
    [
        # sums in another order
        (torch.float64, False, 1e-9),
        # convolutions take TF32, which has 10 bits of mantissa, where the device has it
        (torch.float32, False, 1e-2),
        # bfloat16 has 7; through a whole backbone the CPU's own autocast is off by 0.11
        (torch.float32, True, 0.25),
    ],
    ids=["float64", "float32", "bfloat16-autocast"],
)
@each(ROWS)
def test_forward_and_backward_equal_those_on_cpu(part, dtype, cast, share):
    expected = forward_backward(part, torch.device("cpu"), dtype, cast=False)
    assert_near(forward_backward(part, DEVICE, dtype, cast), expected, share)
    assert_device_is_well()


def test_metrics_move_and_count_the_same():
    images = torch.rand(6, 3, 4, 4) * 2 - 1
    predicted, labels = torch.randint(0, 3, (2, 2, 4, 4))
    scores = []
    for device in (torch.device("cpu"), DEVICE):
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        distance = metrics.FrechetFeatureDistance(pool, name="mean color", num_features=3)
        distance.to(device).update(images.to(device), real=True)
        distance.update(images.flip(0).to(device) * 0.5, real=False)
        consistency = metrics.SegmentationConsistency(3).to(device)
        consistency.update(predicted.to(device), labels.to(device))
        scores.append((distance.compute(), consistency.compute().miou))
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_spectral_norm_moves_with_its_module():
    torch.manual_seed(0)
    module = parts.spectral_normalize_(
        parts.UNetDecoder([4], [2], 3, full_res_channels=4, head_channels=4)
    ).double()
    copy = deepcopy(module).to(DEVICE)
    images, features = torch.randn(2, 3, 6, 6).double(), [torch.randn(2, 4, 3, 3).double()]
    for _ in range(2):
        wanted = module(images, features)
        got = copy(images.to(DEVICE), moved(features, DEVICE))
    assert_near([moved(got, torch.device("cpu"))], [wanted.detach()], 1e-9)
    assert {buffer.device.type for buffer in copy.buffers()} == {DEVICE.type}


# --- labels out of range


BAD_IDS = [(3, torch.uint8), (254, torch.uint8), (-1, torch.int64), (2**40, torch.int64)]


@pytest.mark.parametrize(("bad", "dtype"), BAD_IDS, ids=lambda value: str(value))
def test_a_bad_label_turns_the_pixels_it_touches_nan(bad, dtype):
    conv = parts.LabelConv2d(3, 4, 3).to(DEVICE)
    labels = torch.zeros(2, 8, 9, dtype=dtype, device=DEVICE)
    labels[1, 4, 5], labels[0, 0, 0] = bad, 255
    output = conv(labels)
    touched = torch.zeros(2, 8, 9, dtype=torch.bool)
    touched[1, 3:6, 4:7] = True
    assert torch.equal(output.isnan().all(1).cpu(), touched)
    assert torch.equal(output.isnan().any(1).cpu(), touched)
    output.nan_to_num().sum().backward()
    assert_device_is_well()
    assert torch.equal(conv(labels).isnan(), output.isnan())


@pytest.mark.parametrize(("bad", "dtype"), BAD_IDS, ids=lambda value: str(value))
def test_a_bad_label_turns_its_loss_nan_and_no_other(bad, dtype):
    labels = torch.zeros(2, 4, 5, dtype=dtype, device=DEVICE)
    labels[1, 2, 3] = bad
    logits = torch.randn(2, 3, 4, 5, device=DEVICE, requires_grad=True)
    loss = losses.pixel_focal_loss(logits, labels, reduction="none")
    wanted = torch.zeros(2, 4, 5, dtype=torch.bool)
    wanted[1, 2, 3] = True
    assert torch.equal(loss.isnan().cpu(), wanted)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert torch.equal(grad.isnan().any(1).cpu(), wanted)
    assert losses.class_balance_weights(labels, 3).isnan().all()
    mixed = losses.label_mix(logits[:, :3], logits[:, :3], labels, num_classes=3)
    assert torch.equal(mixed.images.isnan().any(1).cpu(), wanted)
    assert_device_is_well()


# --- training


def test_two_forwards_of_the_backbone_then_one_backward():
    torch.manual_seed(0)
    original = parts.ConditionedBackbone("test_resnet", pretrained=False, num_levels=3).double()
    real, fake = torch.randn(2, 2, 3, 48, 32).double()
    results = []
    for device in (torch.device("cpu"), DEVICE):
        backbone = deepcopy(original).to(device)
        before = [x.clone() for x in backbone._extractor.state_dict().values()]
        inputs = [moved(images, device).requires_grad_() for images in (real, fake)]
        maps = [backbone(images) for images in inputs]
        gap = sum((a - b.square()).sum() for a, b in zip(*maps, strict=True))
        grads = torch.autograd.grad(gap, inputs)
        assert all(grad.any() for grad in grads)
        after = list(backbone._extractor.state_dict().values())
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True))
        state = [x for name, x in backbone.state_dict().items() if "running" in name]
        results.append([moved(x, torch.device("cpu")) for x in (*grads, *state)])
    # the normalisation divides by deviations of small maps
    assert_near(results[1], results[0], 1e-7)


@each([part for part in ROWS if part.name != "ConditionedBackbone"])
def test_deterministic_algorithms_run_and_repeat(part):
    with deterministic():
        first, second = (
            forward_backward(part, DEVICE, torch.float32, cast=False) for _ in range(2)
        )
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_the_backbone_is_deterministic_where_its_network_is():
    # a max pool, which test_resnet has, is not
    make = by_constructor(lambda: parts.ConditionedBackbone("test_convnext", pretrained=False))
    backbone = make().to(DEVICE)
    images = torch.randn(2, 3, 64, 64, device=DEVICE, requires_grad=True)
    with deterministic():
        grads = [
            torch.autograd.grad(sum(x.square().sum() for x in deepcopy(backbone)(images)), images)
            for _ in range(2)
        ]
    assert torch.equal(grads[0][0], grads[1][0])
    assert grads[0][0].isfinite().all()


@each(LOSSES)
def test_losses_never_wait_for_the_device(part):
    called = part.make()
    if isinstance(called, nn.Module):
        called = called.to(DEVICE)
    inputs = {name: moved(value, DEVICE) for name, value in part.inputs().items()}
    if "generator" in inputs:
        # numbers of a CPU generator must be copied, which waits
        inputs["generator"] = torch.Generator(DEVICE).manual_seed(0)
    asked = asked_for(part, inputs)

    def step() -> Tensor:
        total = sum(x.sum() for x in leaves(called(**inputs)))
        return total + sum(x.sum() for x in torch.autograd.grad(total, asked)) if asked else total

    # the first call may set libraries up
    wanted = step()
    with no_waiting():
        got = step()
    assert got.isfinite().item()
    assert "generator" in inputs or torch.allclose(got, wanted)
