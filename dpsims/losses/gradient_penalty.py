"""R1: keep a discriminator flat around real images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from dpsims._checks import check_number, check_tensor
from dpsims.errors import InputError
from dpsims.losses._adversarial_terms import check_logits, widened


def r1_penalty(
    logits: Float[Tensor, "B ..."] | Sequence[Float[Tensor, "B ..."]],
    images: Float[Tensor, "B C H W"],
    *,
    weight: float = 1.0,
) -> Float[Tensor, ""]:
    r"""Half the squared slope of a discriminator at real images, averaged over the batch.

    :math:`\frac{\gamma}{2} \, \mathbb{E}_x \lVert \nabla_x D(x) \rVert^2`, where the score
    :math:`D(x)` of an image is the mean over heads of its mean logit, so that the penalty does not
    grow with the number of patches. With one logit per image that is the logit itself.

    Args:
        logits: The discriminator's logits of ``images``, one tensor or one per head. They must
            have been computed from ``images`` after ``images.requires_grad_()``.
        images: Real images.
        weight: The factor :math:`\gamma`. Used on every n-th step only (lazy regularisation),
            multiply it by n.
    Shape:
        - logits: tensors of any shape with ``B`` first; images ``(B, C, H, W)``; output a scalar,
          float32 or float64
    Raises:
        InputError: ``images`` does not require a gradient, the logits do not depend on it,
            gradients are switched off, batch sizes or devices differ, ``weight`` is negative.
        DTypeError: An input is not floating point.

    Note:
        Units: squared logits per squared pixel value. The gradient of the images is taken with
        ``create_graph``, so every operation between images and logits needs a second derivative:
        ``impl="sdpa"`` attention has none. Squares and sums in float32 or better; the slope itself
        has the precision of the network, so run it in float32, or in bfloat16, never in float16
        without care. A batch norm in the network makes images share their slopes.
        Cost: one backward pass now, and a backward through it later. Not for ``torch.compile``.
    Source:
        Mescheder et al., ICML 2018, Eq. (9). Lazy regularisation: Karras et al., CVPR 2020
        (StyleGAN2), App. B. Not used by DP-SIMS. Theirs -> ours: psi -> the discriminator,
        gamma -> weight. Not in the papers: the mean over heads and positions.

    Example:
        >>> images = torch.randn(2, 3, 4, 4, requires_grad=True)
        >>> logits = 3 * images.sum(dim=(1, 2, 3))  # a slope of 3 at each of 48 numbers
        >>> bool(r1_penalty(logits, images).isclose(torch.tensor(9 * 48 / 2)))
        True
    """
    owner = "r1_penalty"
    heads = check_logits(owner, "logits", logits)
    check_tensor(owner, "images", images, "B C H W", like=heads[0])
    check_number(owner, "weight", weight, minimum=0)
    batch = images.shape[0]
    if any(head.ndim == 0 or head.shape[0] != batch for head in heads):
        shapes = [tuple(head.shape) for head in heads]
        msg = f"{owner}: logits must have shape (B={batch}, ...), as images; got {shapes}"
        raise InputError(msg)
    if not torch.is_grad_enabled():
        msg = f"{owner}: images must be judged with gradients switched on; got them switched off"
        raise InputError(msg)
    if not images.requires_grad:
        msg = (
            f"{owner}: images must require a gradient before the discriminator sees them "
            f"(images.requires_grad_()); got requires_grad=False"
        )
        raise InputError(msg)
    used = [head for head in heads if head.requires_grad]
    # the sum of all scores: each image's own slope comes back, since no score needs another image
    scores = [widened(head).sum() * (batch / max(1, head.numel())) for head in used]
    slope = None
    if scores:
        total = torch.stack(scores).sum() / len(heads)
        (slope,) = torch.autograd.grad(total, images, create_graph=True, allow_unused=True)
    if slope is None:
        msg = f"{owner}: logits must depend on images; got logits computed from other tensors"
        raise InputError(msg)
    squares = widened(slope).square().sum()
    return weight / 2 * squares / max(1, batch)
