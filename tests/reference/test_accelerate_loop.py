import importlib.util
import math
from pathlib import Path

import pytest
from unit_run import unit_config

EXAMPLE = Path(__file__).parents[2] / "examples" / "accelerate_loop.py"


@pytest.mark.filterwarnings("ignore::FutureWarning:accelerate.*")
def test_the_loop_runs_and_is_the_reference_step():
    spec = importlib.util.spec_from_file_location("accelerate_loop", EXAMPLE)
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    config = unit_config(reuse_fake=False, accumulate=2, batch_size=8)
    losses = example.train(config, 2, cpu=True)
    assert len(losses) == 2
    assert set(losses[0]) == {"d_real", "d_fake", "g_pixel", "g_contrastive", "g_diversity"}
    assert all(math.isfinite(value) for terms in losses for value in terms.values())
    assert losses[0] != losses[1]


def test_the_example_is_short():
    assert len(EXAMPLE.read_text().splitlines()) <= 120
