"""What ``evaluate`` measures, with which networks, on how much."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
FeatureName = Literal["inception_v3", "inception_v3_antialias", "swav", "efficientnet_lite1"]


@dataclass(frozen=True)
class InstrumentOptions:
    """Which networks measure, and where their weights are."""

    features: tuple[FeatureName, ...] = ("efficientnet_lite1",)
    """Networks for Fréchet and kernel distance; inception_v3 gives FID and KID."""
    inception_weights: Path | None = None
    """File of FID's Inception-v3; None looks in $TORCH_HOME/hub/checkpoints."""
    swav_weights: Path | None = None
    """SwAV's ResNet-50 checkpoint, for --features swav."""
    segmenter: Path | None = None
    """Segmentation network, TorchScript or ONNX; None takes the labeller that made the maps."""
    segmenter_size: tuple[int, int] | None = None
    """Height and width that it sees; None leaves the images' own."""
    segmenter_mean: tuple[float, float, float] = IMAGENET_MEAN
    """Mean of its inputs in [0, 1]."""
    segmenter_std: tuple[float, float, float] = IMAGENET_STD
    """Deviation of its inputs."""
    segmenter_ids: Path | None = None
    """JSON list: for each of its classes the class of the data, or null."""
    lpips: Literal["none", "alex", "squeeze", "vgg"] = "none"
    """Also LPIPS over the samples of a map (Table 9), with this network."""
    lpips_weights: Path | None = None
    """Its weights; None looks in $TORCH_HOME/hub/checkpoints."""


@dataclass(frozen=True)
class Protocol:
    """What is measured on how much, and from which seed."""

    num_images: int | None = None
    """Images per figure, evenly spread over the data; None takes all."""
    batch_size: int = 16
    """Images at a time; changes no figure beyond rounding."""
    samples_per_map: int = 20
    """Samples of each label map for the diversity (Table 9)."""
    diversity_maps: int | None = 100
    """At most so many label maps for the diversity, evenly spread; None takes all, as Table 9."""
    kernel_distance: bool = True
    """Also the kernel distance of every extractor; Inception's is KID."""
    kernel_subset_size: int | None = None
    """Images of a subset; None is 1000, or all where there are fewer."""
    speed: bool = True
    """Also images per second."""
    seed: int = 0
    """Decides every noise."""

    def __post_init__(self) -> None:
        # the command line must not wait for torch to show its help
        from dpsims._checks import check_int

        for name in ("num_images", "diversity_maps", "kernel_subset_size"):
            if getattr(self, name) is not None:
                check_int("Protocol", name, getattr(self, name), minimum=0)
        check_int("Protocol", "batch_size", self.batch_size)
        check_int("Protocol", "samples_per_map", self.samples_per_map, minimum=2)
        check_int("Protocol", "seed", self.seed, minimum=0)
