"""Pages that nobody finds, recipes without a page, and diagrams that are not true."""

from __future__ import annotations

import ast
import itertools
import re
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest
import torch

from dpsims.nn import CrossAttentionNoiseInjector, UNetDecoder
from dpsims.nn._timm import plan_model
from dpsims_reference import build_generator, preset

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {
    str(path.relative_to(DOCS).with_suffix(""))
    for path in DOCS.rglob("*.rst")
    if "_build" not in path.parts
}
RECIPES = sorted(path.stem for path in (DOCS / "recipes").glob("*.rst") if path.stem != "index")
# a long run on a GPU, which the page of the demo describes
NO_RECIPES = {"scenes_run"}
EXAMPLES = sorted(p.stem for p in (ROOT / "examples").glob("*.py") if p.stem not in NO_RECIPES)
DIAGRAMS = ("generator", "discriminator", "injector", "level")
SVG = "{http://www.w3.org/2000/svg}"


# --- pages


def entries(page: str) -> list[str]:
    """What the toctrees of a page name, with patterns."""
    text = (DOCS / f"{page}.rst").read_text(encoding="utf-8")
    blocks = re.findall(r"^\.\. toctree::\n((?: +.*\n|\n)*)", text, re.MULTILINE)
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    folder = page.rpartition("/")[0]
    names = [line for line in lines if line and not line.startswith(":")]
    return [f"{folder}/{name}".lstrip("/") for name in names]


def test_every_page_can_be_reached():
    found, waiting = {"index"}, ["index"]
    while waiting:
        for entry in entries(waiting.pop()):
            new = {page for page in PAGES if fnmatch(page, entry)} - found
            assert new or "*" in entry, f"{entry} is no page, or is named twice"
            found |= new
            waiting += new
    assert PAGES - found == set()


# --- recipes


def test_every_recipe_has_a_page_and_every_page_a_recipe():
    assert [name.replace("_", "-") for name in EXAMPLES] == RECIPES


@pytest.mark.parametrize("page", RECIPES)
def test_a_recipe_page_shows_command_picture_and_file(page):
    text = (DOCS / "recipes" / f"{page}.rst").read_text(encoding="utf-8")
    name = page.replace("-", "_")
    assert f"make recipe NAME={name}" in text
    assert f"python examples/{name}.py --out" in text
    assert f".. literalinclude:: ../../examples/{name}.py" in text
    pictures = re.findall(r"^\.\. (?:image|figure):: (\S+)\n +:alt:", text, re.MULTILINE)
    assert pictures
    for picture in pictures:
        path = (DOCS / "recipes" / picture).resolve()
        assert path.stat().st_size <= 200_000
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 120


def test_the_gallery_reads_the_pages(monkeypatch):
    pytest.importorskip("sphinx", reason="needs the docs group")
    monkeypatch.syspath_prepend(str(DOCS))
    import gallery

    cards = gallery.recipes(DOCS)
    assert sorted(card.page for card in cards) == RECIPES
    for card in cards:
        assert card.summary.rstrip(".").count(" ") > 3
        assert card.picture
        assert card.alt
    parts = {part for card in cards for part in card.parts}
    public = (ROOT / "tests" / "public_names.txt").read_text().split()
    assert parts <= set(public)


# --- diagrams


def texts(name: str) -> list[str]:
    """The words of a diagram, in the order in which they are drawn."""
    root = ET.parse(DOCS / "_static" / f"diagram-{name}.svg").getroot()
    return [text.text for text in root.iter(f"{SVG}text")]


def after(words: list[str], *names: str) -> list[str]:
    """The line below each of these names."""
    return [below for name, below in itertools.pairwise(words) if name in names]


def shape(tensor: torch.Tensor) -> str:
    return " × ".join(str(size) for size in tensor.shape[1:])


@pytest.fixture(scope="module")
def generator_shapes():
    """What every module of the paper's generator gives for one image."""
    with torch.device("meta"):
        generator = build_generator(preset("ade20k"))
        found = {}
        for name, module in generator.named_modules():
            module.register_forward_hook(
                lambda module, args, output, name=name: found.update({name: output})
            )
        labels = torch.zeros(2, 256, 256, dtype=torch.long)
        found["image"] = generator(labels, torch.zeros(2, 64)).images
    return found


def test_the_generator_is_drawn_as_it_is(generator_shapes):
    words, found = texts("generator"), generator_shapes
    blocks = [shape(found[f"blocks.{index}"]) for index in range(6)]
    assert after(words, "SPADEResBlock") == blocks[::-1]
    levels = [shape(level) for level in found["pyramid"]]
    *drawn, stem = after(words, "LabelConv2d", "Conv2d, stride 2", "inject, attend")
    assert drawn == levels
    assert stem == shape(found["stem"])
    attending = sum(f"pyramid.blocks.{index}.inject" in found for index in range(6))
    assert words.count("inject, attend") == attending
    assert after(words, "NoiseMapper") == [f"{shape(found['mapper'])} tokens"]
    assert after(words, "image") == [shape(found["image"])]


def test_the_injector_is_drawn_as_it_is():
    words = texts("injector")
    inject = CrossAttentionNoiseInjector(64, 256).to("meta")
    features = torch.empty(1, 64, 64, 64, device="meta")
    tokens = torch.empty(1, 8, 256, device="meta")
    query = inject.query(features).flatten(2).mT
    assert f"N × d, {shape(query)}" in words
    assert f"N × T, {shape(query @ inject.key(tokens).mT)}" in words
    assert words.count(shape(inject.value(tokens))) == 2
    assert f"C × H × W, {shape(inject.output(inject.query(features)))}" in words
    assert f"B × T × D, {shape(tokens)}" in words


def test_a_level_is_drawn_in_the_order_of_the_code(generator_shapes):
    names = {
        "convs.2": "Conv2d 3×3, stride 2",
        "blocks.2.norm": "BatchNorm2d, GELU",
        "blocks.2.inject": "CrossAttentionNoiseInjector",
        "blocks.2.inject_norm": "BatchNorm2d, GELU",
        "blocks.2.attend": "SelfAttention2d, GELU",
        "blocks.2.attend_norm": "BatchNorm2d",
        "blocks.2.project": "Conv2d 1×1",
    }
    # hooks ran in the order of the calls
    called = [name.removeprefix("pyramid.") for name in generator_shapes]
    assert [names[name] for name in called if name in names] == texts("level")[:7]


def test_the_discriminator_is_drawn_as_it_is():
    config, found = preset("ade20k"), {}
    plan = plan_model(config.discriminator.backbone, None, num_levels=4, input_size=None)
    with torch.device("meta"):
        decoder = UNetDecoder(plan.channels, plan.reductions, config.data.num_classes + 1)
        for name, module in decoder.named_modules():
            module.register_forward_hook(
                lambda module, args, output, name=name: found.update({name: output})
            )
        maps = [
            torch.empty(1, width, 256 // stride, 256 // stride)
            for width, stride in zip(plan.channels, plan.reductions, strict=True)
        ]
        logits = decoder(torch.empty(1, 3, 256, 256), maps)
    words = texts("discriminator")
    stages = [shape(level) for level in maps]
    assert after(words, *(f"stage {number}" for number in range(1, 5))) == stages
    drawn = [f"full_res.{index}" for index in range(2)] + ["fuse"]
    drawn += [f"blocks.{index}" for index in range(4)]
    assert after(words, "residual block") == [shape(found[name]) for name in drawn]
    assert after(words, "logits") == [shape(logits)]


@pytest.mark.parametrize("name", DIAGRAMS)
def test_a_diagram_can_be_read_aloud_and_its_links_lead_somewhere(name):
    root = ET.parse(DOCS / "_static" / f"diagram-{name}.svg").getroot()
    title, description = root.find(f"{SVG}title"), root.find(f"{SVG}desc")
    assert root.get("role") == "img"
    assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
    assert len(description.text) > 80
    api = (DOCS / "api.rst").read_text(encoding="utf-8")
    for link in root.iter(f"{SVG}a"):
        page, _, anchor = link.get("href").partition("#")
        assert page == "api.html"
        package, _, part = anchor.rpartition(".")
        assert package == "dpsims.nn"
        assert f".. autoclass:: {part}\n" in api


def test_the_diagrams_are_those_of_the_script():
    code = "import diagrams as d; print([(f().name, f().svg()) for f in d.DIAGRAMS])"
    command = [sys.executable, "-c", code]
    drawn = subprocess.run(command, cwd=DOCS, check=True, timeout=60, capture_output=True)
    for name, svg in ast.literal_eval(drawn.stdout.decode()):
        kept = (DOCS / "_static" / f"diagram-{name}.svg").read_text(encoding="utf-8")
        assert svg == kept, f"run python docs/diagrams.py ({name})"
