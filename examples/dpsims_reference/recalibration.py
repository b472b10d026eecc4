"""Batch-norm statistics for weights that were averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dpsims.errors import InputError, NonFiniteError

T = TypeVar("T")


def recalibrate_batch_norm_(
    model: nn.Module, batches: Iterable[T], forward: Callable[[T], object]
) -> None:
    """Measure the statistics of every batch norm anew, as plain averages over ``batches``.

    Averaged weights need it: the statistics they came with belong to other weights.

    Args:
        model: Only its batch norms run in training mode, everything else in evaluation mode;
            modes and momenta are put back.
        batches: Whatever ``forward`` takes, at least one.
        forward: Runs ``model`` on one batch; draws from its own random generator, if any.

    Raises:
        InputError: No batch came.
        NonFiniteError: A statistic became NaN or infinite. After any error the statistics are as
            they were.

    Note:
        Every batch counts alike, so use batches of one size. A layer that ``forward`` does not
        reach keeps what it had. With synchronised batch norms every process must call this,
        with as many batches. Needs no gradient.

    Source:
        Not from the paper. As ``torch.optim.swa_utils.update_bn``, for any kind of batch.

    Example:
        >>> model = nn.BatchNorm1d(1)
        >>> recalibrate_batch_norm_(model, [torch.tensor([[1.0], [3.0]])], model)
        >>> model.running_mean, model.running_var
        (tensor([2.]), tensor([2.]))
    """
    norms = [
        module
        for module in model.modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]
    if not norms:
        return
    before = [[buffer.clone() for buffer in norm.buffers()] for norm in norms]
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    try:
        _measure(model, norms, batches, forward)
    except BaseException:
        for norm, old in zip(norms, before, strict=True):
            _restore(norm, old)
        raise
    finally:
        for module, mode in modes:
            module.training = mode
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    for norm, old in zip(norms, before, strict=True):
        if not norm.num_batches_tracked:
            _restore(norm, old)


@torch.no_grad()
def _measure(
    model: nn.Module,
    norms: list[_BatchNorm],
    batches: Iterable[T],
    forward: Callable[[T], object],
) -> None:
    model.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.training = True
        # None means the plain average
        norm.momentum = None
    count = 0
    for batch in batches:
        forward(batch)
        count += 1
    if count == 0:
        msg = "recalibrate_batch_norm_: batches must hold at least one batch; got none"
        raise InputError(msg)
    bad = [norm for norm in norms if not all(b.isfinite().all() for b in norm.buffers())]
    if bad:
        msg = f"recalibrate_batch_norm_: statistics must be finite; got others in {bad[0]}"
        raise NonFiniteError(msg)


def _restore(norm: _BatchNorm, old: list[Tensor]) -> None:
    for buffer, value in zip(norm.buffers(), old, strict=True):
        buffer.copy_(value)
