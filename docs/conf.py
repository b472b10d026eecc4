"""Sphinx configuration. The build is offline and treats warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "docs"), str(ROOT), str(ROOT / "examples")]

# found through the path above
from gallery import RecipeCards  # noqa: E402

import dpsims  # noqa: E402
from dpsims_reference.experiments import tables  # noqa: E402
from dpsims_reference.experiments.experiment import Experiment  # noqa: E402

project = "dpsims"
author = "The dpsims developers"
copyright = "2026, the dpsims developers"
version = release = dpsims.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.napoleon",
    "sphinx.ext.mathjax",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "sphinxcontrib.bibtex",
]
bibtex_bibfiles = ["references.bib"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"dpsims {version}"
html_static_path = ["_static"]
html_css_files = ["sort-tables.css", "pages.css"]
html_js_files = ["sort-tables.js"]
html_theme_options = {
    "light_css_variables": {"color-brand-primary": "#2456a6", "color-brand-content": "#2456a6"},
    "dark_css_variables": {"color-brand-primary": "#8fb4ff", "color-brand-content": "#8fb4ff"},
}

autosummary_generate = True
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autodoc_preserve_defaults = True
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_custom_sections = ["Shape", "Source"]
napoleon_use_rtype = False
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# offline: nothing outside the project can be linked
nitpick_ignore_regex = [
    (
        r"py:.*",
        r"(torch|numpy|timm|einops|torchmetrics|lpips|collections|pathlib|jaxtyping)(\..*)?",
    ),
    # the shapes in jaxtyping's annotations
    (r"py:class", r"'?[A-Z0-9 ]*'?"),
    (r"py:.*", r"(Tensor|nn\..*|F\..*|ValueError|TypeError|RuntimeError|ArithmeticError)"),
    (
        r"py:.*",
        r"(AttributeError|ModuleNotFoundError|IndexError|OSError|KeyError|object|int|float|str|bool|tuple|list|dict)",
    ),
]


def experiment_tables() -> str:
    """Every experiment in reStructuredText: one section and one table for each of the paper's."""
    lines: list[str] = []
    for table, rows in tables().items():
        title = f"Table {table.removeprefix('table')}"
        lines += [title, "-" * len(title), ""]
        lines += [".. list-table::", "   :header-rows: 1", "   :widths: 24 30 22 14 10", ""]
        cells = [["experiment", "what changes", "settings", "the paper's numbers", "ours"]]
        cells += [_experiment_cells(row) for row in rows]
        for first, *others in cells:
            lines += [f"   * - {first}", *(f"     - {cell}" for cell in others)]
        lines.append("")
    return "\n".join(lines)


def _experiment_cells(row: Experiment) -> list[str]:
    remarks = [f"{row.change[0].upper()}{row.change[1:]}, on ``{row.dataset}``.", row.note]
    remarks.append(f"At tiny size: {row.stand_in}." if row.stand_in else "")
    settings = ", ".join(f"``{setting}``" for setting in row.settings()) or "none"
    what = " ".join(remark for remark in remarks if remark)
    return [f"``{row.name}``", what, settings, row.numbers(), "not reproduced"]


class ExperimentTables(SphinxDirective):
    """``.. experiment-tables::`` puts the tables of the code into the page."""

    def run(self) -> list[nodes.Node]:
        return self.parse_text_to_nodes(experiment_tables(), allow_section_headings=True)


def setup(app: Sphinx) -> None:
    """Add the project's own directives."""
    app.add_directive("experiment-tables", ExperimentTables)
    app.add_directive("recipe-cards", RecipeCards)
