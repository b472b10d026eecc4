"""The components: one script each, with a function that lists its cases."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.cases import Case, Place
from benchmarks.components import (
    attention,
    focal,
    generator,
    info_nce,
    label_conv,
    spade_tail,
    training,
)
from dpsims.errors import InputError

# in the order of a run: what says most per second comes first
COMPONENTS: dict[str, Callable[[Place], list[Case]]] = {
    "focal": focal.cases,
    "spade_tail": spade_tail.cases,
    "attention": attention.cases,
    "label_conv": label_conv.cases,
    "info_nce": info_nce.cases,
    "generator": generator.cases,
    "training": training.cases,
}


def list_cases(names: list[str], place: Place) -> list[Case]:
    """The cases of some components, in the order of a run.

    Raises:
        InputError: There is no component of a name.
    """
    for name in names:
        if name not in COMPONENTS:
            msg = f"list_cases: names must be among {', '.join(COMPONENTS)}; got {name!r}"
            raise InputError(msg)
    return [case for name, cases in COMPONENTS.items() if name in names for case in cases(place)]
