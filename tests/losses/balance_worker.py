"""One of two processes that balance the classes of a split batch; raises on a difference.

usage: balance_worker.py RANK STORE_FILE
"""

from __future__ import annotations

import sys

import torch
from torch import distributed

from dpsims.losses.class_weights import class_balance_weights
from dpsims.losses.focal import PixelFocalLoss


def assert_weights_of_the_whole(rank):
    """Equal, unequal and empty shards; a process without a label; integers of every width."""
    labels = torch.randint(7, (5, 6, 4), generator=torch.Generator().manual_seed(3))
    labels[labels == 5] = 255
    labels[:2] = 255
    for cut in (2, 3, 0, 5):
        mine = labels[:cut] if rank == 0 else labels[cut:]
        for dtype in (torch.uint8, torch.int64):
            split = class_balance_weights(mine.to(dtype), 7, sync=True)
            assert torch.equal(split, class_balance_weights(labels, 7))
    alone = class_balance_weights(labels[rank + 2 :], 7)
    assert torch.equal(alone, class_balance_weights(labels[rank + 2 :], 7, sync=False))


def assert_losses_average_to_the_whole(rank):
    """The mean over two equal shards is the loss of the batch, gradients included."""
    generator = torch.Generator().manual_seed(4)
    real, fake = torch.randn(2, 4, 6, 3, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(5, (4, 3, 5), generator=generator)
    # unequal numbers of labelled pixels: the case in which a mean over valid pixels goes wrong
    labels[0] = 255
    whole = PixelFocalLoss(5, label_smoothing=0.1)
    split = PixelFocalLoss(5, label_smoothing=0.1, sync=True)
    mine = slice(2 * rank, 2 * rank + 2)
    leaf = fake.clone().requires_grad_()
    expected = whole.discriminator(real, leaf, labels) + whole.generator(leaf, labels)
    (expected_grad,) = torch.autograd.grad(expected, leaf)
    leaf = fake[mine].clone().requires_grad_()
    loss = split.discriminator(real[mine], leaf, labels[mine]) + split.generator(
        leaf, labels[mine]
    )
    (grad,) = torch.autograd.grad(loss, leaf)
    total = loss.detach().clone()
    distributed.all_reduce(total)
    torch.testing.assert_close(total / 2, expected.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(grad / 2, expected_grad[mine], rtol=1e-12, atol=1e-15)


def main():
    torch.set_num_threads(1)
    rank, store = int(sys.argv[1]), sys.argv[2]
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    assert_weights_of_the_whole(rank)
    assert_losses_average_to_the_whole(rank)
    distributed.destroy_process_group()
    sys.stdout.write("all equal\n")


if __name__ == "__main__":
    main()
