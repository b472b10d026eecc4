"""Settings that every test shares."""

from __future__ import annotations

import os
from pathlib import Path

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


# what is built on dpsims counts for nothing in its coverage, and tracing takes a third of the time
_UNTRACED = [Path(__file__).with_name(name) for name in ("benchmarks", "recipes", "reference")]


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    # results are bit-equal only for one number of threads, and xdist workers share the cores
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    for item in items:
        built_on = any(item.path.is_relative_to(folder) for folder in _UNTRACED)
        # a compiler's own tracing is slowest of all under the tracer
        if built_on or item.get_closest_marker("compile"):
            item.add_marker(pytest.mark.no_cover)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
