"""The long run on street scenes, made very short: it measures, goes on, and measures again."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "scenes_run.py"
TINY = ["--size", "32", "--batch-size", "2", "--scenes", "6", "--images", "4"]
TINY += ["--segmenter-steps", "2", "--workers", "0", "--minutes", "0.01", "--every", "1"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:frechet_distance.*rank deficient:UserWarning")
def test_a_second_call_goes_on(tmp_path):
    spec = importlib.util.spec_from_file_location("scenes_run", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    for calls in (1, 2):
        script.main(["--out", str(tmp_path), *TINY])
        history = json.loads((tmp_path / "figures.json").read_text())
        assert len(history) == calls
        figures = history[-1]["figures"]
        assert all(math.isfinite(value) for value in figures.values())
        assert 0 <= figures["miou/scene_segmenter"] <= 1
        assert figures["miou_real/scene_segmenter"] > 0
        for picture in ("curves.png", "samples.png"):
            assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
    steps = [record["step"] for record in history]
    seconds = [record["seconds"] for record in history]
    assert 0 < steps[0] < steps[1]
    assert seconds[0] < seconds[1]
