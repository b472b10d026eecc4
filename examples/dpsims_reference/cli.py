"""The command line: one verb at a time, whose expected faults end with one line."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro

from dpsims.errors import (
    BackboneError,
    CheckpointError,
    DataError,
    DTypeError,
    InputError,
    NonFiniteError,
)
from dpsims_reference.options import (
    CheckData,
    Demo,
    Diagnose,
    Evaluate,
    Experiments,
    Export,
    Plan,
    PseudoLabels,
    Replay,
    Sample,
    Train,
)
from dpsims_reference.parsing import parse_plan, parse_train, program

_EXPECTED = (
    BackboneError,
    CheckpointError,
    DataError,
    DTypeError,
    InputError,
    ModuleNotFoundError,
    NonFiniteError,
)


_VERBS = {
    "train": Train,
    "sample": Sample,
    "export": Export,
    "evaluate": Evaluate,
    "experiments": Experiments,
    "diagnose": Diagnose,
    "replay": Replay,
    "plan": Plan,
    "pseudo-labels": PseudoLabels,
    "check-data": CheckData,
    "demo": Demo,
}
# verbs whose defaults depend on a preset
_PARSERS: dict[str, Callable[[Sequence[str]], Any]] = {"train": parse_train, "plan": parse_plan}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one verb. Expected faults end with one line on standard error and exit code 2."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if not arguments or arguments[0] not in _VERBS:
        print(_overview())
        wants_help = not arguments or arguments[0] in ("-h", "--help")
        sys.exit(0 if wants_help else 2)
    verb, rest = arguments[0], arguments[1:]
    from dpsims_reference import verbs

    try:
        parse = _PARSERS.get(verb)
        options = parse(rest) if parse else tyro.cli(_VERBS[verb], args=rest, prog=program(verb))
        verbs.RUNNERS[type(options)](options)
    except _EXPECTED as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("left at once; a checkpoint that was saved before is whole", file=sys.stderr)
        sys.exit(130)


def _overview() -> str:
    lines = ["usage: python -m dpsims_reference VERB [options]", ""]
    for name, options in _VERBS.items():
        summary = (options.__doc__ or "").strip().splitlines()[0]
        lines.append(f"  {name:<14} {summary}")
    return "\n".join([*lines, "", "VERB --help lists the options."])
