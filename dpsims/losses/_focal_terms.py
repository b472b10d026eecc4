"""What the discriminator's pixel loss is made of."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor


class PixelFocalTerms(NamedTuple):
    """The two terms of the discriminator's loss; it minimises their sum.

    Attributes:
        real: Cost of the real images: name each pixel's class.
        fake: Cost of the fake images: call each pixel fake.

    Source:
        Berrada et al., CVPR 2024, Sec. 3.3, Eq. (3).

    Example:
        >>> import torch
        >>> terms = PixelFocalTerms(torch.tensor(0.5), torch.tensor(0.25))
        >>> float(sum(terms))
        0.75
    """

    real: Float[Tensor, ""]
    fake: Float[Tensor, ""]
