"""Sphinx configuration. The build is offline and treats warnings as errors."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import dpsims  # noqa: E402 - found through the path above

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
    (r"py:.*", r"(Tensor|nn\..*|F\..*|ValueError|TypeError|RuntimeError|ArithmeticError)"),
    (
        r"py:.*",
        r"(ModuleNotFoundError|IndexError|OSError|KeyError|object|int|float|str|bool|tuple|list|dict)",
    ),
]
