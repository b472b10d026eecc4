"""What stands for the networks that only measure."""

import pytest
from torch import nn

from dpsims_reference import scene_figures


class QuickNet(nn.Module):
    """Stands for a segmentation net."""

    def __init__(self, num_classes):
        super().__init__()
        self.decoder = nn.Conv2d(3, num_classes, 1)

    def forward(self, images):
        return self.decoder(images)


@pytest.fixture
def quick_report(monkeypatch):
    pooled = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    monkeypatch.setattr(scene_figures, "SegmentationNet", QuickNet)
    monkeypatch.setattr(scene_figures, "PooledFeatures", lambda: pooled)
