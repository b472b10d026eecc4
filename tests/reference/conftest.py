"""Settings that the tests of the reference model share."""

from __future__ import annotations

import pytest

from dpsims_reference import probes


@pytest.fixture(scope="session", autouse=True)
def _few_maps():
    # statistics for good pictures take more maps than a test of anything else needs
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probes, "RECALIBRATION_MAPS", 4)
        patch.setattr(probes, "CALIBRATION_MAPS", 4)
        yield
