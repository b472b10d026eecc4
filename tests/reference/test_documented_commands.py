"""Commands in the documentation are commands that exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import tyro

from dpsims_reference import cli
from dpsims_reference.config import OFFICIAL

DOCS = Path(__file__).parents[2] / "docs"
PAGES = sorted(path.stem for path in DOCS.glob("*.rst"))


def commands(page):
    """What follows ``python -m dpsims_reference`` in a page, as lists of words."""
    text = (DOCS / f"{page}.rst").read_text(encoding="utf-8").replace("\\\n", " ")
    started = r"^ +\$ (?:python|torchrun [^\n]+) -m dpsims_reference (.+)$"
    found = re.findall(started, text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in found if "--help" not in line]


@pytest.mark.parametrize(
    "words", [words for page in PAGES for words in commands(page)], ids=" ".join
)
def test_a_documented_command_parses(words):
    verb, *rest = words
    parse = cli._PARSERS.get(verb, lambda rest: tyro.cli(cli._VERBS[verb], args=rest))
    options = parse(rest)
    assert isinstance(options, cli._VERBS[verb])
    # --data with a path means a folder of one's own; official data sets take --data.root
    if verb == "train" and options.preset in OFFICIAL:
        assert options.data is None


def test_a_command_that_does_not_exist_is_found_out(capsys):
    with pytest.raises(SystemExit):
        cli.parse_train(["--optim.no-such-option", "3"])
    assert "no-such-option" in capsys.readouterr().err


@pytest.mark.parametrize("page", PAGES)
def test_documented_options_are_fields_of_the_configuration(page):
    """``objective.balanced`` in the text, ``--objective.focal-gamma`` in a command."""
    text = (DOCS / f"{page}.rst").read_text(encoding="utf-8")
    groups = "generator|discriminator|objective|optim|data"
    names = re.findall(rf"``(?:--)?({groups})\.([a-z][a-z_-]+)", text)
    assert names or page not in ("troubleshooting", "diagnostics")
    for group, name in names:
        field = name.replace("-", "_").removeprefix("no_")
        assert hasattr(getattr(cli.Train().config, group), field), f"{group}.{name}"
