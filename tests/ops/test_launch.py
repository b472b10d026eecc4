"""What kernels learn of their maps is what the memory says."""

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, strategies as st

from dpsims.ops._launch import (
    ceil_div,
    is_flat,
    map_strides,
    on,
    power_of_two,
    reach,
    triton_kernel,
)

sides = st.integers(1, 4)
orders = st.permutations(range(4))


def laid_out(sizes, order, step):
    """A map whose axes lie in memory in any order, of which every other entry may be left out."""
    shape = [sizes[axis] for axis in order]
    base = torch.arange(step * torch.Size(shape).numel())[::step].view(shape)
    return base.permute([order.index(axis) for axis in range(4)])


@given(sizes=st.tuples(sides, sides, sides, sides), order=orders, step=st.integers(1, 2))
def test_steps_lead_to_every_entry(sizes, order, step):
    value = laid_out(sizes, order, step)
    _, channels, height, width = sizes
    b, c, h, w = map_strides(value)
    flat = value.as_strided((value.untyped_storage().nbytes() // 8,), (1,), 0)
    first = value[0, 0, 0, 0].item()
    for image in value:
        for channel in range(channels):
            pixels = image[channel].flatten().tolist()
            start = first + channel * c
            rows = [start + y * h + x * w for y in range(height) for x in range(width)]
            assert flat[rows].tolist() == pixels
            if is_flat(value):
                assert flat[[start + p * w for p in range(height * width)]].tolist() == pixels
        # the entry that lies farthest behind the first one
        assert reach(value) == image.max().item() - first
        first += b


def test_gaps_between_rows_are_seen():
    whole = torch.zeros(2, 3, 6, 8)
    assert is_flat(whole)
    assert is_flat(whole[:, 1:, ::6])
    assert is_flat(whole[..., ::2])
    assert is_flat(whole[..., :1])
    assert not is_flat(whole[..., :4])
    assert not is_flat(whole[:, :, ::2])
    assert not is_flat(whole.mT)
    # maps without channels, and those whose entries share memory
    assert is_flat(whole[:, 0])
    assert map_strides(whole[:, 0, :, :1]) == (144, 8, 8)
    assert is_flat(torch.zeros(()).expand(2, 6, 8))
    assert reach(torch.zeros(()).expand(2, 6, 8)) == 0


def test_an_empty_batch_has_steps_too():
    value = torch.zeros(0, 3, 4, 5)
    assert map_strides(value) == (60, 20, 5, 1)
    assert is_flat(value)
    assert reach(value) == 59


def test_kernels_run_where_the_tensors_are(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "device", chosen.append)
    on(torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1)]
    with on(torch.device("cpu")):
        assert len(chosen) == 1


@pytest.mark.gpu
def test_the_current_device_is_restored():
    before = torch.cuda.current_device()
    last = torch.cuda.device_count() - 1
    with on(torch.device("cuda", last)):
        assert torch.cuda.current_device() == last
    assert torch.cuda.current_device() == before


def test_kernels_are_loaded_when_they_run(monkeypatch):
    run = triton_kernel("no_such_module", "double")
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run(2)
    monkeypatch.setitem(sys.modules, "no_such_module", SimpleNamespace(double=lambda x: 2 * x))
    assert run(2) == 4


@given(size=st.integers(1, 3000), by=st.integers(1, 300))
def test_sizes(size, by):
    parts = ceil_div(size, by)
    assert (parts - 1) * by < size <= parts * by
    power = power_of_two(size)
    assert power.bit_count() == 1
    assert power // 2 < size <= power
