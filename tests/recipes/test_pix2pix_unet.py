import ast
import functools
import json
import math
import re
from pathlib import Path

import pytest
import torch
from recipe_parts import EXAMPLES, load_recipe

from dpsims.nn.pretrained import state_sha256
from dpsims_reference import scene_figures

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "recipes" / "pix2pix-unet.rst"
STREETS = functools.partial(scene_figures.stack_scenes, size=32)
TINY = {"SCENES": 6, "UNSEEN": 4, "stack_scenes": STREETS}


@pytest.fixture(scope="module")
def example():
    return load_recipe("pix2pix_unet")


def blocks_of(page):
    """The code blocks of the page above the whole file, as a reader sees them."""
    found = []
    text = page.read_text(encoding="utf-8")
    for path, options in re.findall(r"^\.\. literalinclude:: (.+)\n((?:   :.+\n)*)", text, re.M):
        file = (page.parent / path).read_text(encoding="utf-8")
        options = dict(re.findall(r":([a-z-]+): (.+)", options))
        if "pyobject" in options:
            named = {getattr(node, "name", ""): node for node in ast.parse(file).body}
            found.append(ast.get_source_segment(file, named[options["pyobject"]]))
        elif options:
            start = file.index(options["start-at"])
            end = file.find(options.get("end-before", "\0"), start)
            found.append(file[start:] if end < 0 else file[start:end])
    return found


def test_the_blocks_of_the_page_are_the_whole_script_and_run(tmp_path, quick_report):
    script = "\n\n\n".join(block.strip() for block in blocks_of(PAGE)) + "\n"
    assert script == (EXAMPLES / "pix2pix_unet.py").read_text().split('"""\n\n', 1)[1]
    namespace = {"__name__": "page"}
    exec(compile(script, "page", "exec"), namespace)
    namespace |= TINY
    namespace["main"](["--out", str(tmp_path), "--steps", "1"])
    assert (tmp_path / "samples.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((tmp_path / "figures.json").read_text())
    moments = [f"{name}, {moment}" for name in ("plain", "changed") for moment in ("start", "end")]
    assert list(figures) == ["real", *moments]
    assert all(math.isfinite(value) for row in figures.values() for value in row.values())
    # the injector's gate is closed at first, and one step opens it
    noise = {name: row["between noises"] for name, row in figures.items()}
    assert noise["changed, start"] == 0
    assert noise["changed, end"] > 0
    assert noise["plain, start"] > 0


def test_training_is_deterministic_and_leaves_the_backbone_alone(example, monkeypatch):
    made = []

    class Watched(example.ConditionedBackbone):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(example, "ConditionedBackbone", Watched)
    data = STREETS(6, example.LOOKS)
    states = []
    for _ in range(2):
        torch.manual_seed(0)
        generator = example.SpadeUNet()
        example.train(generator, data, 1, 10.0)
        states.append(generator.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    for backbone in made:
        assert state_sha256(backbone._frozen_network) == backbone.weights_sha256


def test_noise_enters_by_the_gate_alone(example):
    generator = example.SpadeUNet().eval()
    labels = torch.randint(0, example.CLASSES, (1, 64, 64))
    noises = torch.randn(2, 1, example.LATENT)
    with torch.no_grad():
        closed = [generator(labels, noise) for noise in noises]
        generator.inject.gate.fill_(100.0)
        opened = [generator(labels, noise) for noise in noises]
    assert torch.equal(*closed)
    assert (opened[0] - opened[1]).abs().mean() > 1e-3


def test_the_decoder_reads_the_map_beside_the_encoder(example):
    """With its encoder and noise cut off, the changed generator still follows the map."""
    generator = example.SpadeUNet().eval()
    for layer in [*generator.down, *generator.up]:
        for parameter in layer.parameters():
            torch.nn.init.zeros_(parameter)
    labels = torch.zeros(1, 64, 64, dtype=torch.long)
    labels[:, :, 32:] = 5
    with torch.no_grad():
        left, right = generator(labels, torch.randn(1, example.LATENT)).split(32, dim=3)
    # away from the border between the classes, each side is of one colour
    assert (left[..., 4:28] - right[..., 4:28]).abs().amin() > 1e-4
