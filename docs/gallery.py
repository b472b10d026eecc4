"""``.. recipe-cards::``: one card per recipe, read from its page and its example."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import NamedTuple

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

PACKAGES = ("nn", "losses", "data", "metrics")


class Recipe(NamedTuple):
    """What a card shows."""

    page: str
    title: str
    summary: str
    picture: str | None
    alt: str
    parts: tuple[str, ...]


def recipes(docs: Path) -> list[Recipe]:
    """Every page of ``docs/recipes`` but the index, by title."""
    pages = sorted((docs / "recipes").glob("*.rst"))
    found = [read_recipe(page) for page in pages if page.stem != "index"]
    return sorted(found, key=lambda recipe: recipe.title)


def read_recipe(page: Path) -> Recipe:
    """Title and first picture of a page, and what its example says and imports."""
    text = page.read_text(encoding="utf-8")
    title = re.findall(r"^(\S.*)\n=+\n", text, re.MULTILINE)[0]
    picture = re.search(r"^\.\. (?:image|figure):: (\S+)(?:\n +\S.*)*", text, re.MULTILINE)
    alt = re.search(r":alt: (.*(?:\n {6,}\S.*)*)", picture[0]) if picture else None
    example = page.parents[2] / "examples" / f"{page.stem.replace('-', '_')}.py"
    tree = ast.parse(example.read_text(encoding="utf-8"))
    return Recipe(
        page.stem,
        title,
        (ast.get_docstring(tree) or "").partition("\n\n")[0].replace("\n", " "),
        picture[1] if picture else None,
        " ".join(alt[1].split()) if alt else title,
        imported_parts(tree),
    )


def imported_parts(tree: ast.Module) -> tuple[str, ...]:
    """Full names of the public parts that a file imports."""
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.module]
    names = {
        alias.name for node in imports for alias in node.names if _is_public(node.module or "")
    }
    homes = {name: _home(name) for name in sorted(names)}
    return tuple(f"{home}.{name}" for name, home in homes.items() if home is not None)


def _is_public(module: str) -> bool:
    return module == "dpsims" or module.removeprefix("dpsims.") in PACKAGES


def _home(name: str) -> str | None:
    for package in PACKAGES:
        module = importlib.import_module(f"dpsims.{package}")
        if name in vars(module) and not name.startswith("_"):
            return module.__name__
    return None


def card(recipe: Recipe) -> list[str]:
    """A card in reStructuredText."""
    lines = [".. container:: recipe-card", ""]
    if recipe.picture is not None:
        lines += [f"   .. image:: {recipe.picture}", f"      :alt: {recipe.alt}"]
        lines += [f"      :target: {recipe.page}.html", ""]
    lines += ["   .. rst-class:: recipe-title", "", f"   :doc:`{recipe.page}`", ""]
    lines += [f"   {recipe.summary}", ""]
    if recipe.parts:
        links = ", ".join(f":py:obj:`~{part}`" for part in recipe.parts)
        lines += ["   .. rst-class:: recipe-parts", "", f"   {links}", ""]
    return lines


class RecipeCards(SphinxDirective):
    """Put the cards of all recipes into the page."""

    def run(self) -> list[nodes.Node]:
        """Read the pages again whenever one of them changes."""
        docs = Path(self.env.srcdir)
        found = recipes(docs)
        for recipe in found:
            self.env.note_dependency(str(docs / "recipes" / f"{recipe.page}.rst"))
        lines = [line for recipe in found for line in card(recipe)]
        grid = nodes.container(classes=["recipe-cards"])
        grid += self.parse_text_to_nodes("\n".join(lines))
        return [grid]
