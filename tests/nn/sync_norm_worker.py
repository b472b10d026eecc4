"""One of two processes that normalise a split batch; run by test_norm.py, raises on a difference.

usage: sync_norm_worker.py RANK STORE_FILE
"""

from __future__ import annotations

import sys

import pytest
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from dpsims.errors import InputError
from dpsims.nn.norm import BatchNorm2d
from dpsims.nn.spade import SPADE
from dpsims.nn.spade_block import SPADEResBlock


def assert_close(actual, expected):
    # sums of some 40 float64 numbers in another order
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)


def assert_split_equals_whole(rank, cut):
    """Outputs, statistics, gradients and a gradient penalty; ranks of cut and 5 - cut items."""
    generator = torch.Generator().manual_seed(cut)
    images = torch.randn(5, 3, 4, 2, dtype=torch.float64, generator=generator) * 3 + 100
    upstream = torch.randn(5, 3, 4, 2, dtype=torch.float64, generator=generator)
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    results = []
    for part, sync in ((slice(None), False), (mine, True)):
        norm = BatchNorm2d(3, sync=sync).double()
        with torch.no_grad():
            norm.weight.copy_(torch.tensor([0.5, -1.0, 2.0]))
        leaf = images[part].clone().requires_grad_()
        out = norm(leaf)
        (grad,) = torch.autograd.grad((out * upstream[part]).sum(), leaf, create_graph=True)
        (grad.square().sum() + (out * upstream[part]).sum()).backward()
        if sync:
            for parameter in norm.parameters():
                distributed.all_reduce(parameter.grad)
        results.append((norm, out, grad, leaf.grad))
    (whole, *expected), (split, *actual) = results
    for one, other in zip(actual, expected, strict=True):
        assert_close(one, other[mine])
    for name, value in split.state_dict().items():
        assert_close(value, whole.state_dict()[name])
    for one, other in zip(split.parameters(), whole.parameters(), strict=True):
        assert_close(one.grad, other.grad)


def assert_ddp_equals_single(rank):
    """Two forwards and one backward of a block under DDP, on 1 and 3 items."""
    torch.manual_seed(1)
    whole = SPADEResBlock(3, 4, 2, hidden_channels=4).double()
    split = SPADEResBlock(3, 4, 2, hidden_channels=4, norm="sync_batch").double()
    split.load_state_dict(whole.state_dict())
    mine = slice(0, 1) if rank == 0 else slice(1, None)
    wrapped = DistributedDataParallel(split)
    features = torch.randn(2, 4, 3, 5, 4, dtype=torch.float64)
    cond = torch.randn(4, 2, 5, 4, dtype=torch.float64)
    (whole(features[0], cond).square() - whole(features[1], cond)).sum().backward()
    first = wrapped(features[0, mine], cond[mine])
    # DDP averages over the processes
    (2 * (first.square() - wrapped(features[1, mine], cond[mine])).sum()).backward()
    for (name, one), other in zip(split.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10, msg=name)
    for name, value in split.state_dict().items():
        assert_close(value, whole.state_dict()[name])


def assert_tails_equal_whole(rank, cut):
    """A SPADE of maps of cut and 5 - cut items: output, statistics, gradients and a penalty."""
    torch.manual_seed(cut)
    whole = SPADE(3, 2, hidden_channels=4).double()
    split = SPADE(3, 2, hidden_channels=4, norm="sync_batch").double()
    split.load_state_dict(whole.state_dict())
    images = torch.randn(5, 3, 4, 2, dtype=torch.float64) * 3 + 100
    cond, upstream = torch.randn(5, 2, 4, 2).double(), torch.randn(5, 3, 4, 2).double()
    mine = slice(0, cut) if rank == 0 else slice(cut, None)
    results = []
    for part, spade in ((slice(None), whole), (mine, split)):
        leaf = images[part].clone().requires_grad_()
        out = spade(leaf, cond[part], slope=0.2)
        (plain,) = torch.autograd.grad((out * upstream[part]).sum(), leaf, retain_graph=True)
        (grad,) = torch.autograd.grad((out * upstream[part]).sum(), leaf, create_graph=True)
        assert_close(plain, grad)
        (grad.square().sum() + (out * upstream[part]).sum()).backward()
        if spade is split:
            for parameter in spade.parameters():
                distributed.all_reduce(parameter.grad)
        results.append((spade, out, grad, leaf.grad))
    for one, other in zip(results[1][1:], results[0][1:], strict=True):
        torch.testing.assert_close(one, other[mine], rtol=1e-9, atol=1e-10)
    for name, value in split.state_dict().items():
        assert_close(value, whole.state_dict()[name])
    for one, other in zip(split.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-10)


def assert_too_small_raises(rank):
    """One value per channel in all processes together: both raise, none hangs."""
    norm = BatchNorm2d(2, sync=True)
    for call in (norm, norm.statistics):
        with pytest.raises(InputError, match="at least two values per channel"):
            call(torch.randn(rank, 2, 1, 1))


def assert_nan_is_guarded(rank):
    """A NaN in one process leaves the statistics of both alone."""
    norm = BatchNorm2d(2, sync=True)
    images = torch.randn(2, 2, 3, 3)
    if rank == 0:
        images[0, 0, 0, 0] = torch.nan
    out = norm(images)
    assert out[:, 0].isnan().all()
    assert out[:, 1].isfinite().all()
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_mean, torch.zeros(2))


def assert_half(rank):
    """bfloat16 in, bfloat16 out, moments in float32."""
    torch.manual_seed(2)
    norm = BatchNorm2d(2, sync=True)
    images = 100 + torch.randn(4, 2, 8, 8)
    out = norm(images[2 * rank : 2 * rank + 2].bfloat16())
    assert out.dtype == torch.bfloat16
    expected = images.bfloat16().float().mean((0, 2, 3)) * 0.1
    torch.testing.assert_close(norm.running_mean, expected, rtol=1e-5, atol=0)


def main():
    torch.set_num_threads(1)
    rank, store = int(sys.argv[1]), sys.argv[2]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    # 0 and 5: one process holds nothing
    for cut in (1, 3, 0, 5):
        assert_split_equals_whole(rank, cut)
        assert_tails_equal_whole(rank, cut)
    assert_ddp_equals_single(rank)
    assert_too_small_raises(rank)
    assert_nan_is_guarded(rank)
    assert_half(rank)
    distributed.destroy_process_group()
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
