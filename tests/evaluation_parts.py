"""Small stand-ins for what an evaluation needs: exact, and without any pretrained network."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from unit_run import unit_config

from dpsims.data import LabelSpec
from dpsims.metrics import l1_distance, pairwise_diversity
from dpsims_reference.data.sample import Sample
from dpsims_reference.evaluation import FeatureExtractor, Instruments, NamedDistance, Segmenter
from dpsims_reference.sampling import TrainedGenerator

NUM_CLASSES, SIZE = 5, (8, 12)


class Colours(nn.Module):
    """Mean colour of each quarter: twelve features."""

    def forward(self, images):
        return F.adaptive_avg_pool2d(images, 2).flatten(1)


def colour_extractor(name="colours"):
    return FeatureExtractor(Colours(), name=name, num_features=12, resize="quarters")


def shade(labels):
    """A grey image whose shade is the class."""
    grey = (labels.float() / (NUM_CLASSES - 1) * 2 - 1)[:, None]
    return grey.expand(-1, 3, -1, -1)


def read_shade(images):
    """The class ids of images in [0, 1] that :func:`shade` made, noise of a tenth allowed for."""
    return (images.mean(1) * (NUM_CLASSES - 1)).round().long().clamp(0, NUM_CLASSES - 1)


def shade_segmenter(**options):
    return Segmenter(
        read_shade,
        **{
            "name": "shades",
            "num_classes": NUM_CLASSES,
            "mean": (0.0, 0.0, 0.0),
            "std": (1.0, 1.0, 1.0),
            **options,
        },
    )


class ShadeDataset:
    """Random maps with their shades as images; counts how often it is asked."""

    def __init__(self, length=7, *, noise=0.0):
        self.spec = LabelSpec(NUM_CLASSES)
        self.image_size = SIZE
        self.length, self.noise, self.asked = length, noise, []

    def __len__(self):
        return self.length

    def view(self, index):
        self.asked.append(index)
        generator = torch.Generator().manual_seed(index)
        labels = torch.randint(NUM_CLASSES, SIZE, generator=generator).to(torch.uint8)
        image = shade(labels[None])[0]
        image = image + self.noise * torch.randn(image.shape, generator=generator)
        return Sample(image.clamp(-1, 1), labels)

    def fingerprint(self):
        return f"shades of {self.length}"


class ShadeGenerator(torch.nn.Module):
    """The exact shades, moved by ``latents[:, 0] * strength``; pixel by pixel, so exact."""

    def __init__(self, strength=0.0, *, broken_at=None):
        super().__init__()
        self.strength, self.broken_at, self.calls = strength, broken_at, 0

    def sample_latents(self, count, *, generator):
        return torch.randn(count, 4, generator=generator)

    def sample_noise(self, *_, **__):
        return None

    def forward(self, labels, latents, *_):
        self.calls += 1
        images = shade(labels) + self.strength * latents[:, :1, None, None]
        if self.broken_at is not None:
            images = torch.where(labels[:, None] == self.broken_at, torch.nan, images)
        return SimpleNamespace(images=images)


def trained(generator=None):
    return TrainedGenerator(generator or ShadeGenerator(), unit_config(), LabelSpec(NUM_CLASSES))


def pixel_distance(name="pixels"):
    def diversity(samples):
        return float(pairwise_diversity(samples[:, None], l1_distance))

    return NamedDistance(name, diversity, {})


def instruments():
    return Instruments((colour_extractor(),), (shade_segmenter(),), (pixel_distance(),))
