"""Settings that every test shares."""

from __future__ import annotations

import os

# no test may reach for a model hub; the variable is read when huggingface_hub is first imported
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    # kernels run in Triton's interpreter; the variable is read when they are first imported
    os.environ["TRITON_INTERPRET"] = "1"

_SHARED = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("ci", max_examples=30, derandomize=True, print_blob=True, **_SHARED)
settings.register_profile("dev", max_examples=20, **_SHARED)
settings.register_profile("thorough", max_examples=1000, **_SHARED)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # results are bit-equal only for one number of threads, and xdist workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
