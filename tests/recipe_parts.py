"""What the tests of several recipes share."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from torch import nn

EXAMPLES = Path(__file__).parents[1] / "examples"


def load_recipe(name):
    """The file ``examples/<name>.py`` as a new module, which a test may change."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class QuickNet(nn.Module):
    """Stands for a segmentation net that only measures."""

    def __init__(self, num_classes):
        super().__init__()
        self.decoder = nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        return self.decoder(images)


def quick_features():
    """Stands for pooled features of a network."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
