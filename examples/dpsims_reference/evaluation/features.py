"""Distances between the features of real and of generated images."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from dpsims._checks import check_int, check_tensor
from dpsims._optional import require
from dpsims.errors import InputError
from dpsims.metrics import frechet_distance
from dpsims_reference.evaluation.extractors import FeatureExtractor
from dpsims_reference.evaluation.processes import Process
from dpsims_reference.randomness import derive_seed

_LARGEST_SUBSET, _SUBSETS = 1000, 100


class KernelDistance(NamedTuple):
    """Mean and deviation of the kernel distance over subsets of the images."""

    mean: float
    std: float
    subsets: int
    subset_size: int


class FeatureSets:
    """The features of the real and of the generated images under one extractor.

    Features are kept, not only their moments, since the kernel distance needs them: 8 kB for each
    image at 2048 features.

    Args:
        extractor: What gives the features.
    """

    def __init__(self, extractor: FeatureExtractor) -> None:
        self.extractor = extractor
        self._rows: dict[bool, list[Tensor]] = {True: [], False: []}
        self._positions: dict[bool, list[int]] = {True: [], False: []}

    def add(self, positions: list[int], images: Float[Tensor, "B 3 H W"], *, real: bool) -> None:
        """Add images in [-1, 1] that stand at ``positions`` of the data set."""
        self._rows[real].append(self.extractor(images).float().cpu())
        self._positions[real] += positions

    def gathered(self, process: Process, *, real: bool) -> Float[Tensor, "N D"]:
        """Features of all processes in float64, in the order of the positions."""
        rows = torch.cat([torch.empty(0, self.extractor.num_features), *self._rows[real]])
        positions = torch.tensor(self._positions[real], dtype=torch.int64)
        return process.gather(positions, rows).double()

    def figures(
        self, process: Process, *, seed: int, subset_size: int | None, kernel: bool = True
    ) -> dict[str, float]:
        """Fréchet and kernel distance, each under the extractor's name.

        Only Inception's are called FID and KID.

        Warns:
            UserWarning: There are no more images than features: the distance only ranks.
        """
        real, fake = (self.gathered(process, real=which) for which in (True, False))
        name, is_fid = self.extractor.name, self.extractor.kind == "fid"
        frechet, distance = ("fid", "kid") if is_fid else ("frechet", "kernel_distance")
        found = {f"{frechet}/{name}": frechet_distance(real, fake)}
        if kernel:
            result = kernel_distance(real, fake, seed=seed, subset_size=subset_size)
            found[f"{distance}/{name}"] = result.mean
            if result.subsets > 1:
                found[f"{distance}_std/{name}"] = result.std
        return found


def kernel_subsets(count: int, subset_size: int | None) -> tuple[int, int]:
    """How many subsets of which size the kernel distance takes of ``count`` images.

    Raises:
        InputError: The size is below 2 or above ``count``.
    """
    owner = "kernel_distance"
    size = min(_LARGEST_SUBSET, count) if subset_size is None else subset_size
    check_int(owner, "subset_size", size, minimum=2)
    if size > count:
        msg = f"{owner}: subset_size must be at most the {count} images of a set; got {size}"
        raise InputError(msg)
    return (1 if size == count else _SUBSETS), size


def kernel_distance(
    real: Float[Tensor, "N D"],
    fake: Float[Tensor, "M D"],
    *,
    seed: int = 0,
    subset_size: int | None = None,
) -> KernelDistance:
    """The squared maximum mean discrepancy of KID, through torchmetrics, in float64.

    Args:
        real: Features of the real images.
        fake: Features of the generated ones.
        seed: Decides the subsets.
        subset_size: Images of each of the 100 subsets; ``None`` is 1000, or all where there are
            fewer. A subset of all images is taken once.

    Raises:
        InputError: Wrong shapes, fewer than 2 images, or a subset that is larger than its set.
    """
    owner = "kernel_distance"
    check_tensor(owner, "real", real, "N D")
    check_tensor(owner, "fake", fake, "M D", D=real.shape[1], like=real)
    subsets, size = kernel_subsets(min(len(real), len(fake)), subset_size)
    # what is left of a larger set differs from draw to draw
    subsets = _SUBSETS if len(real) != len(fake) else subsets
    kid = require("torchmetrics.image.kid", extra="metrics", purpose=owner)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        # it says that it keeps the features, which are here already
        warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance`", UserWarning)
        metric = kid.KernelInceptionDistance(
            feature=nn.Identity(),
            subsets=subsets,
            subset_size=size,
            # the rows of all processes are here already
            sync_on_compute=False,
        )
        # torchmetrics draws its subsets from the global generator; the CPU's alone is put back
        torch.default_generator.manual_seed(derive_seed(seed, "kernel-distance"))
        metric.update(real.double(), real=True)
        metric.update(fake.double(), real=False)
        mean, std = metric.compute()
    return KernelDistance(float(mean), float(std), subsets, size)
