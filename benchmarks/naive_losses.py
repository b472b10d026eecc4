"""The losses in the plain way, to compare with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.naive import one_hot


def one_hot_focal(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float = 2.0) -> Tensor:
    """The focal loss as the paper writes it: a sum over all classes with one-hot targets.

    Args:
        logits: ``(B, C, H, W)``.
        labels: ``(B, H, W)``, every id a class.
        weights: ``(C,)``.
        gamma: Focusing exponent.
    """
    targets = one_hot(labels, logits.shape[1], logits.dtype)
    probability = torch.softmax(logits, 1)
    terms = targets * (1 - probability) ** gamma * torch.log_softmax(logits, 1)
    return -(weights.view(-1, 1, 1) * terms).sum(1).mean()


def gathered_focal(logits: Tensor, labels: Tensor, weights: Tensor, gamma: float = 2.0) -> Tensor:
    """The same number from the target's own probability, differentiated by autograd."""
    ids = labels.long()[:, None]
    log_p = torch.log_softmax(logits, 1).gather(1, ids)
    return -(weights[ids] * (1 - log_p.exp()) ** gamma * log_p).mean()


def balanced_cross_entropy(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """OASIS's form of loss: targets and weights are both found again in the one-hot map."""
    targets = one_hot(labels, logits.shape[1], logits.dtype)
    weight_map = weights[targets.argmax(1)]
    loss = F.cross_entropy(logits, targets.argmax(1), reduction="none")
    return (loss * weight_map).mean()


def looped_nce(levels: Sequence[tuple[Tensor, Tensor]], temperature: float) -> Tensor:
    """InfoNCE image by image and level by level: every patch against its image's other patches.

    Args:
        levels: Queries and positives ``(B, P, D)`` of every level.
        temperature: Divides the similarities.
    """
    total = levels[0][0].new_zeros(())
    for queries, positives in levels:
        losses = []
        for query, positive in zip(queries, positives, strict=True):
            query, positive = F.normalize(query, dim=1), F.normalize(positive, dim=1)
            same = (query * positive).sum(1, keepdim=True)
            own = torch.eye(len(query), dtype=torch.bool, device=query.device)
            others = (query @ positive.mT).masked_fill(own, -torch.inf)
            logits = torch.cat((same, others), 1) / temperature
            first = torch.zeros(len(query), dtype=torch.long, device=query.device)
            losses.append(F.cross_entropy(logits, first))
        total = total + torch.stack(losses).mean()
    return total
