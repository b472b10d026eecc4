"""One of two processes that evaluate together; run by test_evaluation_protocol.py.

usage: evaluation_worker.py RANK STORE_FILE
"""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch
from evaluation_parts import ShadeDataset, ShadeGenerator, instruments, trained
from torch import distributed

from dpsims.errors import DistributedError, NonFiniteError
from dpsims_reference.evaluation import Process, Protocol, measure
from dpsims_reference.evaluation.images import spread
from dpsims_reference.evaluation.processes import joined_processes

# odd, fewer than a batch on one side, and nothing at all for the second process
CASES = (
    (7, Protocol(batch_size=2, samples_per_map=3, speed=False)),
    (5, Protocol(num_images=3, samples_per_map=2, diversity_maps=1, speed=False)),
)


def one_process():
    results = []
    for length, protocol in CASES:
        model = trained(ShadeGenerator(0.1))
        results.append(measure(model, ShadeDataset(length, noise=0.2), instruments(), protocol))
    return results


def assert_equals(found, expected):
    """Sums in the order of the positions: not one bit may differ."""
    assert found.figures == expected.figures
    assert found.num_images == expected.num_images
    for name, scores in expected.scores.items():
        assert torch.equal(found.scores[name].confusion, scores.confusion)
        assert torch.equal(found.real_scores[name].confusion, expected.real_scores[name].confusion)


class OneBrokenImage(ShadeGenerator):
    """NaN in the process that is told so."""

    def __init__(self, broken):
        super().__init__()
        self.broken = broken

    def __call__(self, labels, latents, *_):
        found = super().__call__(labels, latents)
        if self.broken:
            found.images = found.images * torch.nan
        return found


def assert_all_stop_together(rank):
    """The failing process says why, the other one that it was not alone; none hangs."""
    model = trained(OneBrokenImage(rank == 1))
    wanted = NonFiniteError if rank == 1 else DistributedError
    with pytest.raises(wanted):
        measure(model, ShadeDataset(5), instruments(), Protocol(samples_per_map=2, speed=False))


def main():
    torch.set_num_threads(1)
    # 7 images for 12 features
    warnings.filterwarnings("ignore", ".*rank deficient", UserWarning)
    rank, store = int(sys.argv[1]), sys.argv[2]
    expected = one_process()
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert Process.current() == Process(rank, 2)
    with joined_processes("cpu") as (process, device):
        assert (process, device) == (Process(rank, 2), "cpu")
    for (length, protocol), whole in zip(CASES, expected, strict=True):
        model = trained(ShadeGenerator(0.1))
        dataset = ShadeDataset(length, noise=0.2)
        assert_equals(measure(model, dataset, instruments(), protocol), whole)
        assert set(dataset.asked) == set(spread(length, protocol.num_images)[rank::2])
    assert_all_stop_together(rank)
    distributed.destroy_process_group()
    # and through the variables that torchrun sets
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": sys.argv[3]}
    with joined_processes("cpu") as (process, device):
        assert (process, device) == (Process(rank, 2), "cpu")
    assert not distributed.is_initialized()
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
